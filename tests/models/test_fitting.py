"""A state into a module: wrappers, old names, heads of other sizes."""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from diffsal.data.preprocessing import Preprocessing
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import load_model, save_checkpoint

SMALL = "shufflenet_v2_x0_5"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("auxiliary", ["absent", "present", "of another width"])
def test_auxiliary_heads(name, auxiliary, network, save, same_outputs, zeros):
    model = network(name, num_classes=2, aux_logits=auxiliary != "absent", transform_input=True)
    state = model.state_dict()
    if auxiliary == "of another width":
        for key in ("aux2.fc2.weight", "aux2.fc2.bias", "AuxLogits.fc.weight", "AuxLogits.fc.bias"):
            if key in state:
                state[key] = torch.zeros(1000, *state[key].shape[1:])
    loaded = load_model(save(state))
    assert loaded.arguments == {"transform_input": True, "num_classes": 2}
    usual = Preprocessing(size=(299, 299)) if name == "inception_v3" else None
    assert loaded.preprocessing == usual
    assert same_outputs(model, loaded.model, 96)


def test_old_names_of_densenet(network, save, same_outputs):
    model = network("densenet121", num_classes=2)
    state = {
        re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", key): value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    assert same_outputs(model, load_model(save(state)).model)


def test_old_names_of_vit(save, zeros):
    state = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in zeros("vit_b_16").items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_2.bias" in state
    assert load_model(save(state)).architecture == "torchvision:vit_b_16"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_the_files(dtype, network, save, same_outputs):
    model = network(SMALL, num_classes=2).to(dtype)
    loaded = load_model(save(model.state_dict()))
    dtypes = {value.dtype for value in loaded.model.state_dict().values()}
    assert dtypes == {dtype, torch.int64}
    assert same_outputs(model, loaded.model)


DROPOUT = nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("name", "attribute", "head"),
    [
        (SMALL, "fc", nn.Sequential(DROPOUT, nn.Linear(1024, 3))),
        (SMALL, "fc", nn.Sequential(OrderedDict(drop=DROPOUT, out=nn.Linear(1024, 3)))),
        (SMALL, "fc", nn.Sequential(DROPOUT, nn.Sequential(nn.Linear(1024, 3, bias=False)))),
        ("densenet121", "classifier", nn.Sequential(DROPOUT, nn.Linear(1024, 3))),
        ("efficientnet_b0", "classifier", nn.Linear(1280, 3)),
        ("efficientnet_b0", "classifier", nn.Sequential(nn.Linear(1280, 3))),
        ("efficientnet_b0", "classifier", nn.Sequential(DROPOUT, DROPOUT, nn.Linear(1280, 3))),
        ("mobilenet_v3_small", "classifier", nn.Linear(576, 3)),
        ("mobilenet_v3_small", "classifier.3", nn.Sequential(DROPOUT, nn.Linear(1024, 3))),
        ("squeezenet1_1", "classifier.1", nn.Sequential(DROPOUT, nn.Conv2d(512, 3, 1))),
        ("convnext_tiny", "classifier.2", nn.Sequential(DROPOUT, nn.Linear(768, 3))),
        ("convnext_tiny", "classifier", nn.Sequential(nn.Flatten(), nn.Linear(768, 3))),
    ],
)
def test_wrapped_and_replaced_heads(name, attribute, head, network, save, same_outputs):
    model = network(name)
    model.set_submodule(attribute, head)
    loaded = load_model(save(model.state_dict()))
    assert loaded.arguments["num_classes"] == 3
    assert any("the head's last layer" in note for note in loaded.notes)
    assert same_outputs(model, loaded.model)


SMALL_VIT = {
    "image_size": 64,
    "patch_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 32,
}


SMALL_SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": [4, 4],
}


SMALL_MAXVIT = {
    "input_size": (64, 64),
    "stem_channels": 8,
    "partition_size": 2,
    "block_channels": [8, 16],
    "block_layers": [1, 1],
    "head_dim": 4,
    "stochastic_depth_prob": 0.0,
}


@pytest.mark.parametrize(
    ("name", "arguments", "attribute", "head"),
    [
        ("VisionTransformer", SMALL_VIT, "heads", nn.Linear(16, 3)),
        ("VisionTransformer", SMALL_VIT, "heads", nn.Sequential(DROPOUT, nn.Linear(16, 3))),
        ("VisionTransformer", SMALL_VIT, "heads.head", nn.Sequential(DROPOUT, nn.Linear(16, 3))),
        ("SwinTransformer", SMALL_SWIN, "head", nn.Sequential(DROPOUT, nn.Linear(16, 3))),
        ("MaxVit", SMALL_MAXVIT, "classifier.5", nn.Sequential(DROPOUT, nn.Linear(16, 3))),
        (
            "MaxVit",
            SMALL_MAXVIT,
            "classifier",
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
        ),
    ],
)
def test_wrapped_heads_in_own_checkpoints(name, arguments, attribute, head, tmp_path, same_outputs):
    model = build_model(f"torchvision:{name}", arguments)
    model.set_submodule(attribute, head)
    path = tmp_path / "weights.pt"
    save_checkpoint(path, model, architecture=f"torchvision:{name}", arguments=arguments)
    assert same_outputs(model, load_model(path).model)


@pytest.mark.parametrize(
    ("name", "attribute", "head"),
    [
        (SMALL, "fc", nn.Sequential(nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 3))),
        (SMALL, "fc", nn.Sequential(nn.BatchNorm1d(1024), nn.Linear(1024, 3))),
        (SMALL, "fc", nn.Sequential(nn.BatchNorm1d(1024))),
        ("mobilenet_v3_small", "classifier.3", nn.Sequential(nn.Linear(1024, 8), nn.Linear(8, 3))),
        ("squeezenet1_1", "classifier", nn.Sequential(nn.Conv2d(512, 3, 1), nn.Flatten())),
        ("squeezenet1_1", "classifier.1", nn.Sequential(nn.Flatten(), nn.Linear(512, 3))),
    ],
)
def test_heads_that_names_and_shapes_do_not_tell(name, attribute, head, network, save, rejects):
    model = network(name)
    model.set_submodule(attribute, head)
    rejects(save(model.state_dict()), "do not tell what stands between them: pass --arch")


def test_no_head(network, save, rejects):
    model = network("resnet18")
    model.fc = nn.Identity()
    rejects(save(model.state_dict()), r"no classification head \(fc\.weight\): pass --arch")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "_orig_mod.", "net.", "backbone.", "model.module.", "model._orig_mod."],
)
@pytest.mark.parametrize("arch", [None, SMALL])
def test_prefixes(prefix, arch, small, save, same_outputs, prefixed):
    loaded = load_model(save(prefixed(small.state_dict(), prefix)), arch=arch)
    assert loaded.architecture == f"torchvision:{SMALL}"
    assert same_outputs(small, loaded.model)


def test_layers_beside_the_network_are_not_ignored(small, save, rejects, prefixed):
    state = {**prefixed(small.state_dict(), "backbone."), "head.weight": torch.ones(2, 2)}
    rejects(save(state), r"layers that it does not have \(head\.weight\): pass --arch")


def test_counts_that_were_made_float16(small, save, same_outputs):
    loaded = load_model(save({k: v.half() for k, v in small.state_dict().items()})).model
    assert same_outputs(small.half(), loaded)
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float16, torch.int64}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["conv5.0.weight", "conv5.1.running_var"])
def test_weights_that_are_not_finite(key, value, small, save, rejects):
    small.state_dict()[key].view(-1)[3] = value
    rejects(save(small.state_dict()), f"{re.escape(key)} holds NaN or infinite values")


def test_shapes_that_do_not_fit(small, save, rejects):
    state = small.state_dict()
    state["conv1.0.weight"] = state["conv1.0.weight"][..., :1]
    rejects(
        save(state),
        r"do not fit torchvision:shufflenet_v2_x0_5 \(of another shape: conv1\.0\.weight \("
        r"conv1\.0\.weight is \(24, 3, 3, 1\) float32 in the file, \(24, 3, 3, 3\) float32",
    )
