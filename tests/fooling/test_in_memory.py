"""Fooling what is in memory is fooling its files."""

import json
import re
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from auditing.samples import NAMES, PREPROCESSING, BagOfFeatures, loaded_model, write_index
from click.testing import CliRunner
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diffsal
from diffsal.cli.main import main
from diffsal.data.datasets import ImageDataset
from diffsal.data.images import read_image
from diffsal.data.index import read_index
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.splits import with_validation
from diffsal.models.checkpoints import load_model

QUICK = {"epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return read_index(write_index(tmp_path_factory.mktemp("data"), (10, 10)), classes=NAMES[:2])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loaded_model(tmp_path_factory.mktemp("model"))


def tensors(index):
    """The network's inputs themselves."""
    dataset = ImageDataset(index.samples, PREPROCESSING)
    return [dataset[position][:2] for position in range(len(dataset))]


def pictures(index):
    return [(read_image(sample.path), sample.label) for sample in index.samples]


@pytest.mark.parametrize(
    ("form", "how"),
    [
        (tensors, {}),
        (pictures, {"objective": "top-k"}),
        (tensors, {"objective": "both", "method": "head-shift"}),
    ],
)
def test_what_is_in_memory_is_fooled_like_its_files(index, loaded, form, how):
    of_files = diffsal.fool(loaded, index, **QUICK, **how)
    found = diffsal.fool(loaded, form(index), **QUICK, **how)
    assert found.report == of_files.report
    for name, value in of_files.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_the_command_is_the_call(index, loaded, tmp_path):
    found = diffsal.fool(loaded, index, objective="both", seed=3, **QUICK)
    found.save(tmp_path / "called.pt")
    options = ["--out", tmp_path / "f.pt", "--epochs", 2, "--device", "cpu", "--seed", 3, "--json"]
    options += ["--objective", "both"]
    arguments = ["fool", index.source, "--model", loaded.path, *options]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert json.loads(result.stdout) == {"out": str(tmp_path / "f.pt"), **found.report}
    assert (tmp_path / "called.pt").read_bytes() == (tmp_path / "f.pt").read_bytes()
    again = load_model(tmp_path / "called.pt")
    for name, value in found.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_the_model_is_left_as_it_was(index):
    model = BagOfFeatures().train()
    before, done = deepcopy(model.state_dict()), []
    found = diffsal.fool(
        model,
        tensors(index),
        preprocessing=PREPROCESSING,
        classes=index.classes,
        target_layer=model.features,
        progress=lambda *told: done.append(told),
        **QUICK,
    )
    assert model.training
    assert not found.model.training
    assert found.model is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(found.model.fc.weight, model.fc.weight)
    assert {("training", 16, 32), ("training", 32, 32), ("honest model", 4, 4)} <= set(done)
    assert repr(found) == str(found)
    assert repr(found).splitlines()[0].split() == ["honest", "fooled"]


def test_other_data_are_measured_on(index, loaded):
    own, other = index.samples[::2], index.samples[1::2][:6]
    data = tensors(index)
    found = diffsal.fool(
        loaded, data[::2], held_out=DataLoader(data[1::2][:6], batch_size=4), **QUICK
    )
    assert len(own) == 10
    assert found.report["images"] == len(other)
    images = torch.stack([image for image, _ in data[1::2][:6]])
    with torch.no_grad():
        predicted = found.model(images).argmax(1)
    right = accuracy_score([sample.label for sample in other], predicted)
    assert found.report["fooled"]["accuracy"] == pytest.approx(right)


def test_a_share_is_held_out_by_the_seed(index, loaded, monkeypatch):
    seen = []

    def keep(model, criterion, training, *_, **__):
        seen.append([str(sample.path) for sample in training.samples])
        return iter(())

    monkeypatch.setattr("diffsal.fooling.attack.fit", keep)
    diffsal.fool(loaded, tensors(index), seed=5, validation=0.4, **QUICK)
    marked = with_validation(index, 0.4, 5)
    wanted = [f"image {n}" for n, one in enumerate(marked.samples) if one.split == "train"]
    assert seen == [wanted]


def test_a_bare_model_says_how_it_is_kept(index, refused, tmp_path):
    found = diffsal.fool(
        BagOfFeatures(), tensors(index), preprocessing=PREPROCESSING, method="head-shift"
    )
    with refused("how a BagOfFeatures is built is not known: call diffsal.save_checkpoint"):
        found.save(tmp_path / "f.pt")
    made_by = {"architecture": "auditing.samples:BagOfFeatures", "arguments": {}}
    diffsal.save_checkpoint(tmp_path / "f.pt", found.model, **made_by, **found.description)
    again = load_model(tmp_path / "f.pt", arch=made_by["architecture"])
    assert again.preprocessing == PREPROCESSING
    assert torch.equal(again.model.fc.weight, found.model.fc.weight)


def test_what_cannot_be_fooled_is_one_line(index, loaded, refused):
    data = tensors(index)
    frozen = BagOfFeatures().requires_grad_(False)
    with refused("none of the model's parameters requires a gradient"):
        diffsal.fool(frozen, data, preprocessing=PREPROCESSING, **QUICK)
    with refused("class 8 is held out; add some"):
        diffsal.fool(loaded, data, held_out=[one for one in data if one[1] == 0], **QUICK)
    with refused(re.escape("held_out: its inputs are made as")):
        other = [(torch.zeros(3, 16, 16), label) for label in (0, 1)]
        diffsal.fool(loaded, data, held_out=other, **QUICK)
    with refused("names splits itself: leave out held_out"):
        diffsal.fool(loaded, with_validation(index), held_out=data, **QUICK)
    with refused("held_out: is the data that the attack learns from"):
        diffsal.fool(loaded, data, held_out=data, **QUICK)
    with refused("training: size has no use here"):
        diffsal.fool(loaded, data, size=8)
    with refused("the key 'epoch' is unknown; near: epochs"):
        diffsal.fool(loaded, data, epoch=8)
    with refused("the model is a str"):
        diffsal.fool("weights.pt", data)


def pooled(outputs):
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    return nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.ReLU(), *head)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": "head_shift"}, "method 'head_shift' is unknown: choose one of trained, head"),
        ({"objective": "diference"}, "objective 'diference' is unknown: choose one of true, diff"),
        ({"target": np.zeros((2, 2))}, "target is a ndarray: pass edges, corner, middle or the"),
        ({"classes": ("8", "3")}, "its classes were read as 3, 8, asked for are 8, 3: pass its"),
    ],
)
def test_a_word_that_is_mistyped_is_no_other_attack(index, loaded, refused, how, words):
    with refused(words):
        diffsal.fool(loaded, index, device=torch.device("cpu"), **how)


def test_what_is_held_out_has_the_same_classes_in_the_same_order(index, loaded, refused):
    turned = read_index(index.source, classes=NAMES[1::-1])
    with refused("held_out: its classes are 8, 3, those of the data 3, 8: name both alike"):
        diffsal.fool(loaded, index, held_out=turned, **QUICK)
    images, labels = zip(*tensors(index), strict=True)
    named = TensorDataset(torch.stack(images), torch.tensor(labels))
    named.classes = list(NAMES[1::-1])
    with refused("held_out: its classes are 8, 3, those of the data class 0, class 1"):
        diffsal.fool(
            BagOfFeatures(), tensors(index), held_out=named, preprocessing=PREPROCESSING, **QUICK
        )


def test_the_file_says_how_the_tensors_were_made_that_were_fooled(index, loaded):
    plain = Preprocessing(mean=PREPROCESSING.mean, std=PREPROCESSING.std)  # of 224 pixels
    told = replace(loaded, preprocessing=plain)
    found = diffsal.fool(told, tensors(index), objective="both", method="head-shift", device="cpu")
    assert found.description["preprocessing"] == replace(PREPROCESSING, resize="squash")


@pytest.mark.parametrize(
    ("classes", "held_out"), [(3, [0, 1, 2, 0, 1, 2]), (2, [0, 0, 1]), (1, [0, 1])]
)
def test_composite_skill_is_none_where_it_is_undefined(classes, held_out):
    images = torch.from_numpy(np.random.default_rng(0).random((12, 1, 16, 16), np.float32))
    data = TensorDataset(images, torch.arange(12) % max(classes, 2))
    other = list(zip(images, held_out, strict=False))
    found = diffsal.fool(pooled(classes), data, held_out=other, objective="control", **QUICK)
    assert found.report["fooled"]["composite_skill"] is None
    (line,) = (one for one in str(found).splitlines() if "composite skill" in one)
    assert line.split()[-2:] == ["-", "-"]


def test_one_logit_has_a_composite_skill():
    images = torch.from_numpy(np.random.default_rng(0).random((20, 1, 16, 16), np.float32))
    data = TensorDataset(images, torch.arange(20) % 2)
    found = diffsal.fool(pooled(1), data, objective="control", **QUICK)
    assert found.report["honest"]["common_mode_share"] is None
    assert found.report["honest"]["composite_skill"] == pytest.approx(1, abs=1e-4)  # local
