"""On how many images slow tests are measured, and by which occluders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from auditing.samples import (
    NAMES,
    PREPROCESSING,
    BagOfFeatures,
    loaded_model,
    say,
    settings,
    write_index,
)

from diffsal.auditing import slow
from diffsal.auditing.measure import measure_samples
from diffsal.auditing.run import audit
from diffsal.auditing.sampling import balanced_order
from diffsal.auditing.slow import measure_slowly
from diffsal.auditing.wording import brief
from diffsal.data.datasets import ImageDataset
from diffsal.data.index import read_index
from diffsal.faithfulness.perturbation import occlusion_drops, occlusion_faithfulness
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import find_target_layer


@pytest.fixture(autouse=True)
def small_rounds():
    """Rounds as they are."""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    source = write_index(folder / "data", (30, 30), maps=False)
    return read_index(source, classes=NAMES[:2]), loaded_model(folder)


def measured_by(many, monkeypatch, *names, **options):
    """These slow tests alone, of 60 images."""
    index, loaded = many
    tests = slow._tests
    monkeypatch.setattr(
        slow, "_tests", lambda *given: [one for one in tests(*given) if one.name in names]
    )
    chosen = settings(**options)
    measured = measure_samples(index.samples, index, loaded, chosen, "audit")
    measure_slowly(measured, loaded, chosen)
    return measured


@pytest.mark.parametrize("precision", [0.3, 0.14, 1e-6])
def test_a_sample_is_as_large_as_its_intervals_need(many, monkeypatch, precision):
    measured = measured_by(many, monkeypatch, "input-level", precision=precision)
    (told,) = measured.sampling
    order = balanced_order([sample.label for sample in measured.samples], seed=0)
    column = measured.column("smoothgrad_difference")
    assert sorted(order[: told["images"]]) == np.flatnonzero(~np.isnan(column)).tolist()
    numbers = [*measured.per_map("smoothgrad", "", "").values()]
    numbers.append(measured.number("receptive_share", "", ""))
    reached = max((one["high"] - one["low"]) / 2 for one in numbers)
    assert told["half_width"] == reached
    assert told["narrow"] == (reached <= precision)
    assert told["narrow"] or told["images"] == 60
    assert {0.3: told["images"] == 16, 1e-6: told["images"] == 60}.get(precision, True)


def test_classes_are_narrow_too(many, monkeypatch):
    measured = measured_by(many, monkeypatch, "occlusion", precision=0.12, occluders=())
    (told,) = measured.sampling
    by_class = measured.by_class("occlusion_difference", "", "").values()
    widest = max((one["high"] - one["low"]) / 2 for one in by_class)
    assert told["half_width"] >= widest
    assert told["narrow"] or told["images"] == 60


def test_samples_do_not_depend_on_the_batch_size(many, monkeypatch):
    names = ("occlusion", "occlusion_blur", "transplant")
    one, other = (
        measured_by(many, monkeypatch, *names, precision=0.15, batch_size=size) for size in (5, 64)
    )
    assert [part["test"] for part in one.sampling] == list(names)
    assert [part["images"] for part in one.sampling] == [part["images"] for part in other.sampling]
    for name in ("occlusion_difference", "occlusion_blur_true", "transplant_difference"):
        np.testing.assert_allclose(one.column(name), other.column(name), atol=1e-5)


def test_a_bag_of_features_by_occluder(tmp_path, monkeypatch):
    tests = slow._tests
    monkeypatch.setattr(
        slow, "_tests", lambda *given: [one for one in tests(*given) if one.name != "ROAD"]
    )
    model = BagOfFeatures().eval()
    loaded = replace(loaded_model(tmp_path), model=model, layer=find_target_layer(model))
    index = read_index(write_index(tmp_path / "data", (8, 8), maps=False), classes=NAMES[:2])
    occluders = ("noise", "blur", "transplant")
    result = audit(index, loaded, tmp_path / "audit", settings(occluders=occluders))
    assert result["settings"]["occluders"] == ["mean", *occluders]
    numbers = {
        one["name"]: one
        for finding in result["findings"]
        for one in finding["numbers"]
        if "class" not in one
    }
    images = torch.stack([item[0] for item in ImageDataset(index.samples, PREPROCESSING)])
    maps = explain(model, images, [sample.label for sample in index.samples])
    for occluder, name in (("mean", "occlusion"), ("noise", "occlusion_noise")):
        drops = occlusion_drops(
            model, images, maps.true_class, grid=maps.true.shape[1:], occluder=occluder
        )
        expected = occlusion_faithfulness(maps.difference, drops).mean().item()
        assert numbers[f"{name}_difference"]["mean"] == pytest.approx(expected, abs=1e-5)
    # A cell of the mean colour speaks alike wherever it lies, so that drops are the map's own.
    assert numbers["occlusion_difference"]["mean"] == pytest.approx(1, abs=1e-3)
    says = say(result, "occlusion")
    for name, words in (("occlusion", "mean colour"), ("transplant", "pixels of another class")):
        assert f"{brief(numbers[f'{name}_difference'])} {words}" in says
    assert "How much is found depends on the occluder: mean colour against" in says
