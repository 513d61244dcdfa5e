"""An audit's files: what is in them, and what becomes of those that were there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from auditing.samples import NAMES, loaded_model, settings, write_index
from hostile.runs import contents, differing

import diffsal.auditing.measure
import diffsal.auditing.result
import diffsal.auditing.stress
from diffsal.auditing import composites, sampling, slow
from diffsal.auditing.composites import KINDS, PER_IMAGE
from diffsal.auditing.rows import COLUMNS
from diffsal.auditing.run import audit
from diffsal.data.index import Index, Sample, read_index
from diffsal.models.checkpoints import load_model

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "audit.md"


def test_files_and_schema_are_documented(audited):
    assert audited.json == json.loads(json.dumps(audited.result))
    assert (audited.json["format"], audited.json["format_version"]) == ("diffsal-audit", 2)
    assert list(audited.table) == ["path", "label", "predicted", *COLUMNS]
    documentation = DOCUMENTATION.read_text("utf-8")
    document = audited.json
    documented = {*document, *document["model"], *document["data"], *document["settings"]}
    documented |= {*document["randomisation"], *document["reference"], *document["gallery"][0]}
    documented |= {*document["findings"][0], *document["curves"], *document["composites"]}
    documented |= {*document["parts"][0], *document["clusters"], *document["sampling"][0]}
    documented |= {*KINDS, *document["composites"]["kinds"]["same"]}
    documented |= {*document["composites"]["shown"][0]}
    documented |= {*audited.findings, *COLUMNS}
    documented |= {key for number in audited.numbers() for key in number}
    assert not [name for name in documented if f"`{name}`" not in documentation]


def test_equal_runs_give_equal_files(audited, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "FEWEST", 16)  # as there
    again = audit(audited.index, audited.loaded, tmp_path, settings(precision=1e-6))
    assert again["findings"] == audited.result["findings"]
    rows = (tmp_path / "per-image.csv").read_bytes()
    assert rows == (audited.folder / "per-image.csv").read_bytes()


def test_processes_share_an_audit_and_write_what_one_writes(
    tmp_path, monkeypatch, few_draws, beside
):
    index = read_index(write_index(tmp_path / "data", (4, 5), maps=False), classes=NAMES[:2])
    loaded = loaded_model(tmp_path)
    pairs = {"batch_size": 2}
    audit(index, loaded, tmp_path / "alone", settings(**pairs))
    computed, road, margins = [], slow._road, composites.composite_margins
    monkeypatch.setattr(slow, "_road", lambda *rest: computed.append(1) or road(*rest))
    monkeypatch.setattr(
        composites,
        "composite_margins",
        lambda *rest, **how: computed.append(2) or margins(*rest, **how),
    )

    def other():
        assert audit(index, loaded, tmp_path / "none", settings(share=(1, 2), **pairs)) == {}

    with beside(other) as process:
        assert audit(index, loaded, tmp_path / "shared", settings(share=(0, 2), **pairs))["summary"]
    assert process.exitcode == 0
    assert not (tmp_path / "none").exists()
    batches = math.ceil(9 * PER_IMAGE / 2)
    assert computed.count(1) == 1  # of two
    assert computed.count(2) == len(KINDS) * math.ceil(batches / 2)
    assert not differing(tmp_path / "shared", contents(tmp_path / "alone"))


def test_processes_that_read_other_images_stop(tmp_path, few_draws, refused, beside):
    path = write_index(tmp_path / "data", (4, 5), maps=False)
    index, loaded = read_index(path, classes=NAMES[:2]), loaded_model(tmp_path)
    fewer = replace(index, samples=index.samples[1:])

    def shared(rank, index):
        with refused("the processes differ in the images that could be read"):
            audit(index, loaded, tmp_path / "audit", settings(share=(rank, 2)))

    with beside(lambda: shared(1, fewer)) as process:
        shared(0, index)
    assert process.exitcode == 0
    assert not (tmp_path / "audit" / "report.html").exists()


def test_an_interrupted_audit_leaves_what_was_there(tmp_path, monkeypatch):
    index = read_index(write_index(tmp_path / "data", (3, 3), maps=False), classes=NAMES[:2])
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "report.html").write_text("earlier")

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffsal.auditing.result, "render_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit(index, loaded_model(tmp_path), folder, settings(), overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"report.html", "audit.log"}
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
        audit(index, loaded, rows.parent, settings())
    audit(index, loaded, rows.parent, settings(), overwrite=True)
    assert not rows.exists()


def test_the_model_is_left_as_it_was(audited):
    state = load_model(audited.loaded.path).model.state_dict()
    for name, value in audited.loaded.model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(module._forward_hooks for module in audited.loaded.model.modules())
