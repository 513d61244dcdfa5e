"""From a file to a model, and back."""

import hashlib
import re
import sys
from functools import cache

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from diffsal.data.preprocessing import Preprocessing
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import load_model, save_checkpoint
from diffsal.models.fitting import last_layer, without_initialization
from diffsal.models.recognition import recognize

NAMES = torchvision_models.list_models(module=torchvision_models)
SMALL = "shufflenet_v2_x0_5"


@cache
def hollow(name, **arguments):
    """A model whose parameters have shapes, but no memory and no values."""
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": True, **arguments}
    with without_initialization():
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


@pytest.mark.parametrize("name", NAMES)
def test_every_torchvision_classifier_is_recognized(name, save):
    state = zeros(name)
    last = last_layer(hollow(name))
    head = [key for key in state if key.startswith(f"{last}.")]

    def with_outputs(count):
        return state | {key: state[key][:1].expand(count, *state[key].shape[1:]) for key in head}

    for outputs in (1, 2, 1000):
        assert recognize(dict(sorted(with_outputs(outputs).items()))) == name
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
