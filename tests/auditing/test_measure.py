"""An audit's numbers against what they are measured with, and models that cannot be measured."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from auditing.samples import NAMES, PREPROCESSING, audit_of, loaded_model, settings, write_index
from PIL import Image
from torch import nn

import diffsal.auditing.run
import diffsal.auditing.slow
import diffsal.auditing.stress
from diffsal.auditing.run import audit
from diffsal.data.index import read_index
from diffsal.faithfulness.input_level import receptive_share, smoothgrad, smoothgrad_agreement
from diffsal.faithfulness.perturbation import occlusion_drops, occlusion_faithfulness
from diffsal.faithfulness.transplants import transplant_drops
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import find_target_layer


def test_accuracy_and_prediction(audited):
    table = audited.table
    right = [
        label == predicted
        for label, predicted in zip(table["label"], table["predicted"], strict=True)
    ]
    np.testing.assert_array_equal(table["correct"], right)
    np.testing.assert_array_equal(table["correct"], table["margin"] > 0)
    np.testing.assert_allclose(table["probability"], 1 / (1 + np.exp(-table["margin"])), rtol=1e-5)


def test_rows_belong_to_their_images(audited):
    for position in (1, 12):
        sample = audited.index.samples[position]
        assert audited.table["path"][position] == str(sample.path)
        inputs = PREPROCESSING(np.asarray(Image.open(sample.path).convert("RGB")))[None]
        model = audited.loaded.model
        maps = explain(model, inputs, torch.tensor([sample.label]))
        drops = occlusion_drops(model, inputs, maps.true_class, grid=(4, 4))
        seen = smoothgrad(model, inputs, maps.true_class, grid=(4, 4), draws=4)
        expected = {
            "smoothgrad_difference": smoothgrad_agreement(maps.difference, seen),
            "receptive_share": receptive_share(model, inputs, maps.true_class),
            "margin": maps.margin,
            "common_mode_share": maps.common_mode_share,
            "occlusion_true": occlusion_faithfulness(maps.true, drops),
            "occlusion_difference": occlusion_faithfulness(maps.difference, drops),
        }
        for name, value in expected.items():
            assert audited.table[name][position] == pytest.approx(value.item(), abs=1e-4)


def test_transplants_are_of_the_other_class(audited):
    def inputs(samples):
        images = [np.asarray(Image.open(one.path).convert("RGB")) for one in samples]
        return torch.stack([PREPROCESSING(image) for image in images])

    samples = audited.index.samples
    others = [one for one in samples if one.label != samples[0].label]
    donors = inputs([others[position] for position in (0, 3, 6, 9)])
    model, image = audited.loaded.model, inputs(samples[:1])
    drops = transplant_drops(model, image, donors[None], samples[0].label, grid=(4, 4))
    maps = explain(model, image, samples[0].label)
    expected = occlusion_faithfulness(maps.difference, drops).item()
    assert audited.table["transplant_difference"][0] == pytest.approx(expected, abs=1e-4)
    assert not np.isnan(audited.table["transplant_difference"]).any()


def test_maps_of_a_pooled_linear_head_add_up(audited):
    table = audited.table
    bias = audited.loaded.model.classifier.bias.detach().numpy()
    sign = np.where(np.array(table["label"]) == "8", 1, -1)
    np.testing.assert_allclose(table["residual"], sign * (bias[1] - bias[0]), atol=1e-5)
    assert table["unexplained"].max() < 1e-5
    assert "had no influence on any decision" in audited.findings["common-mode"]["says"]


def test_human_maps_are_used_where_there_are_some(audited):
    has_map = np.array(audited.table["label"]) == "8"
    assert audited.json["data"]["with_human_maps"] == has_map.sum() == 10
    for name in ("marked", "energy_true", "pointing_difference", "iou_true"):
        np.testing.assert_array_equal(np.isnan(audited.table[name]), ~has_map)
    np.testing.assert_allclose(audited.table["marked"][has_map], 0.5)


def test_curves_and_areas_agree(audited):
    for name in ("insertion_true", "deletion_difference"):
        curve = audited.json["curves"][name]["mean"]
        assert len(curve) == 11
        area = np.trapezoid(curve, dx=1 / 10)
        assert area == pytest.approx(audited.table[name].mean(), abs=1e-5)


def test_it_is_told_where_the_blank_decides(audited):
    table = audited.table
    for position, sample in enumerate(audited.index.samples):
        inputs = PREPROCESSING(np.asarray(Image.open(sample.path).convert("RGB")))[None]
        blank = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
        with torch.no_grad():
            kept = audited.loaded.model(blank).softmax(1)[0, sample.label].item()
        expected = kept / table["probability"][position]
        assert table["blank_share"][position] == pytest.approx(expected, rel=1e-4)
    void = (table["blank_share"] >= 0.5).sum()
    assert void > 0
    assert (
        f"On {void} images of 20 the areas are void"
        in (audited.findings["insertion-deletion"]["says"])
    )


def test_randomisation_ends_where_its_column_says(audited):
    course = audited.json["randomisation"]
    assert course["images"] == (~np.isnan(audited.table["randomised_true"])).sum() == 20
    assert len(course["layers"]) == len(course["true"])
    for kind in ("true", "difference"):
        last = np.nanmean(audited.table[f"randomised_{kind}"])
        assert course[kind][-1] == pytest.approx(last)


def test_logits_that_are_not_finite(tmp_path, refused):
    loaded = loaded_model(tmp_path)
    nn.init.constant_(loaded.model.classifier.bias, math.inf)
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    with refused("not finite"):
        audit(index, loaded, tmp_path, settings())


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("road", torch.OutOfMemoryError(), "has no memory for 64 images"),
        ("head_shift", RuntimeError("too deep"), r"does not run on 32 x 32 inputs \(too deep\)"),
    ],
)
def test_errors_of_the_model_in_later_steps(name, error, words, tmp_path, monkeypatch, refused):
    def fail(*_arguments, **_options):
        raise error

    module = {"road": diffsal.auditing.slow, "head_shift": diffsal.auditing.stress}[name]
    monkeypatch.setattr(module, name, fail)
    with refused(words):
        audit_of(tmp_path, loaded_model(tmp_path))


def test_a_model_that_does_not_run(tmp_path, refused):
    loaded = loaded_model(tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loaded = replace(loaded, model=model, layer=find_target_layer(model))
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    with refused("does not run on 32 x 32 inputs"):
        audit(index, loaded, tmp_path, settings())
