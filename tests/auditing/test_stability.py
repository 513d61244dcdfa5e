"""Sensitivity and re-estimated batch norms within an audit: against both alone, and its words."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from auditing.samples import (
    NAMES,
    PREPROCESSING,
    audit_of,
    loaded_model,
    say,
    settings,
    write_index,
)
from sklearn.metrics import roc_auc_score
from torch import nn

from diffsal.auditing.findings_of_decisions import find_batch_norm
from diffsal.auditing.measure import measure_samples
from diffsal.auditing.rows import Measured
from diffsal.auditing.stability import Reestimated, measure_reestimated
from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Sample, read_index
from diffsal.faithfulness.batch_norm import batch_norms, reestimate_batch_norms
from diffsal.faithfulness.sensitivity import max_sensitivity
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import find_target_layer, in_copy


def inputs_of(index):
    dataset = ImageDataset(index.samples, PREPROCESSING)
    return torch.stack([item[0] for item in dataset]), torch.tensor([item[1] for item in dataset])


def with_model(loaded, model):
    return replace(loaded, model=model, layer=in_copy(model, loaded.target_layer))


def test_sensitivity_is_that_of_the_function_alone(audited):
    images, labels = inputs_of(audited.index)
    found = max_sensitivity(audited.loaded.model, images, labels, radius=4 / 255 / 0.5)
    np.testing.assert_allclose(audited.table["sensitivity"], found.largest, rtol=1e-3)
    np.testing.assert_allclose(audited.table["sensitivity_counted"], found.counted)
    assert "at most 4 of 255 levels" in audited.findings["sensitivity"]["says"]
    assert "sensitivity" in {one["test"] for one in audited.result["sampling"]}


def test_the_copy_is_that_of_all_images_in_one_batch(audited):
    """20 images are one batch, whose order tells nothing."""
    images, labels = inputs_of(audited.index)
    model = audited.loaded.model
    copy = reestimate_batch_norms(model, [images])
    before, after = explain(model, images, labels), explain(copy, images, labels)
    table = audited.table
    np.testing.assert_allclose(table["reestimated_margin"], after.margin, atol=1e-4)
    change = (after.difference - before.difference).flatten(1).norm(dim=1)
    change /= before.difference.flatten(1).norm(dim=1)
    np.testing.assert_allclose(table["reestimated_change"], change, rtol=1e-3)
    towards_second = table["reestimated_margin"] * np.where(labels == 1, 1, -1)
    (area,) = (one for one in audited.numbers() if one["name"] == "auroc_reestimated")
    assert area["mean"] == pytest.approx(roc_auc_score(labels, towards_second))
    says = audited.findings["batch-norm"]["says"]
    assert f"statistics of {len(batch_norms(model))} batch norms" in says


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Twenty digits, and a model that has their statistics."""
    folder = tmp_path_factory.mktemp("norms")
    index = read_index(write_index(folder, (10, 10), maps=False), classes=NAMES[:2])
    loaded = loaded_model(folder)
    images, _ = inputs_of(index)
    return index, with_model(loaded, reestimate_batch_norms(loaded.model, [images]))


def reestimated(index, loaded, **options):
    measured = measure_samples(index.samples, index, loaded, settings(**options), "")
    return measured, measure_reestimated(measured, loaded, settings(**options))


def test_statistics_of_the_audited_images_change_nothing(setting):
    measured, found = reestimated(*setting)
    assert found.layers == len(batch_norms(setting[1].model))
    assert measured.column("reestimated_change").max() < 1e-4
    assert measured.column("reestimated_difference").min() > 0.999
    np.testing.assert_allclose(
        measured.column("reestimated_margin"), measured.column("margin"), atol=1e-4
    )


def test_doctored_statistics_change_much_and_the_model_nothing(setting):
    index, loaded = setting
    doctored = with_model(loaded, deepcopy(loaded.model))
    for norm in batch_norms(doctored.model):
        norm.running_mean += 2 * norm.running_var.sqrt()
    before = deepcopy(doctored.model.state_dict())
    measured, _ = reestimated(index, doctored)
    assert np.median(measured.column("reestimated_change")) > 0.3
    assert all(
        torch.equal(value, before[name]) for name, value in doctored.model.state_dict().items()
    )
    own, _ = reestimated(*setting)  # the copies are the same, whatever they were copied from
    np.testing.assert_allclose(
        measured.column("reestimated_margin"), own.column("reestimated_margin"), atol=1e-4
    )


def test_small_batches_are_even_and_mixed(setting, monkeypatch):
    index, loaded = setting
    seen = []

    def record(model, batches):
        seen.extend(batches)
        return reestimate_batch_norms(model, seen)

    monkeypatch.setattr("diffsal.auditing.stability.reestimate_batch_norms", record)
    reestimated(index, loaded, batch_size=12)
    assert [len(batch) for batch in seen] == [10, 10]
    images, labels = inputs_of(index)
    first = [int((images == one).flatten(1).all(1).nonzero()[0]) for one in seen[0]]
    assert 0 < labels[first].sum() < 10


def test_a_model_without_batch_norm(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 4, 8, 8)
            self.fc = nn.Linear(4, 2)

        def forward(self, images):
            return self.fc(self.features(images).mean((2, 3)))

    model = Bag().eval()
    loaded = replace(loaded_model(tmp_path), model=model, layer=find_target_layer(model))
    result = audit_of(tmp_path, loaded)
    assert "has no batch norm that keeps statistics" in say(result, "batch-norm")
    assert "re-estimated batch norm" in {one["what"] for one in result["left_out"]}


def test_few_images_are_too_few(tmp_path):
    result = audit_of(tmp_path, loaded_model(tmp_path), (4, 4))
    assert "8 images are too few to take statistics of" in say(result, "batch-norm")


def test_the_areas_are_those_of_the_model_and_of_the_copy():
    """The model is right on all images; its copy tells nothing."""
    copy = np.random.default_rng(0).normal(size=20)
    labels = np.arange(20) % 2
    sign = np.where(labels == 1, 1, -1)
    maps = {"reestimated_true": 0.5, "reestimated_difference": 0.5, "reestimated_change": 0.5}
    rows = [
        {"margin": 1.0, "reestimated_margin": float(s * m), **maps}
        for s, m in zip(sign, copy, strict=True)
    ]
    samples = [Sample(Path(str(number)), int(label)) for number, label in enumerate(labels)]
    measured = Measured(
        rows=rows, samples=samples, logits=list(torch.tensor(sign[:, None].astype(float)))
    )
    found = find_batch_norm(measured, Reestimated(3, torch.tensor(copy)[:, None]), {})
    assert "goes from 1.000 to" in found["says"]
    area = found["numbers"][0]
    assert area["mean"] == pytest.approx(roc_auc_score(labels, copy))
    assert 0.1 < area["low"] < area["mean"] < area["high"] < 0.9
    turned = int((sign * copy < 0).sum())
    assert f"{turned} margins change sign" in found["says"]
