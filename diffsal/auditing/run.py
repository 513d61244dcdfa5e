"""Audit one model: can its heatmaps be believed? Numbers, intervals, and what they do not show.

:func:`audit` measures every image once with each method and keeps a row of numbers per image, no
pictures. From the rows come the findings, see :mod:`diffsal.auditing.findings`, and the files that
``docs/audit.md`` documents."""

import csv
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from diffsal import __version__
from diffsal.auditing.composites import PER_IMAGE
from diffsal.auditing.evidence import Evidence, gather
from diffsal.auditing.findings import find
from diffsal.auditing.gallery import choose_gallery, draw_composites, draw_gallery, draw_kinds
from diffsal.auditing.parts import find_parts
from diffsal.auditing.progress import LOG, LOG_NAME, is_ours, log_file, logged
from diffsal.auditing.report import render_report
from diffsal.auditing.rows import COLUMNS, Measured, Row
from diffsal.auditing.settings import Settings
from diffsal.auditing.slow import CURVE_STEPS, mean_courses, mean_curves, occlusion_grid
from diffsal.auditing.stability import LEVELS, STEADY
from diffsal.auditing.summary import compare, summarize
from diffsal.data.index import Index
from diffsal.errors import DiffsalError
from diffsal.explaining.records import identity
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.files import replacing, scratch_folder, write_json
from diffsal.system.locks import sole_writer
from diffsal.system.spreadsheets import inert

_REFERENCE_ROWS = "per-image-reference.csv"
# In the order in which they are written:
_FILES = ("per-image.csv", _REFERENCE_ROWS, "audit.json", "report.html")


def audit(
    index: Index,
    loaded: LoadedModel,
    folder: Path,
    settings: Settings,
    reference: LoadedModel | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Audit a model and write ``per-image.csv``, ``audit.json`` and ``report.html``.

    The test split is audited if the index has one, else all of its images. Labels are taken as
    true. An image that cannot be read does not stop the rest. The files are written when everything
    is known, the report last; each appears whole or not at all. ``audit.log`` is there from the
    beginning, and tells how far it is.

    Args:
        index: read with the model's class names where these are known; else its own are taken to
            be in the order of the outputs.
        loaded: the model; it is moved to the settings' device; on a CPU its weights are laid out
            channels last where that changes no more than rounding.
        folder: made where it is not there.
        settings: see there.
        reference: a second model, measured on the same images and set beside the first.
        overwrite: replace files that are there already; an earlier audit's rows of a reference go
            where there is none now.

    Returns:
        The content of ``audit.json``.

    Raises:
        DiffsalError: no images, none that can be read, class names that do not fit a model's
            outputs or their order, a model that does not run on the images, files that are there
            already, another run that is writing to the folder.
    """
    _check_free(folder, overwrite)
    with sole_writer(folder), logged(log_file(folder)):
        LOG.info("audit of %s on %s by diffsal %s", loaded.path, index.source, __version__)
        document = _audit(index, loaded, folder, settings, reference, overwrite)
        LOG.info("written: %s", folder / "report.html")
    return document


def _audit(
    index: Index,
    loaded: LoadedModel,
    folder: Path,
    settings: Settings,
    reference: LoadedModel | None,
    overwrite: bool,
) -> dict[str, Any]:
    evidence = gather(index, loaded, settings, reference)
    gallery = choose_gallery(evidence.measured)
    document = _document(evidence, gallery)
    columns = {name: evidence.measured.column(name) for name in COLUMNS}
    with scratch_folder(folder) as scratch:
        pictures = (
            *draw_gallery(gallery, evidence, scratch),
            draw_composites(evidence),
            draw_kinds(evidence, scratch),
        )
        page = render_report(document, columns, *pictures)

    _write_rows(folder / "per-image.csv", evidence.measured.rows)
    if evidence.other is not None:
        _write_rows(folder / _REFERENCE_ROWS, evidence.other.rows)
    elif overwrite:
        (folder / _REFERENCE_ROWS).unlink(missing_ok=True)
    write_json(folder / "audit.json", document)
    with replacing(folder / "report.html") as path:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return document


def _check_free(folder: Path, overwrite: bool) -> None:
    there = [folder / name for name in _FILES if (folder / name).exists()]
    log = folder / LOG_NAME
    there += [log] if log.exists() and not is_ours(log) else []
    if there and not overwrite:
        raise DiffsalError(
            f"{there[0]} is there already: pass --overwrite, or name another folder with --out"
        )


def _document(evidence: Evidence, gallery: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``audit.json``."""
    index, measured, comparison = evidence.index, evidence.measured, None
    findings, left_out = find(evidence)
    if evidence.reference is not None and evidence.other is not None:
        tests = evidence.composites, evidence.other_composites
        comparison = {"model": identity(evidence.reference)} | compare(
            measured, evidence.other, tests
        )
    return {
        "format": "diffsal-audit",
        "format_version": 2,
        "diffsal_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": identity(evidence.loaded),
        "data": _data_facts(index, evidence.split, measured),
        "settings": _settings_facts(evidence.settings, measured),
        "summary": summarize(findings, measured, index, evidence.split),
        "findings": findings,
        "parts": find_parts(measured),
        "left_out": left_out,
        "reference": comparison,
        "curves": mean_curves(measured),
        "randomisation": mean_courses(measured),
        "sampling": measured.sampling,
        "composites": None if isinstance(evidence.composites, str) else evidence.composites.facts(),
        "clusters": None if isinstance(evidence.kinds, str) else evidence.kinds.facts(),
        "gallery": [
            {**group, "images": [measured.rows[image]["path"] for image in group["images"]]}
            for group in gallery
        ],
        "failed": measured.failed,
    }


def _data_facts(index: Index, split: str, measured: Measured) -> dict[str, Any]:
    return {
        "index": str(index.source),
        "split": split,
        "available": len(index.split("test") or index.samples),
        "audited": len(measured.rows),
        "failed": len(measured.failed),
        "classes": {
            name: sum(row["label"] == name for row in measured.rows) for name in measured.names
        },
        "outside": index.outside(measured.samples),
        "with_human_maps": int((~np.isnan(measured.column("marked"))).sum()),
    }


def _settings_facts(settings: Settings, measured: Measured) -> dict[str, Any]:
    return {
        **asdict(settings),
        "preprocessing": settings.preprocessing.to_dict(),
        "device": str(settings.device),
        "outputs": measured.outputs,
        "cells": list(measured.cells),
        "composites_per_image": PER_IMAGE,
        "occluders": list(dict.fromkeys(("mean", *settings.occluders))),
        "occlusion_grid": occlusion_grid(measured.cells),
        "curve_steps": CURVE_STEPS,
        "frame_width": measured.frame_width,
        "sensitivity_levels": LEVELS,
        "sensitivity_steady": STEADY,
    }


def _opened(path: Path) -> TextIO:
    """For a CSV; what is no UTF-8 in a file's name is written as an escape."""
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")


def _write_rows(path: Path, rows: list[Row]) -> None:
    with replacing(path) as scratch, _opened(scratch) as file:
        writer = csv.DictWriter(file, ["path", "label", "predicted", *COLUMNS], restval="")
        writer.writeheader()
        for row in rows:
            cells = {k: "" if v != v else inert(v) for k, v in row.items()}  # NaN is not itself
            writer.writerow(cells)
