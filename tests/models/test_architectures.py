"""From names to modules: torchvision, timm and factories of the user."""

import copy
import re
import sys

import pytest
import torch
from torchvision.models import WeightsEnum

from diffsal.errors import DiffsalError
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import load_model, save_checkpoint
from diffsal.models.fitting import last_layer

SMALL = "shufflenet_v2_x0_5"


def test_arch_of_torchvision(small, save, rejects, same_outputs):
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


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("factory", "arguments"), [("Net", {"num_classes": 2}), ("binary", {})])
def test_factory(factory, arguments, prefix, factories, save, same_outputs, prefixed):
    model = build_model(f"{factories}:Net", {"num_classes": 2})
    loaded = load_model(save(prefixed(model.state_dict(), prefix)), arch=f"{factories}:{factory}")
    assert same_outputs(model, loaded.model)
    assert (loaded.architecture, loaded.arguments) == (f"{factories}:{factory}", arguments)
    assert loaded.target_layer.name == "backbone"


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
def test_wrong_factories(arch, pattern, factories, save, rejects, zeros):
    rejects(save(zeros(SMALL)), pattern, arch=arch)


def test_timm(save, rejects, monkeypatch, same_outputs, prefixed):
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


def test_timm_models_that_compute_buffers_from_parameters(tmp_path, same_outputs):
    pytest.importorskip("timm")
    arch, path = "timm:swin_tiny_patch4_window7_224", tmp_path / "weights.pt"
    shape = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    arguments = {"num_classes": 2, "img_size": 64, "window_size": 4, **shape}
    model = build_model(arch, arguments)
    save_checkpoint(path, model, architecture=arch, arguments=arguments)
    assert same_outputs(model, load_model(path).model)


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
    last = last_layer(model)
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
