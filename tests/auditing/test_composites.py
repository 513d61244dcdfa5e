"""The composite test within an audit: numbers against the test alone, words, pictures."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from auditing.samples import (
    NAMES,
    PREPROCESSING,
    BagOfFeatures,
    audit_of,
    loaded_model,
    say,
    settings,
    write_index,
)
from torch import nn

from diffsal import explain
from diffsal.auditing.composites import PER_IMAGE, composite_test
from diffsal.auditing.measure import measure_samples
from diffsal.auditing.wording import composites_in_words
from diffsal.data.datasets import ImageDataset
from diffsal.data.index import read_index
from diffsal.faithfulness.composites import run_composites
from diffsal.fooling.head_shift import head_shift
from diffsal.maps.target_layers import find_target_layer

NUMBERS = {"above": (0.5, 0.4, 0.6), "open": (0.1, -0.1, 0.3), "below": (-0.5, -0.6, -0.4)}


def inputs_of(index):
    dataset = ImageDataset(index.samples, PREPROCESSING)
    return torch.stack([item[0] for item in dataset]), torch.tensor([item[1] for item in dataset])


def outcome(index, loaded):
    measured = measure_samples(index.samples, index, loaded, settings(), "")
    return measured, composite_test(measured, loaded, settings())


def test_numbers_are_those_of_the_test_alone(audited):
    images, labels = inputs_of(audited.index)
    maps = explain(audited.loaded.model, images, true=1, false=0)
    for kind, regions in (("", "rectangles"), ("_marked", "marked")):
        found = run_composites(
            audited.loaded.model,
            images,
            maps.difference,
            maps.margin,
            labels,
            regions=regions,
            per_image=PER_IMAGE,
        )
        (number,) = (n for n in audited.numbers() if n["name"] == f"composite_skill{kind}")
        assert number["mean"] == pytest.approx(found.skill, abs=1e-4)
        assert number["low"] <= number["mean"] <= number["high"]
        kept = audited.json["composites"]["kinds"][regions]
        assert (kept["skill"], kept["composites"]) == (number["mean"], 20 * PER_IMAGE)
    errors = {name: audited.table[name].mean() for name in ("composite_error", "alike_error")}
    skill = audited.json["composites"]["kinds"]["rectangles"]["skill"]
    assert 1 - errors["composite_error"] / errors["alike_error"] == pytest.approx(skill)


def test_a_bag_of_features_is_foretold_exactly(tmp_path):
    model = BagOfFeatures().eval()
    loaded = replace(loaded_model(tmp_path), model=model, layer=find_target_layer(model))
    result = audit_of(tmp_path, loaded, (6, 6))
    assert result["summary"][0].startswith("The decision is made where the difference maps say")
    assert say(result, "composites").startswith("The decision is made where")
    for one in result["composites"]["shown"]:
        assert one["actual"] == pytest.approx(one["predicted"], abs=1e-5)
    assert result["composites"]["kinds"]["same"]["skill"] == pytest.approx(1, abs=1e-6)


def test_a_head_shift_ruins_the_class_map_alone(tmp_path):
    index = read_index(write_index(tmp_path, (20, 20)), classes=NAMES[:2])
    model = BagOfFeatures().eval()
    images, labels = inputs_of(index)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    honest = replace(loaded_model(tmp_path), model=model, layer=find_target_layer(model))
    shifted = head_shift(model, [images]).model
    fooled = replace(honest, model=shifted, layer=find_target_layer(shifted))
    skill = {}
    for name, loaded in {"honest": honest, "fooled": fooled}.items():
        _, test = outcome(index, loaded)
        numbers = {one["name"]: one["mean"] for one in test.numbers}
        skill[name] = numbers["composite_skill"], numbers["composite_skill_true"]
    assert skill["fooled"][0] == pytest.approx(skill["honest"][0], abs=1e-3)
    assert skill["fooled"][1] < skill["honest"][1] - 0.1


def test_composites_are_shown_as_they_are(audited):
    _, test = outcome(audited.index, audited.loaded)
    shown = audited.json["composites"]["shown"]
    assert [one["actual"] for one in shown] == [one["actual"] for one in test.pictures]
    errors = np.array([abs(one["actual"] - one["predicted"]) for one in shown])
    assert (np.diff(errors) >= 0).all()
    one = test.pictures[0]
    receiver, donor, both = one["pixels"]
    cells = np.array(one["region"], bool)
    region = np.kron(cells, np.ones((8, 8), bool))
    drawn = (receiver == both).all(2) & (donor == both).all(2)
    assert (both[~region] == receiver[~region]).all()
    assert (both[region & ~drawn] == donor[region & ~drawn]).all()
    assert one["receiver"] in audited.page


def test_grey_images_are_shown(tmp_path):
    index = read_index(write_index(tmp_path, (3, 3)), classes=NAMES[:2])
    grey = replace(PREPROCESSING, mean=(0.5,), std=(0.5,), channels=1)
    model = BagOfFeatures().eval()
    model.features[0] = nn.Conv2d(1, 16, 8, 8)
    loaded = replace(loaded_model(tmp_path), model=model, layer=find_target_layer(model))
    chosen = replace(settings(), preprocessing=grey)
    measured = measure_samples(index.samples, index, loaded, chosen, "")
    test = composite_test(measured, loaded, chosen)
    assert test.pictures[0]["pixels"][0].shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("per_class", "outputs", "why"),
    [
        ((4, 1), 2, "composites need two images of each class, and of class 1 there are 1"),
        ((4, 4, 4), 3, "the model tells more than two apart"),
    ],
)
def test_where_it_cannot_be_run_the_report_says_why(tmp_path, per_class, outputs, why):
    result = audit_of(tmp_path, loaded_model(tmp_path, outputs=outputs), per_class)
    assert why in say(result, "composites")
    assert "could not be tested by composites" in result["summary"][0]
    assert "the composite test" in {one["what"] for one in result["left_out"]}
    assert result["composites"] is None


def test_images_that_vanish_after_the_first_reading_are_told(tmp_path):
    index = read_index(write_index(tmp_path / "data", (3, 3), maps=False), classes=NAMES[:2])
    loaded = loaded_model(tmp_path)
    measured = measure_samples(index.samples, index, loaded, settings(), "")
    for sample in index.samples:
        sample.path.unlink()
    assert composite_test(measured, loaded, settings()) == "its images could not be read again"


def test_one_logit(tmp_path):
    result = audit_of(tmp_path, loaded_model(tmp_path, outputs=1))
    assert -5 < result["composites"]["kinds"]["rectangles"]["skill"] <= 1


@pytest.mark.parametrize(("skill", "marked"), list(product(NUMBERS, NUMBERS)))
def test_reassuring_words_need_both_kinds(skill, marked):
    def number(name):
        return dict(zip(("mean", "low", "high"), NUMBERS[name], strict=True))

    says = composites_in_words(number(skill), number(marked))
    both = {skill, marked}
    assert says.startswith("The decision is made where") == (both == {"above"})
    assert ("worse than" in says) == ("above" not in both and "below" in both)
    assert ("no better than" in says) == (both == {"open"})
    assert ("but not for" in says) == ("above" in both and len(both) == 2)
