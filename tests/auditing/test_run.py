"""An audit's numbers against its rows, its words against the evidence, and what goes wrong."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from auditing.samples import (
    NAMES,
    PREPROCESSING,
    SCRIPT,
    loaded_model,
    model_file,
    settings,
    write_index,
)
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import nn

import diffsal.auditing.measure
import diffsal.auditing.run
import diffsal.auditing.stress
from diffsal.auditing.report import written
from diffsal.auditing.rows import COLUMNS
from diffsal.auditing.run import audit
from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Index, Sample, read_index
from diffsal.faithfulness.perturbation import occlusion_drops, occlusion_faithfulness
from diffsal.fooling.head_shift import head_shift
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import find_target_layer
from diffsal.models.checkpoints import load_model

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "audit.md"


def read_rows(path):
    """Columns of a CSV: numbers with NaN for empty cells, and strings."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    texts = ("path", "label", "predicted")
    return {
        name: values if name in texts else np.array([float(v or "nan") for v in values])
        for name, values in columns.items()
    }


def column(table, name):
    first, _, second = name.partition(" - ")
    return table[first] - table[second] if second else table[first]


class Audited:
    """A finished audit with everything in it."""

    def __init__(self, folder):
        self.folder = folder / "audit"
        self.index = read_index(write_index(folder / "data"), classes=NAMES[:2])
        self.loaded = loaded_model(folder)
        reference = load_model(model_file(folder / "reference.pt", seed=1))
        self.result = audit(self.index, self.loaded, self.folder, settings(), reference)
        self.json = json.loads((self.folder / "audit.json").read_text("utf-8"))
        self.table = read_rows(self.folder / "per-image.csv")
        self.reference = read_rows(self.folder / "per-image-reference.csv")
        self.page = (self.folder / "report.html").read_text("utf-8")
        self.findings = {finding["id"]: finding for finding in self.json["findings"]}

    def numbers(self):
        return [number for finding in self.json["findings"] for number in finding["numbers"]]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    torch.manual_seed(0)
    return Audited(tmp_path_factory.mktemp("audited"))


def test_every_number_follows_from_the_rows(audited):
    numbers = [number for number in audited.numbers() if number["name"] != "auroc"]
    assert len(numbers) > 30
    for number in numbers:
        values = column(audited.table, number["name"])
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
        expected = {
            "margin": maps.margin,
            "common_mode_share": maps.common_mode_share,
            "occlusion_true": occlusion_faithfulness(maps.true, drops),
            "occlusion_difference": occlusion_faithfulness(maps.difference, drops),
        }
        for name, value in expected.items():
            assert audited.table[name][position] == pytest.approx(value.item(), abs=1e-4)


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


def test_stress_test_changes_maps_and_no_prediction(audited):
    table, finding = audited.table, audited.findings["stress-test"]
    measured = ~np.isnan(table["target_after"])
    assert measured.sum() == 10  # the other half made the vector
    assert table["prediction_changed"][measured].sum() == 0
    assert "None of their predictions changed" in finding["says"]
    assert np.nanmax(table["probability_change"]) < 1e-5
    assert np.nanmax(table["difference_change"]) < 1e-4
    assert np.nanmean(table["target_after"]) < np.nanmean(table["target_before"])
    assert np.nanmean(table["share_after"]) > np.nanmean(table["common_mode_share"])


def test_curves_and_areas_agree(audited):
    for name in ("insertion_true", "deletion_difference"):
        curve = audited.json["curves"][name]["mean"]
        assert len(curve) == 21
        area = np.trapezoid(curve, dx=1 / 20)
        assert area == pytest.approx(audited.table[name].mean(), abs=1e-5)


def test_randomisation_ends_where_its_column_says(audited):
    course = audited.json["randomisation"]
    assert course["images"] == (~np.isnan(audited.table["randomised_true"])).sum() == 2
    assert len(course["layers"]) == len(course["true"])
    for kind in ("true", "difference"):
        last = np.nanmean(audited.table[f"randomised_{kind}"])
        assert course[kind][-1] == pytest.approx(last)


def test_reference_is_measured_on_the_same_images(audited):
    mine, theirs = audited.table, audited.reference
    assert mine["path"] == theirs["path"]
    document = audited.json["reference"]
    alike = np.array(mine["predicted"]) == np.array(theirs["predicted"])
    assert document["agreement"]["mean"] == pytest.approx(alike.mean())
    for row in document["numbers"]:
        name = row["model"]["name"]
        assert row["reference"]["mean"] == pytest.approx(np.nanmean(theirs[name]))
        assert row["difference"]["mean"] == pytest.approx(np.nanmean(mine[name] - theirs[name]))
    assert "Beside the reference" in audited.page


def test_gallery_shows_what_it_says(audited):
    table = audited.table
    shown = {group["id"]: group["images"] for group in audited.json["gallery"]}
    by_share = np.argsort(-table["common_mode_share"])[:3]
    assert shown["common-mode"] == [table["path"][position] for position in by_share]
    by_faith = np.argsort(table["occlusion_difference"])[:3]
    assert shown["unfaithful"] == [table["path"][position] for position in by_faith]
    wrong = dict(zip(table["path"], table["correct"], strict=True))
    assert shown["wrong"]
    assert not any(wrong[path] for path in shown["wrong"])
    assert all(wrong[path] for path in shown["typical"])
    assert audited.page.count("data:image/png;base64,") == 5 * sum(map(len, shown.values())) + 15


def test_files_and_schema_are_documented(audited):
    assert audited.json == json.loads(json.dumps(audited.result))
    assert (audited.json["format"], audited.json["format_version"]) == ("diffsal-audit", 1)
    assert list(audited.table) == ["path", "label", "predicted", *COLUMNS]
    documentation = DOCUMENTATION.read_text("utf-8")
    document = audited.json
    documented = {*document, *document["model"], *document["data"], *document["settings"]}
    documented |= {*document["randomisation"], *document["reference"], *document["gallery"][0]}
    documented |= {*document["findings"][0], *document["curves"]}
    documented |= {*document["findings"][0]["numbers"][0], *audited.findings, *COLUMNS}
    assert not [name for name in documented if f"`{name}`" not in documentation]


def test_every_finding_says_what_it_does_not_show(audited):
    assert next(iter(audited.findings)) == "common-mode"
    for finding in audited.json["findings"]:
        assert finding["says"].endswith(".")
        assert finding["limits"].endswith(".")
    assert 3 <= len(audited.json["summary"]) <= 5
    page = audited.page.lower()
    assert not [
        word for word in ("trustworthy", " is safe", "innocent", "nan") if f"{word} " in page
    ]


def test_file_names_stay_text(audited):
    assert SCRIPT in {Path(path).name for path in audited.table["path"]}
    assert "<script" not in audited.page


def test_nothing_is_loaded_from_elsewhere(audited):
    assert "http" not in audited.page.split("<body>")[0].replace("http-equiv", "")
    assert "url(" not in audited.page
    assert "default-src 'none'" in audited.page


def test_equal_runs_give_equal_files(audited, tmp_path):
    again = audit(audited.index, audited.loaded, tmp_path, settings())
    assert again["findings"] == audited.result["findings"]
    rows = (tmp_path / "per-image.csv").read_bytes()
    assert rows == (audited.folder / "per-image.csv").read_bytes()


def test_a_head_shifted_model_is_told_apart(audited, tmp_path):
    dataset = ImageDataset(audited.index.samples, PREPROCESSING)
    images = torch.stack([item[0] for item in dataset])
    model = head_shift(audited.loaded.model, [images]).model
    fooled = replace(audited.loaded, model=model, target_layer=find_target_layer(model))
    result = audit(audited.index, fooled, tmp_path, settings(subset=0), audited.loaded)
    by_name = {row["model"]["name"]: row for row in result["reference"]["numbers"]}
    assert by_name["common_mode_share"]["difference"]["low"] > 0
    assert by_name["occlusion_difference"]["difference"]["mean"] == pytest.approx(0, abs=0.02)
    assert by_name["correct"]["difference"]["mean"] == 0
    assert result["reference"]["agreement"]["mean"] == 1


def test_the_test_split_is_audited_and_the_training_split_makes_the_vector(tmp_path):
    source = write_index(tmp_path / "data", (12, 12), maps=False, splits=("train", "test"))
    index = read_index(source, classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings(subset=0))
    assert result["data"]["split"] == "test"
    assert result["data"]["audited"] == result["data"]["available"] == 12
    table = read_rows(tmp_path / "per-image.csv")
    tested = {str(sample.path) for sample in index.split("test")}
    assert set(table["path"]) == tested
    assert not np.isnan(table["target_after"]).any()
    missing = {one["what"] for one in result["left_out"]}
    assert missing == {"localisation against human maps", "ROAD", "cascading randomisation"}
    assert "the index names no human maps" in (tmp_path / "report.html").read_text("utf-8")


def test_limit_draws_by_the_seed_and_keeps_the_order(tmp_path):
    index = read_index(write_index(tmp_path / "data", (12, 12), maps=False), classes=NAMES[:2])
    loaded, paths = loaded_model(tmp_path), []
    for seed in (0, 1):
        audit(index, loaded, tmp_path, settings(limit=6, subset=0, seed=seed), overwrite=True)
        paths.append(read_rows(tmp_path / "per-image.csv")["path"])
    order = [str(sample.path) for sample in index.samples]
    assert paths[0] != paths[1]
    for drawn in paths:
        assert drawn == sorted(set(drawn), key=order.index)
        assert len(drawn) == 6


def test_an_interrupted_audit_leaves_what_was_there(tmp_path, monkeypatch):
    index = read_index(write_index(tmp_path / "data", (3, 3), maps=False), classes=NAMES[:2])
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "report.html").write_text("earlier")

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffsal.auditing.run, "render_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit(index, loaded_model(tmp_path), folder, settings(subset=0), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    assert (folder / "report.html").read_text() == "earlier"


def test_files_are_not_overwritten_unasked(tmp_path, refused):
    (tmp_path / "report.html").touch()
    index = Index(tmp_path, NAMES[:2], (Sample(tmp_path / "no.png", 0),))
    with refused("is there already: pass --overwrite"):
        audit(index, loaded_model(tmp_path), tmp_path, settings())


def test_rows_of_an_earlier_reference_do_not_stay(tmp_path, refused):
    rows = tmp_path / "audit" / "per-image-reference.csv"
    rows.parent.mkdir()
    rows.touch()
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    loaded = loaded_model(tmp_path)
    with refused("per-image-reference.csv is there already"):
        audit(index, loaded, rows.parent, settings(subset=0))
    audit(index, loaded, rows.parent, settings(subset=0), overwrite=True)
    assert not rows.exists()


def test_the_model_is_left_as_it_was(audited):
    state = load_model(audited.loaded.path).model.state_dict()
    for name, value in audited.loaded.model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(module._forward_hooks for module in audited.loaded.model.modules())


class PerceptronHead(nn.Module):
    """A head that is not linear in the pooled features."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def say(result, identity):
    (finding,) = (one for one in result["findings"] if one["id"] == identity)
    return finding["says"]


def audit_of(folder, loaded, per_class=(4, 4), **options):
    source = write_index(folder / "data", per_class, maps=False)
    index = read_index(source, classes=NAMES[: len(per_class)])
    result = audit(index, loaded, folder / "audit", settings(subset=1, **options))
    page = (folder / "audit" / "report.html").read_text("utf-8")
    assert "nan" not in page.lower().replace("finance", "").split()
    assert "NaN" not in (folder / "audit" / "audit.json").read_text("utf-8")
    return result


def test_one_class_only(tmp_path):
    index = read_index(write_index(tmp_path / "data", (6,), maps=False), classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings(subset=0))
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
    result = audit(index, loaded, tmp_path / "audit", settings(subset=0))
    assert result["settings"]["outputs"] == 50
    assert "area under the ROC curve" in {one["what"] for one in result["left_out"]}


def test_another_head_is_spoken_of_to_first_order(tmp_path):
    loaded = loaded_model(tmp_path)
    model = PerceptronHead().eval()
    loaded = replace(loaded, model=model, target_layer=find_target_layer(model))
    result = audit_of(tmp_path, loaded)
    assert "To first order it has no influence" in say(result, "common-mode")
    assert say(result, "stress-test").startswith("Could not be applied")


def test_a_single_image(tmp_path):
    index = read_index(write_index(tmp_path / "data", (1,), maps=False), classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings(subset=1))
    assert all(n["low"] is None for f in result["findings"] for n in f["numbers"])
    assert say(result, "stress-test").startswith("Could not be applied")


def test_images_that_cannot_be_read_are_told_and_left_out(tmp_path):
    source = write_index(tmp_path / "data", (4, 4), maps=False)
    (tmp_path / "data" / "8-2.png").write_bytes(b"no image")
    index = read_index(source, classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings(subset=0))
    assert [Path(one["path"]).name for one in result["failed"]] == ["8-2.png"]
    assert (result["data"]["audited"], result["data"]["failed"]) == (7, 1)
    assert "1 more could not be measured" in result["summary"][0]
    assert "8-2.png" in (tmp_path / "report.html").read_text("utf-8")


def test_logits_that_are_not_finite(tmp_path, refused):
    loaded = loaded_model(tmp_path)
    nn.init.constant_(loaded.model.classifier.bias, math.inf)
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    with refused("not finite"):
        audit(index, loaded, tmp_path, settings(subset=0))


def test_no_images(tmp_path, refused):
    with refused("holds no images"):
        audit(Index(tmp_path, NAMES[:2], ()), loaded_model(tmp_path), tmp_path, settings())


def test_classes_that_are_not_the_models(tmp_path, refused):
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    with refused("2 class names for a model of 50 classes"):
        audit(index, loaded_model(tmp_path, outputs=50), tmp_path, settings())


@pytest.mark.parametrize("who", ["weights", "reference"])
def test_classes_in_another_order_than_a_models(who, tmp_path, refused):
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=("8", "3"))
    loaded = loaded_model(tmp_path)
    reference = load_model(model_file(tmp_path / "reference.pt", seed=1))
    if who == "reference":
        loaded = replace(loaded, classes=("8", "3"))
    with refused(
        rf"index\.csv: its classes are 8,3, those of .*{who}\.pt are 3,8: .* --classes 3,8"
    ):
        audit(index, loaded, tmp_path / "audit", settings(subset=0), reference)


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

    module = {"road": diffsal.auditing.measure, "head_shift": diffsal.auditing.stress}[name]
    monkeypatch.setattr(module, name, fail)
    with refused(words):
        audit_of(tmp_path, loaded_model(tmp_path))


def test_a_model_that_does_not_run(tmp_path, refused):
    loaded = loaded_model(tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loaded = replace(loaded, model=model, target_layer=find_target_layer(model))
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    with refused("does not run on 32 x 32 inputs"):
        audit(index, loaded, tmp_path, settings())
