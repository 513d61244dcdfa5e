"""CSV and JSON lose nothing, and the formats for people say what they round."""

import csv
import io
import json

import pytest

from diffsal.protocol.formats import FORMATS, written
from diffsal.protocol.statistics import Estimate, Table


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


def test_small_numbers_keep_their_digits():
    table = Table("fooling", "t", "", "", ("change",), (("x", (Estimate(3e-7, 1e-7),)),))
    assert "3.0e-07 ± 1.0e-07" in written([table], "text")
