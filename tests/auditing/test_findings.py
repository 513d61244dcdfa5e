"""An audit's numbers against its rows, and its words against the evidence."""

from dataclasses import replace

import numpy as np
import pytest
from auditing.samples import NAMES, audit_of, loaded_model, read_rows, say, settings, write_index
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

from diffsal.auditing.findings_of_inputs import find_occlusion
from diffsal.auditing.rows import Measured
from diffsal.auditing.run import audit
from diffsal.auditing.wording import written
from diffsal.data.index import Index, read_index
from diffsal.maps.target_layers import find_target_layer


def column(table, name):
    first, _, second = name.partition(" - ")
    return table[first] - table[second] if second else table[first]


class PerceptronHead(nn.Module):
    """A head that is not linear in the pooled features."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def test_every_number_follows_from_the_rows(audited):
    other = "auroc", "composite_skill", "miss_at", "equal_error_rate", "calibration_error"
    other += ("silhouette",)
    numbers = [number for number in audited.numbers() if not number["name"].startswith(other)]
    assert len(numbers) > 30
    labels = np.array(audited.table["label"])
    for number in numbers:
        values = column(audited.table, number["name"])
        values = values[labels == number["class"]] if "class" in number else values
        values = values[~np.isnan(values)]
        assert number["n"] == len(values) > 0
        assert number["mean"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
        if np.ptp(values) == 0:
            assert number["low"] is None
            assert number["high"] is None
            continue
        bounds = stats.bootstrap((values,), np.mean, random_state=np.random.default_rng(0))
        low, high = bounds.confidence_interval
        assert (number["low"], number["high"]) == pytest.approx((low, high), rel=1e-6)
        assert written(number["mean"]) in audited.page


def test_area_under_the_roc_curve(audited):
    (number,) = (one for one in audited.numbers() if one["name"] == "auroc")
    labels = np.array([int(label == "8") for label in audited.table["label"]])
    eights = np.where(labels == 1, audited.table["probability"], 1 - audited.table["probability"])
    assert number["mean"] == pytest.approx(roc_auc_score(labels, eights))

    def area(positive, negative, axis=-1):
        return (positive[..., :, None] > negative[..., None, :]).mean((-2, -1))

    bounds = stats.bootstrap(
        (eights[labels == 1], eights[labels == 0]), area, method="percentile", random_state=1
    ).confidence_interval
    assert (number["low"], number["high"]) == pytest.approx(tuple(bounds), abs=0.03)


def test_every_finding_says_what_it_does_not_show(audited):
    assert next(iter(audited.findings)) == "composites"
    for finding in audited.json["findings"]:
        assert finding["says"].endswith(".")
        assert finding["limits"].endswith(".")
    assert 3 <= len(audited.json["summary"]) <= 7
    page = audited.page.lower()
    assert not [
        word for word in ("trustworthy", " is safe", "innocent", "nan") if f"{word} " in page
    ]


@pytest.mark.parametrize(
    ("low", "high", "words", "other"),
    [
        (0.1, 0.3, "The more the difference map marks a cell, the more", "is the more faithful"),
        (-0.1, 0.3, "No relation was found", "no difference between the two was found"),
        (-0.3, -0.1, "raises the margin, against what it claims", "the class map is the more"),
        (None, None, "No relation was found", "no difference between the two was found"),
    ],
)
def test_words_follow_the_interval(low, high, words, other, monkeypatch):
    number = {"mean": 0.0, "low": low, "high": high, "n": 9}
    monkeypatch.setattr(Measured, "number", lambda *_, **__: number)
    says = find_occlusion(Measured(rows=[]), {})["says"]
    assert words in says
    assert other in says


def test_one_class_only(tmp_path):
    index = read_index(write_index(tmp_path / "data", (6,), maps=False), classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings())
    assert result["data"]["classes"] == {"3": 6, "8": 0}
    assert "area under the ROC curve" in {one["what"] for one in result["left_out"]}
    assert not any(n["name"] == "auroc" for f in result["findings"] for n in f["numbers"])


def test_constant_model(tmp_path):
    loaded = loaded_model(tmp_path)
    nn.init.zeros_(loaded.model.classifier.weight)
    result = audit_of(tmp_path, loaded)
    for identity in ("common-mode", "agreement", "occlusion", "location", "insertion-deletion"):
        assert say(result, identity).startswith("Undefined"), identity
    assert "constant" in " ".join(result["summary"])
    table = read_rows(tmp_path / "audit" / "per-image.csv")
    assert np.isnan(table["common_mode_share"]).all()


def test_one_logit(tmp_path):
    result = audit_of(tmp_path, loaded_model(tmp_path, outputs=1))
    assert say(result, "common-mode").startswith("Does not apply: the model has one output")
    assert say(result, "stress-test").startswith("Could not be applied")
    assert "the stress test" in {one["what"] for one in result["left_out"]}
    assert "no finding" in say(result, "sanity")


def test_more_than_two_classes(tmp_path):
    result = audit_of(tmp_path, loaded_model(tmp_path, outputs=3), (4, 4, 4))
    assert "against a third class can" in say(result, "common-mode")
    table = read_rows(tmp_path / "audit" / "per-image.csv")
    assert table["unexplained"].max() < 1e-5
    (area,) = (n for f in result["findings"] for n in f["numbers"] if n["name"] == "auroc")
    assert 0 <= area["mean"] <= 1
    assert area["low"] is None


def test_fifty_classes(tmp_path):
    loaded = loaded_model(tmp_path, outputs=50)
    names = tuple(f"kind {number}" for number in range(50))
    samples = read_index(write_index(tmp_path / "data", (3, 3), maps=False)).samples
    index = Index(tmp_path, names, samples)
    result = audit(index, loaded, tmp_path / "audit", settings())
    assert result["settings"]["outputs"] == 50
    assert "area under the ROC curve" in {one["what"] for one in result["left_out"]}


def test_another_head_is_spoken_of_to_first_order(tmp_path):
    loaded = loaded_model(tmp_path)
    model = PerceptronHead().eval()
    loaded = replace(loaded, model=model, layer=find_target_layer(model))
    result = audit_of(tmp_path, loaded)
    assert "To first order it has no influence" in say(result, "common-mode")
    assert say(result, "stress-test").startswith("Could not be applied")


def test_a_single_image(tmp_path):
    index = read_index(write_index(tmp_path / "data", (1,), maps=False), classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings())
    assert all(n["low"] is None for f in result["findings"] for n in f["numbers"])
    assert say(result, "stress-test").startswith("Could not be applied")
