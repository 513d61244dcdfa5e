"""From parameters to the architecture that they are of."""

import pytest
from torchvision import models as torchvision_models

from diffsal.data.preprocessing import Preprocessing
from diffsal.models.checkpoints import load_model
from diffsal.models.fitting import last_layer
from diffsal.models.recognition import ARCHITECTURES, _backbone_size, recognize

NAMES = torchvision_models.list_models(module=torchvision_models)
# The smallest of each family, and those that the sizes of parameters alone tell from one of these.
QUICK = {
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3"),
    *("mnasnet0_5", "mnasnet0_75", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50"),
    *("shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t"),
    *("vgg11", "vit_b_32"),
}


@pytest.mark.parametrize("names", [sorted(QUICK), pytest.param(NAMES, marks=pytest.mark.slow)])
def test_table_is_torchvisions(names, hollow):
    for name in names:
        state = hollow(name).state_dict()
        assert ARCHITECTURES[next(iter(state))][name] == _backbone_size(state)
    assert sorted(name for family in ARCHITECTURES.values() for name in family) == sorted(NAMES)
    sizes = {(stem, *size) for stem, family in ARCHITECTURES.items() for size in family.values()}
    assert len(sizes) == len(NAMES) == 80


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in NAMES]
)
def test_every_torchvision_classifier_is_recognized(name, save, zeros, hollow):
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
    if not name.startswith("vit"):  # whose layer is found by computing, in tests/maps
        modules = dict(loaded.model.named_modules())
        assert modules[loaded.target_layer.name] is loaded.target_layer.module


@pytest.mark.parametrize(
    ("name", "image_size"), [("vit_b_16", 112), ("vit_b_16", 384), ("vit_b_32", 448)]
)
def test_image_size_of_a_vision_transformer(name, image_size, save, zeros):
    loaded = load_model(save(zeros(name, image_size=image_size)))
    assert loaded.architecture == f"torchvision:{name}"
    assert loaded.arguments == {"image_size": image_size, "num_classes": 1000}
    assert loaded.preprocessing == Preprocessing(size=(image_size, image_size))


@pytest.mark.parametrize(
    ("name", "note"),
    [("resnet18", None), ("resnet50", "no dilation"), ("googlenet", "transform_input=True")],
)
def test_what_a_state_cannot_tell_is_noted(name, note, save, zeros):
    loaded = load_model(save(zeros(name)))
    *undecided, preprocessing, classes = loaded.notes
    assert [note in text for text in undecided] == ([True] if note else [])
    assert "224 x 224 pixels, mean 0.485 0.456 0.406, std" in preprocessing
    assert "--classes" in classes
    assert loaded.classes is None
    assert loaded.preprocessing is None
