import argparse
import copy
import hashlib
import pickle
import re
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import WeightsEnum

from diffsal import models
from diffsal.errors import DiffsalError
from diffsal.images import Preprocessing
from diffsal.models import build_model, load_model, save_checkpoint

NAMES = torchvision_models.list_models(module=torchvision_models)
SMALL = "shufflenet_v2_x0_5"
WHOLE = "is damaged, or no file of PyTorch weights"
CONVERT = r"torch\.save\(model\.state_dict\(\), 'weights\.pt'\)"


@cache
def hollow(name, **arguments):
    """A model whose parameters have shapes, but no memory and no values."""
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": True, **arguments}
    with models._without_initialization():
        return torchvision_models.get_model(name, weights=None, **arguments)


def zeros(name, **arguments):
    """A state of a model's names and shapes, all zero, that takes no memory and no disk."""
    state = hollow(name, **arguments).state_dict()
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}


@pytest.fixture
def network(classifier):
    """Makes a torchvision classifier in which every weight and statistic is random."""
    return lambda name, **arguments: classifier(name, torch.float32, **arguments)


@pytest.fixture
def save(tmp_path):
    """Saves to a file and gives its path."""

    def save(content, name="weights.pt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def rejects(refused):
    """Loading fails with one line that names the file and matches a pattern."""

    def rejects(path, pattern, **options):
        with refused(f"^{re.escape(str(path))}: .*{pattern}"):
            load_model(path, **options)

    return rejects


def same_outputs(model, other, size=64):
    images = torch.randn(1, 3, size, size, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        expected, actual = model.eval()(images), other(images)
    return expected.shape == actual.shape and torch.equal(expected, actual)


# Recognition -----------------------------------------------------------------------------------


def test_table_is_torchvisions():
    table = {}
    for name in NAMES:
        state = hollow(name).state_dict()
        table.setdefault(next(iter(state)), {})[name] = models._backbone_size(state)
    assert table == models.ARCHITECTURES
    sizes = {(stem, *size) for stem, family in table.items() for size in family.values()}
    assert len(sizes) == len(NAMES) == 80


@pytest.mark.parametrize("name", NAMES)
def test_every_torchvision_classifier_is_recognized(name, save):
    state = zeros(name)
    last = models._last_layer(hollow(name))
    head = [key for key in state if key.startswith(f"{last}.")]

    def with_outputs(count):
        return state | {key: state[key][:1].expand(count, *state[key].shape[1:]) for key in head}

    for outputs in (1, 2, 1000):
        assert models._recognize(dict(sorted(with_outputs(outputs).items()))) == name
    outputs = (1, 2, 1000)[NAMES.index(name) % 3]
    loaded = load_model(save(with_outputs(outputs)))
    assert loaded.architecture == f"torchvision:{name}"
    assert loaded.arguments["num_classes"] == outputs
    assert not loaded.model.training
    assert not any(value.is_meta for value in loaded.model.state_dict().values())
    modules = dict(loaded.model.named_modules())
    assert modules[loaded.target_layer.name] is loaded.target_layer.module


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("maxvit_t", 224),
        ("mnasnet0_5", 64),
        ("mobilenet_v2", 64),
        ("regnet_y_400mf", 64),
        ("resnet18", 64),
        (SMALL, 64),
        ("squeezenet1_1", 64),
        ("swin_t", 64),
        ("swin_v2_t", 64),
        ("vit_b_32", 64),
    ],
)
def test_loaded_model_computes_what_the_saved_one_did(name, size, network, save):
    sized = {"image_size": size} if name.startswith("vit") else {}
    model = network(name, num_classes=2, **sized)
    loaded = load_model(save(model.state_dict()))
    assert loaded.architecture == f"torchvision:{name}"
    assert same_outputs(model, loaded.model, size)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("auxiliary", ["absent", "present", "of another width"])
def test_auxiliary_heads(name, auxiliary, network, save):
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


@pytest.mark.parametrize(
    ("name", "image_size"), [("vit_b_16", 112), ("vit_b_16", 384), ("vit_b_32", 448)]
)
def test_image_size_of_a_vision_transformer(name, image_size, save):
    loaded = load_model(save(zeros(name, image_size=image_size)))
    assert loaded.architecture == f"torchvision:{name}"
    assert loaded.arguments == {"image_size": image_size, "num_classes": 1000}
    assert loaded.preprocessing == Preprocessing(size=(image_size, image_size))


def test_old_names_of_densenet(network, save):
    model = network("densenet121", num_classes=2)
    state = {
        re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", key): value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    assert same_outputs(model, load_model(save(state)).model)


def test_old_names_of_vit(save):
    state = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in zeros("vit_b_16").items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_2.bias" in state
    assert load_model(save(state)).architecture == "torchvision:vit_b_16"


@pytest.mark.parametrize(
    ("name", "note"),
    [("resnet18", None), ("resnet50", "no dilation"), ("googlenet", "transform_input=True")],
)
def test_what_a_state_cannot_tell_is_noted(name, note, save):
    loaded = load_model(save(zeros(name)))
    *undecided, preprocessing, classes = loaded.notes
    assert [note in text for text in undecided] == ([True] if note else [])
    assert "224 x 224 pixels, mean 0.485 0.456 0.406, std" in preprocessing
    assert "--classes" in classes
    assert loaded.classes is None
    assert loaded.preprocessing is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_the_files(dtype, network, save):
    model = network(SMALL, num_classes=2).to(dtype)
    loaded = load_model(save(model.state_dict()))
    dtypes = {value.dtype for value in loaded.model.state_dict().values()}
    assert dtypes == {dtype, torch.int64}
    assert same_outputs(model, loaded.model)


def test_loading_touches_neither_random_numbers_nor_other_modules(save, rejects):
    before = torch.get_rng_state()
    path = save(zeros(SMALL))
    load_model(path)
    rejects(path, "there is no|cannot be built with", arch="torchvision:ResNet")
    assert torch.equal(torch.get_rng_state(), before)
    assert not nn.Linear(2, 2).weight.is_meta


# Heads -----------------------------------------------------------------------------------------

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
def test_wrapped_and_replaced_heads(name, attribute, head, network, save):
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
def test_wrapped_heads_in_own_checkpoints(name, arguments, attribute, head, tmp_path):
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


# Wrappers and containers -----------------------------------------------------------------------


@pytest.fixture
def small(network):
    return network(SMALL, num_classes=2)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "_orig_mod.", "net.", "backbone.", "model.module.", "model._orig_mod."],
)
@pytest.mark.parametrize("arch", [None, SMALL])
def test_prefixes(prefix, arch, small, save):
    loaded = load_model(save(prefixed(small.state_dict(), prefix)), arch=arch)
    assert loaded.architecture == f"torchvision:{SMALL}"
    assert same_outputs(small, loaded.model)


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "net", "resnet"])
def test_containers(name, small, save):
    optimizer = torch.optim.Adam(small.parameters())
    small(torch.randn(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": torch.tensor(3),
        "optimizer": optimizer.state_dict(),
        f"{name}_ema": prefixed(zeros(SMALL), "module."),
        name: small.state_dict(),
    }
    assert same_outputs(small, load_model(save(checkpoint)).model)


def test_only_an_average_is_taken(small, save):
    assert same_outputs(small, load_model(save({"state_dict_ema": small.state_dict()})).model)


def test_lightning_checkpoint(small, save):
    state = {
        **prefixed(zeros(SMALL), "ema_model.module."),
        **prefixed(small.state_dict(), "model."),
        "criterion.weight": torch.ones(2),
        "loss.projection.weight": torch.ones(2, 2),
        "val_confusion.matrix": torch.ones(2, 2),
    }
    checkpoint = {
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1, "classes": ["a", "b"]},
    }
    loaded = load_model(save(checkpoint))
    assert same_outputs(small, loaded.model)
    assert loaded.notes[0].startswith("passed over what stands beside the model: ema_model.module.")


def test_layers_beside_the_network_are_not_ignored(small, save, rejects):
    state = {**prefixed(small.state_dict(), "backbone."), "head.weight": torch.ones(2, 2)}
    rejects(save(state), r"layers that it does not have \(head\.weight\): pass --arch")


def test_several_models_are_not_chosen_from(small, save, rejects):
    checkpoint = {"teacher": small.state_dict(), "student": small.state_dict()}
    rejects(save(checkpoint), r"several models \(teacher, student\): save one of them")


class Settings:
    def __init__(self):
        self.rate = 0.1


def test_objects_beside_the_weights_are_passed_over(small, save):
    checkpoint = {
        "model": small.state_dict(),
        "args": argparse.Namespace(lr=0.1, path=Path("runs")),
        "best": np.float64(0.5),
        "history": np.ones(3),
        "settings": Settings(),
    }
    assert same_outputs(small, load_model(save(checkpoint)).model)


def test_safetensors(network, tmp_path, rejects, monkeypatch):
    model = network("mnasnet0_5", num_classes=2)  # torchvision loads no mnasnet without metadata
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    assert same_outputs(model, load_model(path).model)
    path.write_bytes(path.read_bytes()[:-1])
    rejects(path, WHOLE)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    rejects(path, r"pip install 'diffsal\[safetensors\]'")


def test_counts_that_were_made_float16(small, save):
    loaded = load_model(save({k: v.half() for k, v in small.state_dict().items()})).model
    assert same_outputs(small.half(), loaded)
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float16, torch.int64}


# Checkpoints of our own ------------------------------------------------------------------------

DENSENET = {"growth_rate": 16, "block_config": (4, 4), "num_init_features": 32, "num_classes": 2}
SQUASHED = Preprocessing(size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a small DenseNet as a checkpoint and gives the path and the model."""

    def checkpoint(architecture="torchvision:DenseNet", **options):
        model = build_model("torchvision:DenseNet", DENSENET)
        options = {"arguments": DENSENET, "classes": ("three", "eight"), **options}
        save_checkpoint(tmp_path / "ours.pt", model, architecture=architecture, **options)
        return tmp_path / "ours.pt", model

    return checkpoint


def test_own_checkpoint_tells_all(checkpoint):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict()
    path, model = checkpoint(
        preprocessing=SQUASHED, target_layer="features.norm5", optimizer=optimizer, epoch=3
    )
    loaded = load_model(path)
    assert same_outputs(model, loaded.model)
    assert loaded.architecture == "torchvision:DenseNet"
    assert loaded.arguments == DENSENET
    assert loaded.classes == ("three", "eight")
    assert loaded.preprocessing == SQUASHED
    assert loaded.target_layer.name == "features.norm5"
    assert loaded.target_layer.module is loaded.model.features.norm5
    assert loaded.path == path
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.notes == ()
    extra = torch.load(path, weights_only=True)
    assert (extra["optimizer"], extra["epoch"]) == (optimizer, 3)


def test_failed_save_leaves_the_file(checkpoint):
    path, _ = checkpoint()
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint(extra=lambda: None)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_target_layer_is_the_callers_choice(checkpoint, rejects):
    path, _ = checkpoint(target_layer="features.norm5")
    assert load_model(path, target_layer="features").target_layer.name == "features"
    rejects(
        path,
        r"no layer 'features\.norm6': near it are features\.norm5",
        target_layer="features.norm6",
    )


def test_transform_input_is_recorded(network, tmp_path):
    for transform_input in (False, True):
        model = network(
            "googlenet", num_classes=2, aux_logits=False, transform_input=transform_input
        )
        path = tmp_path / "weights.pt"
        save_checkpoint(path, model, architecture="googlenet", arguments={"num_classes": 2})
        loaded = load_model(path)
        assert same_outputs(model, loaded.model)
        assert not any("transform_input" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"format_version": 2}, r"by a later diffsal \(format 2\): upgrade"),
        ({"state_dict": None}, "is no whole diffsal checkpoint"),
        ({"classes": "ab"}, "is no whole diffsal checkpoint"),
        ({"preprocessing": {"size": [64]}}, "preprocessing: needs the fields"),
        ({"target_layer": "features.norm9"}, "no layer 'features.norm9'"),
        (
            {"architecture": {"name": "torchvision:nonet", "arguments": {}}},
            "no classification model",
        ),
        ({"architecture": {"name": "torchvision:list_models", "arguments": {}}}, "no classific"),
        ({"architecture": {"name": "torchvision:DenseNet", "arguments": {}}}, "do not fit"),
        (
            {"architecture": {"name": "densenet121", "arguments": {"weights": "DEFAULT"}}},
            r"would fetch files: weights",
        ),
        (
            {"architecture": {"name": "timm:resnet18", "arguments": {"checkpoint_path": "x"}}},
            r"would fetch files: checkpoint_path",
        ),
        ({"architecture": {"name": "timm:hf-hub:a/b", "arguments": {}}}, "timm has no model"),
        (
            {"architecture": {"name": "os:system", "arguments": {"command": "true"}}},
            "a file cannot have run: if you trust os:system, pass --arch os:system",
        ),
    ],
)
def test_spoilt_checkpoints(change, pattern, checkpoint, save, rejects):
    path, _ = checkpoint()
    rejects(save(torch.load(path, weights_only=True) | change), pattern)


# Architectures by name -------------------------------------------------------------------------


def test_arch_of_torchvision(small, save, rejects):
    path = save(small.state_dict())
    loaded = load_model(path, arch=SMALL)
    assert loaded.architecture == f"torchvision:{SMALL}"
    assert same_outputs(small, loaded.model)
    rejects(path, "no classification model 'resnet5'; near it are resnet50", arch="resnet5")
    rejects(
        path,
        r"do not fit torchvision:shufflenet_v2_x1_0 \(of another shape",
        arch=f"{SMALL[:-4]}x1_0",
    )
    rejects(path, r"missing: stem\.0\.weight, .* \(\d+ in all\); unexpected", arch="regnet_x_400mf")


FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=7, width=4):
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.backbone(x).mean((2, 3)))

def binary():
    return Net(2)

def state():
    return Net().state_dict()

def broken():
    raise ZeroDivisionError("of the factory")

number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of factories in the working directory, which is not on the path."""
    (tmp_path / "own_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "own_factories"
    sys.modules.pop("own_factories", None)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("factory", "arguments"), [("Net", {"num_classes": 2}), ("binary", {})])
def test_factory(factory, arguments, prefix, factories, save):
    model = build_model(f"{factories}:Net", {"num_classes": 2})
    loaded = load_model(save(prefixed(model.state_dict(), prefix)), arch=f"{factories}:{factory}")
    assert same_outputs(model, loaded.model)
    assert (loaded.architecture, loaded.arguments) == (f"{factories}:{factory}", arguments)
    assert loaded.target_layer.name == "backbone"


def test_factory_of_a_checkpoint_needs_the_users_word(factories, tmp_path, rejects):
    path, arch = tmp_path / "weights.pt", f"{factories}:Net"
    arguments = {"num_classes": 3, "width": 9}
    model = build_model(arch, arguments)
    save_checkpoint(path, model, architecture=arch, arguments=arguments)
    sys.modules.pop(factories)
    rejects(path, f"if you trust {arch}, pass --arch {arch}")
    assert factories not in sys.modules
    loaded = load_model(path, arch=arch)
    assert loaded.arguments == arguments
    assert same_outputs(model, loaded.model)


@pytest.mark.parametrize(
    ("arch", "pattern"),
    [
        ("own_factories:state", "returns OrderedDict, not a torch.nn.Module"),
        ("own_factories:broken", "cannot be built with {}: ZeroDivisionError: of the factory"),
        ("own_factories:nothing", "cannot be imported: AttributeError"),
        ("own_factories:number", "is not callable"),
        ("no_such_module:Net", "cannot be imported: ModuleNotFoundError"),
        ("own_factories:Net", r"do not fit own_factories:Net \(missing: backbone.weight"),
    ],
)
def test_wrong_factories(arch, pattern, factories, save, rejects):
    rejects(save(zeros(SMALL)), pattern, arch=arch)


def test_timm(save, rejects, monkeypatch):
    timm = pytest.importorskip("timm")
    for name, head in (("test_resnet", "fc"), ("test_vit", "head")):
        model = timm.create_model(name, num_classes=2)
        assert hasattr(model, head)
        path = save(prefixed(model.state_dict(), "module."))
        loaded = load_model(path, arch=f"timm:{name}")
        assert loaded.arguments == {"num_classes": 2}
        assert loaded.preprocessing.size == (160, 160)
        assert same_outputs(model, loaded.model, 160)
    rejects(path, "timm has no model 'test_vit_'; near it are test_vit", arch="timm:test_vit_")
    rejects(path, "timm has no model 'hf-hub:a/b'", arch="timm:hf-hub:a/b")
    monkeypatch.setitem(sys.modules, "timm", None)
    rejects(path, r"pip install 'diffsal\[timm\]'", arch="timm:test_vit")


def test_timm_models_that_compute_buffers_from_parameters(tmp_path):
    pytest.importorskip("timm")
    arch, path = "timm:swin_tiny_patch4_window7_224", tmp_path / "weights.pt"
    shape = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    arguments = {"num_classes": 2, "img_size": 64, "window_size": 4, **shape}
    model = build_model(arch, arguments)
    save_checkpoint(path, model, architecture=arch, arguments=arguments)
    assert same_outputs(model, load_model(path).model)


# Published weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("densenet121", 2), ("googlenet", 2), ("squeezenet1_1", 2), (SMALL, 1000), (SMALL, None)],
)
def test_published_weights(name, outputs, network, monkeypatch):
    published = network(name)
    state = published.state_dict()
    if name == "densenet121":  # as torchvision publishes it
        state = {re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", k): v for k, v in state.items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
    arguments = {} if outputs is None else {"num_classes": outputs}
    model = build_model(name, arguments, weights="DEFAULT")
    assert model.training
    last = models._last_layer(model)
    for key, value in model.state_dict().items():
        same = outputs != 2 or not key.startswith(f"{last}.")
        assert torch.equal(value, published.state_dict()[key]) == same
    assert len(model.get_submodule(last).weight) == (outputs or 1000)
    assert getattr(model, "transform_input", True)


def test_a_fresh_last_layer_begins_small(monkeypatch):
    """These draw two rows as wide as 0.7, whose logits would be about 10."""
    published = build_model("efficientnet_b0", {"num_classes": 1000}).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(published))
    model = build_model("efficientnet_b0", {"num_classes": 2}, weights="DEFAULT")
    assert model.classifier[1].weight.abs().max() <= 1280**-0.5
    kept = [key for key in published if not key.startswith("classifier.")]
    assert all(torch.equal(model.state_dict()[key], published[key]) for key in kept)


def test_a_fresh_last_layer_of_timm_begins_small(monkeypatch):
    timm = pytest.importorskip("timm")
    create, made = timm.create_model, []

    def without_download(name, pretrained, **arguments):
        made.append(create(name, pretrained=False, **arguments))
        made.append(copy.deepcopy(made[-1]))
        return made[-2]

    monkeypatch.setattr(timm, "create_model", without_download)
    name = "timm:tf_efficientnet_lite0"
    model = build_model(name, {"num_classes": 2}, weights="DEFAULT")
    before = made[-1].state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.startswith("classifier.")), key
    assert model.classifier.weight.abs().max() <= 1280**-0.5
    for arguments in ({}, {"num_classes": 1000}):  # theirs, and so not fresh
        model = build_model(name, arguments, weights="DEFAULT")
        assert torch.equal(model.classifier.weight, made[-1].classifier.weight)


def test_weights_that_nobody_published(factories):
    pattern = "no weights 'IMAGENET2K'; published are: IMAGENET1K_V1, DEFAULT"
    with pytest.raises(DiffsalError, match=pattern):
        build_model("densenet121", {}, weights="IMAGENET2K")
    with pytest.raises(DiffsalError, match="DenseNet has no weights 'DEFAULT'"):
        build_model("torchvision:DenseNet", {}, weights="DEFAULT")
    with pytest.raises(DiffsalError, match="has no published weights"):
        build_model(f"{factories}:Net", {}, weights="DEFAULT")


def test_inceptions_are_built_without_auxiliary_heads():
    assert isinstance(build_model("googlenet", {"num_classes": 2}).aux1, type(None))
    assert build_model("googlenet", {"aux_logits": True}).aux1 is not None


# Files that are no weights ---------------------------------------------------------------------


class Payload:
    """Makes a file when unpickled by a reader that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_nothing_in_a_file_is_run(archive, beside, small, save, tmp_path):
    canary = tmp_path / "canary"
    content = {"model": small.state_dict(), "args": Payload(canary)} if beside else Payload(canary)
    path = save(content, _use_new_zipfile_serialization=archive)
    if archive and beside:
        load_model(path)
    else:
        with pytest.raises(DiffsalError, match=CONVERT):
            load_model(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the payload is none"


@pytest.mark.parametrize("archive", [True, False])
def test_pickled_models(archive, small, save, rejects):
    rejects(save(small, _use_new_zipfile_serialization=archive), CONVERT)
    rejects(save({"model": small}, _use_new_zipfile_serialization=archive), CONVERT)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs(tmp_path, rejects):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    image = torch.ones(1, 3, 8, 8)
    torch.jit.trace(model, image).save(tmp_path / "script.pt")
    rejects(
        tmp_path / "script.pt", r"TorchScript program: .*torch\.jit\.load\(PATH\)\.state_dict\(\)"
    )
    torch.export.save(torch.export.export(model, (image,)), tmp_path / "program.pt2")
    rejects(
        tmp_path / "program.pt2", r"exported program: .*torch\.export\.load\(PATH\)\.state_dict"
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"\n <!DOCTYPE html>\n<html></html>", "is a web page"),
        (b"hello\n", WHOLE),
        (bytes(range(256)) * 8, WHOLE),
        (b"PK\x03\x04" + bytes(100), WHOLE),
        (pickle.dumps({"a": 1}), WHOLE),
        (pickle.dumps({"a": 1}, protocol=2), WHOLE),
    ],
)
def test_bytes_that_are_no_weights(content, pattern, tmp_path, rejects):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    rejects(path, pattern)


@pytest.mark.parametrize("archive", [True, False])
def test_truncated_file(archive, small, save, rejects):
    path = save(small.state_dict(), _use_new_zipfile_serialization=archive)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rejects(path, WHOLE)


def test_no_file(tmp_path, rejects):
    rejects(tmp_path / "weights.pt", "No such file or directory")
    rejects(tmp_path, "Is a directory")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ([torch.ones(2, 2)], "holds a list, not a state_dict"),
        (torch.ones(2, 2), "holds a Tensor, not a state_dict"),
        ({}, "holds no weights, but an empty dict"),
        ({"epoch": 3, "loss": 0.5}, "holds no weights, but epoch, loss"),
        (
            {"conv.weight": torch.ones(2, 3, 3, 3)},
            r"has these parameters \(conv.weight\): pass --a",
        ),
    ],
)
def test_content_that_is_no_model(content, pattern, save, rejects):
    rejects(save(content), pattern)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["conv5.0.weight", "conv5.1.running_var"])
def test_weights_that_are_not_finite(key, value, small, save, rejects):
    small.state_dict()[key].view(-1)[3] = value
    rejects(save(small.state_dict()), f"{re.escape(key)} holds NaN or infinite values")


def test_shapes_that_do_not_fit(small, save, rejects):
    state = small.state_dict()
    state["conv1.0.weight"] = state["conv1.0.weight"][:, :1]
    rejects(
        save(state),
        r"do not fit torchvision:shufflenet_v2_x0_5 \(of another shape: conv1\.0\.weight \("
        r"conv1\.0\.weight is \(24, 1, 3, 3\) float32 in the file, \(24, 3, 3, 3\) float32",
    )
