"""The pages of results are those of the stored data, and the data are of their schema."""

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA = json.loads((DOCS / "results/schema.json").read_text("utf-8"))
FILES = [path for path in sorted((DOCS / "results").glob("*.json")) if path.stem != "schema"]


@pytest.fixture(scope="module")
def render() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "results/render.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_results_are_of_the_schema(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    jsonschema.validate(content, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"format_version": 0}, SCHEMA)


def test_pages_are_those_of_the_data(render: dict[str, Any]) -> None:
    for template, page in render["PAGES"].items():
        text = render["rendered"](template, render["stored"]())
        assert (DOCS / page).read_text("utf-8") == text, "run python docs/results/render.py"


def test_another_number_is_another_page(render: dict[str, Any]) -> None:
    results = copy.deepcopy(render["stored"]())
    (table,) = (one for one in results["digits-methods"]["tables"] if one["name"] == "differences")
    table["rows"]["difference"]["mean"] |= {"value": 0.25, "low": 0.125, "high": 0.375}
    text = render["rendered"]("results.md.jinja", results)
    assert text.count("+0.250 (+0.125 to +0.375)") == 2  # in the table, and in a sentence


def test_every_stored_file_is_on_a_page(render: dict[str, Any]) -> None:
    templates = [(DOCS / "results" / name).read_text("utf-8") for name in render["PAGES"]]
    for name in render["stored"]():
        assert any(f'"{name}"' in text for text in templates), name
