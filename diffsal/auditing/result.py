"""A finished audit: its numbers and words, a table of the images, and the files to keep."""

import csv
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from diffsal import __version__
from diffsal.auditing.composites import PER_IMAGE
from diffsal.auditing.evidence import Evidence
from diffsal.auditing.findings import find
from diffsal.auditing.gallery import (
    choose_gallery,
    draw_composites,
    draw_gallery,
    draw_kinds,
    explained,
    picture_rows,
)
from diffsal.auditing.log import LOG_NAME, is_ours
from diffsal.auditing.parts import find_parts
from diffsal.auditing.report import render_report
from diffsal.auditing.rows import COLUMNS, Measured, Number, Row
from diffsal.auditing.settings import Settings
from diffsal.auditing.slow import CURVE_STEPS, mean_courses, mean_curves, occlusion_grid
from diffsal.auditing.stability import LEVELS, STEADY
from diffsal.auditing.summary import compare, summarize
from diffsal.data.index import Index
from diffsal.errors import DiffsalError
from diffsal.explaining.figures import figure_pixels
from diffsal.explaining.matplotlib_figures import as_figure
from diffsal.explaining.records import identity
from diffsal.explaining.sheets import sheet
from diffsal.system.files import replacing, write_json
from diffsal.system.spreadsheets import inert

_REFERENCE_ROWS = "per-image-reference.csv"
# In the order in which they are written:
_FILES = ("per-image.csv", _REFERENCE_ROWS, "audit.json", "report.html")


@dataclass(frozen=True)
class Audit:
    """What an audit found; :func:`diffsal.audit` gives one.

    Attributes:
        evidence: what was measured.
    """

    evidence: Evidence

    @cached_property
    def document(self) -> dict[str, Any]:
        """The content of ``audit.json``, see ``docs/audit.md``."""
        return _document(self.evidence, self._gallery)

    @property
    def summary(self) -> list[str]:
        """What was found, a sentence each; what the composite test found is first."""
        return list(self.document["summary"])

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Each with ``id``, ``title``, ``numbers`` and words on what it shows and does not."""
        return list(self.document["findings"])

    @property
    def numbers(self) -> dict[str, Number]:
        """Name to mean, interval and count, such as ``composite_skill``; those by class are in
        ``findings``."""
        every = (one for finding in self.findings for one in finding["numbers"])
        return {one["name"]: one for one in every if "class" not in one}

    @property
    def table(self) -> Any:
        """A row of numbers for each image: a pandas data frame, or a list where there is none."""
        rows = self.evidence.measured.rows
        if find_spec("pandas") is None:
            return rows
        from pandas import DataFrame

        return DataFrame(rows)

    def figure(self, name: str) -> Any:
        """A matplotlib figure of what the report shows, or of one image.

        Args:
            name: ``composites``, ``kinds`` (of evidence), or ``typical``, ``common-mode``,
                ``unfaithful`` and ``wrong``, the groups of images; or an image, as in the column
                ``path``, of whose label it is what `diffsal explain` would draw.

        Raises:
            DiffsalError: no such figure, and no such image was audited; a figure of which there is
                nothing to show.
        """
        rows = picture_rows(name, self._gallery, self.evidence)
        if rows is not None:
            return sheet(rows)
        for sample in self.evidence.measured.samples:
            if str(sample.path) == name:
                names = self.evidence.measured.names
                told = self.evidence.loaded, self.evidence.settings, sample.label, names
                return as_figure(figure_pixels(explained(sample, *told)))
        known = ", ".join(["composites", "kinds", *(group["id"] for group in self._gallery)])
        raise DiffsalError(
            f"{name}: no such image was audited (see the table's column path), and no figure is "
            f"called so; there are: {known}"
        )

    def page(self) -> str:
        """``report.html``, which stands alone."""
        columns = {name: self.evidence.measured.column(name) for name in COLUMNS}
        return render_report(
            self.document,
            columns,
            *draw_gallery(self._gallery, self.evidence),
            draw_composites(self.evidence),
            draw_kinds(self.evidence),
        )

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write ``per-image.csv``, ``audit.json`` and ``report.html``; the report comes last.

        Args:
            folder: made where it is not there.
            overwrite: replace files that are there already; an earlier audit's rows of a reference
                go where there is none now.

        Raises:
            DiffsalError: files that are there already, a folder that cannot be written to.
        """
        folder = Path(folder)
        check_free(folder, overwrite)
        page = self.page()
        _write_rows(folder / "per-image.csv", self.evidence.measured.rows)
        if self.evidence.other is not None:
            _write_rows(folder / _REFERENCE_ROWS, self.evidence.other.rows)
        elif overwrite:
            (folder / _REFERENCE_ROWS).unlink(missing_ok=True)
        write_json(folder / "audit.json", self.document)
        with replacing(folder / "report.html") as path:
            path.write_text(page, encoding="utf-8", errors="backslashreplace")

    @cached_property
    def _gallery(self) -> list[dict[str, Any]]:
        return choose_gallery(self.evidence.measured)

    def __repr__(self) -> str:
        return "\n".join(["Audit", *(f"- {sentence}" for sentence in self.summary)])

    def _repr_html_(self) -> str:
        return "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in self.summary) + "</ul>"


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder where an audit lies that would be replaced.

    Raises:
        DiffsalError: there is one; not with ``overwrite``.

    Example:
        >>> check_free(Path("where/nothing/is"), overwrite=False)
    """
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
    told = {one.name: getattr(settings, one.name) for one in fields(settings)}
    del told["source"], told["share"]  # which no number depends on
    return {
        **told,
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
