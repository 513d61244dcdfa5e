"""From a file to a model, and back."""

import hashlib
import sys

import pytest
import torch
from torch import nn

from diffsal.data.preprocessing import Preprocessing
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import load_model, save_checkpoint

SMALL = "shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("maxvit_t", 224, marks=pytest.mark.slow),
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
def test_loaded_model_computes_what_the_saved_one_did(name, size, network, save, same_outputs):
    sized = {"image_size": size} if name.startswith("vit") else {}
    model = network(name, num_classes=2, **sized)
    loaded = load_model(save(model.state_dict()))
    assert loaded.architecture == f"torchvision:{name}"
    assert same_outputs(model, loaded.model, size)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_loading_touches_neither_random_numbers_nor_other_modules(save, rejects, zeros):
    before = torch.get_rng_state()
    path = save(zeros(SMALL))
    load_model(path)
    rejects(path, "there is no|cannot be built with", arch="torchvision:ResNet")
    assert torch.equal(torch.get_rng_state(), before)
    assert not nn.Linear(2, 2).weight.is_meta


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


def test_own_checkpoint_tells_all(checkpoint, same_outputs):
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


def test_transform_input_is_recorded(network, tmp_path, same_outputs):
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


def test_factory_of_a_checkpoint_needs_the_users_word(factories, tmp_path, rejects, same_outputs):
    path, arch = tmp_path / "weights.pt", f"{factories}:Net"
    arguments = {"num_classes": 3, "width": 9}
    model = build_model(arch, arguments)
    save_checkpoint(path, model, architecture=arch, arguments=arguments)
    sys.modules.pop(factories)
    rejects(path, f"if you trust {arch}, pass --arch {arch}")
    assert factories not in sys.modules
    rejects(path, f"has {arch} called with width=9: .*--trust-arguments", arch=arch)
    rejects(path, "called with width=9", arch=arch, trust_arguments={"width": 8})
    assert load_model(path, arch=arch, trust_arguments={"width": 9}).arguments == arguments
    loaded = load_model(path, arch=arch, trust_arguments=True)
    assert loaded.arguments == arguments
    assert same_outputs(model, loaded.model)


def grey(model):
    """The same network with a first convolution for one channel."""
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    stem.weight = nn.Parameter(stem.weight[:, :1].clone())
    stem.in_channels = 1
    return model


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1", "vit_b_32", "googlenet"])
def test_grey_networks_are_recognised(name, network, save):
    without = {"aux_logits": False} if name == "googlenet" else {}
    model = grey(network(name, num_classes=2, **without)).eval()
    loaded = load_model(save(model.state_dict()))
    assert loaded.architecture == f"torchvision:{name}"
    assert loaded.preprocessing.channels == 1
    images = torch.rand(1, 1, 224, 224)
    model.transform_input = False
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    assert any("224 x 224 pixels, grey, mean 0.449" in note for note in loaded.notes)


def test_grey_timm_network(save):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=2, in_chans=1)
    loaded = load_model(save(model.state_dict()), arch="timm:resnet18")
    assert (loaded.arguments["in_chans"], loaded.preprocessing.channels) == (1, 1)


def test_other_channels_are_refused(network, save, rejects):
    model = network("resnet18", num_classes=2)
    model.conv1.weight = nn.Parameter(torch.ones(64, 4, 7, 7))
    rejects(save(model.state_dict()), r"first convolution takes 4 channels, .*diffsal\.explain")
