"""Tables as text, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import itertools
import json

import numpy as np
import pytest

from diffsal.protocol.formats import FORMATS, written
from diffsal.protocol.statistics import (
    Estimate,
)
from diffsal.protocol.tables import Table, make_tables

METHODS = ("cross-entropy", "baseline", "contrast", "contrast-alpha-0.5")
SUBSETS = ("a", "b", "c")
SEEDS = (0, 1, 2, 3, 5)
MEASURES = (
    *("pointing_true", "pointing_difference", "energy_true", "energy_difference"),
    *("marked_share", "common_mode_share"),
)
FOOLED = ("honest", "passively fooled", "head-shifted", "adaptively fooled")
EDGES = ("edges_true", "edges_difference", "occlusion_true", "occlusion_difference")


def columns(generator, count, names):
    return {
        name: [
            None if generator.random() < 0.2 else float(generator.random()) for _ in range(count)
        ]
        for name in names
    }


def job(method, subset, seed, count=24, logits=2):
    generator = np.random.default_rng([METHODS.index(method), SUBSETS.index(subset), seed])
    labels = [position % 2 for position in range(count)]
    scores = (
        generator.normal(size=(count, logits)) + np.array(labels)[:, None] * [-0.3, 0.8][-logits:]
    )
    return {
        "task": "t",
        "method": method,
        "subset": subset,
        "seed": seed,
        "samples": {
            "path": [f"{position}.png" for position in range(count)],
            "label": labels,
            "subset": [subset if label else "" for label in labels],
        },
        "models": {method: {"logits": scores.tolist(), **columns(generator, count, MEASURES)}},
    }


def fooling_job(seed, count=20):
    generator = np.random.default_rng([99, seed])
    return {
        "task": "t",
        "method": "fooling",
        "subset": "",
        "seed": seed,
        "samples": {"label": [position % 2 for position in range(count)], "subset": [""] * count},
        "models": {
            name: {
                "logits": generator.normal(size=(count, 2)).tolist(),
                **columns(generator, count, (*EDGES, "common_mode_share")),
            }
            for name in FOOLED
        },
    }


@pytest.fixture(scope="module")
def jobs():
    grid = itertools.product(METHODS, SUBSETS, SEEDS)
    return [job(*one) for one in grid] + [fooling_job(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def protocol():
    return {
        "methods": {name: {} for name in METHODS},
        "tasks": {"t": {"subsets": list(SUBSETS)}},
        "seeds": list(SEEDS),
    }


@pytest.fixture(scope="module")
def tables(protocol, jobs):
    return {table.name: table for table in make_tables(protocol, jobs)}


def cells(table):
    return {
        (name, column): cell
        for name, row in table.rows
        for column, cell in zip(table.columns, row, strict=True)
    }


def test_csv_and_json_lose_no_digit(tables):
    given = list(tables.values())
    rows = list(csv.DictReader(io.StringIO(written(given, "csv"))))
    known = {
        (table.name, *place): cell
        for table in given
        for place, cell in cells(table).items()
        if cell is not None
    }
    assert len(rows) == len(known)
    for row in rows:
        cell = known[row["table"], row["row"], row["column"]]
        assert float(row["value"]) == cell.value
        assert row["std"] == ("" if cell.std is None else str(cell.std))
    for table in json.loads(written(given, "json")):
        for name, row in table["rows"].items():
            for column, cell in row.items():
                if cell is not None:
                    assert Estimate(**cell) == known[table["name"], name, column]


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_formats_for_people_round_and_name_their_spread(tables, form):
    text = written(list(tables.values()), form)
    cell = cells(tables["subsets"])["contrast", "a"]
    sign = r"$\pm$" if form == "latex" else "±"
    assert f"{cell.value:.3f} {sign} {cell.std:.3f}" in text
    difference = cells(tables["differences"])["contrast", "mean"]
    interval = f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    assert interval in text
    for table in tables.values():
        assert table.note.replace("±", sign).replace("→", r"$\to$" if form == "latex" else "→") in (
            text.replace(r"\%", "%")
        )


def test_names_do_not_break_a_format():
    odd = Table("seeds", "a|b", "a_b & c", "100 %", ("x|y_z",), (("m_1|2", (Estimate(0.5),)),))
    latex = written([odd], "latex")
    assert r"a\_b \& c" in latex
    assert r"x|y\_z" in latex
    assert r"x\|y_z" in written([odd], "markdown")
    assert next(csv.DictReader(io.StringIO(written([odd], "csv"))))["task"] == "a|b"
    assert set(FORMATS) == {"text", "markdown", "latex", "csv", "json"}
