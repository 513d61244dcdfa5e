"""An audit's files: what is in them, and what becomes of those that were there."""

import json
from pathlib import Path

import pytest
import torch
from auditing.samples import NAMES, loaded_model, settings, write_index

import diffsal.auditing.measure
import diffsal.auditing.result
import diffsal.auditing.stress
from diffsal.auditing import sampling
from diffsal.auditing.composites import KINDS
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
