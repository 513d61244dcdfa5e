"""Tables as text, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, TypeAlias

from diffsal.protocol.scores import P_VALUE, P_VALUE_HOLM
from diffsal.protocol.statistics import Cell
from diffsal.protocol.tables import Table

Format: TypeAlias = Literal["text", "markdown", "latex", "csv", "json"]


def written(tables: Sequence[Table], form: Format) -> str:
    """The tables as one text, in one of :data:`FORMATS`."""
    return FORMATS[form](tables)


def _cell(cell: Cell, signed: bool) -> str:
    """A number for people: what it is, then how far it spreads."""
    if cell is None:
        return "-"

    def one(value: float) -> str:
        form = ".1e" if 0 < abs(value) < 5e-4 else ".3f"
        return f"{value:{'+' if signed else ''}{form}}"

    if cell.std is not None:
        return f"{one(cell.value)} ± {one(cell.std)}"
    if cell.low is not None and cell.high is not None:
        return f"{one(cell.value)} ({one(cell.low)} to {one(cell.high)})"
    return one(cell.value)


def _grid(table: Table) -> list[list[str]]:
    """Header and rows as text. Differences carry their sign; p-values do not."""
    lines = [["", *table.columns]]
    for name, cells in table.rows:
        texts = [
            _cell(cell, "differences" in table.name and column not in (P_VALUE, P_VALUE_HOLM))
            for column, cell in zip(table.columns, cells, strict=True)
        ]
        lines.append([name, *texts])
    return lines


def _as_text(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        grid = _grid(table)
        widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
        lines = [
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in grid
        ]
        parts.append("\n".join([table.title, "", *lines, "", table.note]))
    return "\n\n\n".join(parts)


def _as_markdown(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        header, *rows = (
            "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
            for line in _grid(table)
        )
        rule = "|---" * (len(table.columns) + 1) + "|"
        parts.append("\n".join([f"### {table.title}", "", header, rule, *rows, "", table.note]))
    return "\n\n".join(parts)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
}


def _as_latex(tables: Sequence[Table]) -> str:
    """Tables for the package booktabs."""
    parts = []
    for table in tables:
        header, *rows = (
            " & ".join(_latex(text) for text in line) + r" \\" for line in _grid(table)
        )
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_latex(table.title)}. {_latex(table.note)}}}",
                    rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
                    r"\toprule",
                    header,
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _as_csv(tables: Sequence[Table]) -> str:
    """One line a number, with all its digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "task", "row", "column", "value", "std", "low", "high", "count"])
    for table in tables:
        for name, cells in table.rows:
            for column, cell in zip(table.columns, cells, strict=True):
                if cell is not None:
                    numbers = ("" if one is None else one for one in asdict(cell).values())
                    writer.writerow([table.name, table.task, name, column, *numbers])
    return buffer.getvalue().rstrip("\n")


def _as_json(tables: Sequence[Table]) -> str:
    content = [
        {
            "name": table.name,
            "task": table.task,
            "title": table.title,
            "note": table.note,
            "rows": {
                name: {
                    column: cell and asdict(cell)
                    for column, cell in zip(table.columns, cells, strict=True)
                }
                for name, cells in table.rows
            },
        }
        for table in tables
    ]
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


FORMATS = {
    "text": _as_text,
    "markdown": _as_markdown,
    "latex": _as_latex,
    "csv": _as_csv,
    "json": _as_json,
}
"""Name to what writes tables so. Text, Markdown and LaTeX round; CSV and JSON do not."""
