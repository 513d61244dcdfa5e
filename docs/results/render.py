"""Writes docs/results.md and docs/results-by-seed.md from stored results and the pages' templates.

Every number on the two pages comes from a file here, which holds the tables of one run as
`diffsal protocol table --format json` prints them, with the commands that made them.

    python docs/results/render.py                               renews the pages
    python docs/results/render.py store NAME FOLDER "COMMAND"   keeps a finished protocol's tables
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffsal.protocol.formats import written
from diffsal.protocol.results import read_results
from diffsal.protocol.statistics import Estimate, Table
from diffsal.protocol.tables import make_tables
from diffsal.system.files import replacing, write_json

HERE = Path(__file__).parent
PAGES = {"results.md.jinja": "results.md", "results-by-seed.md.jinja": "results-by-seed.md"}
OTHERS = ("composites-digits", "schema")  # with a page, or a use, of their own


def stored() -> dict[str, Any]:
    """Name to content of every file of results."""
    paths = [path for path in sorted(HERE.glob("*.json")) if path.stem not in OTHERS]
    return {path.stem: json.loads(path.read_text("utf-8")) for path in paths}


def rendered(template: str, results: Mapping[str, Any]) -> str:
    """A page's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals |= {
        "results": results,
        "table": lambda name, table: markdown(tables(results[name])[table]),
        "number": lambda *where: number(results, *where),
    }
    return environment.get_template(template).render()


def tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """Name to table of one file."""
    found = {}
    for one in content["tables"]:
        rows = tuple(
            (name, tuple(cell and Estimate(**cell) for cell in cells.values()))
            for name, cells in one["rows"].items()
        )
        columns = tuple(next(iter(one["rows"].values())))
        head = (one[key] for key in ("name", "task", "title", "note"))
        found[one["name"]] = Table(*head, columns, rows)
    return found


def markdown(table: Table) -> str:
    """The table below its title."""
    return "#" + written([table], "markdown")


def number(results: Mapping[str, Any], name: str, table: str, row: str, column: str) -> str:
    """A cell as the table shows it."""
    found = tables(results[name])[table]
    cell = dict(zip(found.columns, dict(found.rows)[row], strict=True))[column]
    one = Table(table, "", "", "", (column,), (("", (cell,)),))
    return written([one], "markdown").splitlines()[4].strip("| ")


def store(name: str, folder: str, command: str) -> None:
    """Keep the tables of a folder of `diffsal protocol run`, as far as it has come."""
    found = read_results(folder)
    made = json.loads(written(make_tables(found.protocol, found.jobs, "margin", None), "json"))
    head = {"format": "diffsal-results", "format_version": 1, "command": command}
    write_json(HERE / f"{name}.json", head | {"tables": made})


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    if arguments:
        store(*arguments[1:])
    for template, page in PAGES.items():
        with replacing(HERE.parent / page) as scratch:
            scratch.write_text(rendered(template, stored()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
