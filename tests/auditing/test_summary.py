"""A model beside a reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from auditing.samples import PREPROCESSING, settings

from diffsal.auditing.rows import Measured
from diffsal.auditing.run import audit
from diffsal.auditing.summary import _occlusion, compare
from diffsal.auditing.wording import written
from diffsal.data.datasets import ImageDataset
from diffsal.fooling.head_shift import head_shift
from diffsal.maps.target_layers import find_target_layer


def test_reference_is_measured_on_the_same_images(audited):
    mine, theirs = audited.table, audited.reference
    assert mine["path"] == theirs["path"]
    document = audited.json["reference"]
    alike = np.array(mine["predicted"]) == np.array(theirs["predicted"])
    assert document["agreement"]["mean"] == pytest.approx(alike.mean())
    skills = [row for row in document["numbers"] if row["model"]["unit"] == "skill"]
    assert [row["model"]["name"] for row in skills] == ["composite_skill", "composite_skill_marked"]
    for row in skills:
        assert row["difference"]["mean"] == row["model"]["mean"] - row["reference"]["mean"]
    for row in document["numbers"][len(skills) :]:
        name = row["model"]["name"]
        assert row["reference"]["mean"] == pytest.approx(np.nanmean(theirs[name]))
        assert row["difference"]["mean"] == pytest.approx(np.nanmean(mine[name] - theirs[name]))
    assert "Beside the reference" in audited.page


def test_the_summary_tells_all_images_and_where_classes_differ(audited):
    (says,) = (one for one in audited.json["summary"] if one.startswith("Occluding"))
    column = audited.table["occlusion_difference"]
    assert written(np.nanmean(column)) in says
    rows = [
        {"label": label, "occlusion_difference": value + step / 100, "occlusion_true": value}
        for label, value in (("ill", 0.3), ("well", -0.3))
        for step in range(9)
    ]
    measured = Measured(rows=rows, names=["ill", "well"])
    numbers = measured.per_map("occlusion", "", "rank correlation")
    (says,) = _occlusion({f"occlusion_{kind}": one for kind, one in numbers.items()}, measured)
    assert "was not found to move the margin (rank correlation 0.040)" in says
    assert "Classes differ: ill 0.340 (" in says
    assert "well −0.260 (" in says


def test_only_images_that_both_models_could_be_measured_on_are_compared():
    def measured(**correct):
        return Measured(
            rows=[{"path": k, "predicted": "a", "correct": v} for k, v in correct.items()]
        )

    accuracy = compare(measured(x=1, y=0, z=1), measured(y=1, z=1, w=0))["numbers"][0]
    assert {who: (one["mean"], one["n"]) for who, one in accuracy.items()} == {
        "model": (0.5, 2),
        "reference": (1, 2),
        "difference": (-0.5, 2),
    }


def test_a_head_shifted_model_is_told_apart(audited, tmp_path):
    dataset = ImageDataset(audited.index.samples, PREPROCESSING)
    images = torch.stack([item[0] for item in dataset])
    model = head_shift(audited.loaded.model, [images]).model
    fooled = replace(audited.loaded, model=model, layer=find_target_layer(model))
    result = audit(audited.index, fooled, tmp_path, settings(), audited.loaded)
    by_name = {row["model"]["name"]: row for row in result["reference"]["numbers"]}
    assert by_name["common_mode_share"]["difference"]["low"] > 0
    assert by_name["composite_skill"]["difference"]["mean"] == pytest.approx(0, abs=1e-3)
    assert by_name["occlusion_difference"]["difference"]["mean"] == pytest.approx(0, abs=0.02)
    assert by_name["correct"]["difference"]["mean"] == 0
    assert result["reference"]["agreement"]["mean"] == 1
