"""Tables as text, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, TypeAlias

from diffsal.protocol.statistics import Cell, Table
from diffsal.protocol.tables import P_VALUE, P_VALUE_HOLM
from diffsal.system.spreadsheets import inert

Format: TypeAlias = Literal["text", "markdown", "latex", "csv", "json"]


def written(tables: Sequence[Table], form: Format) -> str:
    """The tables as one text, in one of :data:`FORMATS`.

    Example:
        >>> from diffsal.protocol.statistics import Estimate
        >>> row = ("contrast", (Estimate(0.7512, std=0.021), None))
        >>> table = Table("subsets", "tiles", "AUROC", "± over seeds.", ("a", "b"), (row,))
        >>> print(written([table], "text"))
        AUROC
        <BLANKLINE>
                              a  b
        contrast  0.751 ± 0.021  -
        <BLANKLINE>
        ± over seeds.
    """
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
    return "\n\n\n".join(map(_text, tables))


def _text(table: Table) -> str:
    grid = _grid(table)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in grid
    ]
    return "\n".join([table.title, "", *lines, "", table.note])


def _as_markdown(tables: Sequence[Table]) -> str:
    return "\n\n".join(map(_markdown, tables))


def _markdown(table: Table) -> str:
    header, *rows = (
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in _grid(table)
    )
    rule = "|---" * (len(table.columns) + 1) + "|"
    return "\n".join([f"### {table.title}", "", header, rule, *rows, "", table.note])


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
    return "\n\n".join(map(_latex, tables))


def _latex(table: Table) -> str:
    header, *rows = (" & ".join(map(_escaped, line)) + r" \\" for line in _grid(table))
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escaped(table.title)}. {_escaped(table.note)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        *(r"\toprule", header, r"\midrule", *rows, r"\bottomrule"),
        *(r"\end{tabular}", r"\end{table}"),
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
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
                    texts = map(inert, (table.name, table.task, name, column))
                    writer.writerow([*texts, *numbers])
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
