"""The page of benchmarks is that of the stored rows, and these are of their schema."""

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCHEMA = json.loads((BENCHMARKS / "results/schema.json").read_text("utf-8"))
FILES = [path for path in sorted((BENCHMARKS / "results").glob("*.json")) if path.stem != "schema"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__("all")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_rows_are_of_the_schema(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    jsonschema.validate(content, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"format_version": 0}, SCHEMA)


def test_the_page_is_that_of_the_rows(script: Any) -> None:
    page = (BENCHMARKS.parent / "docs/benchmarks.md").read_text("utf-8")
    assert page == script.page(script.stored()), "run python benchmarks/all.py page"


def test_another_number_is_another_page(script: Any) -> None:
    results = script.stored()
    one = next(one for one in results["cpu"]["rows"] if one["group"] == "host")
    one |= {"median": 0.125, "low": 0.0625, "high": 0.25}
    assert "0.125 (0.06 to 0.25)" in script.page(results)


def test_medians_and_quartiles_of_turns(script: Any) -> None:
    from timing import in_turns, ratios, row

    clock = iter(range(1000))
    called: list[str] = []
    contestants = {"one": lambda: called.append("one"), "two": lambda: called.append("two")}
    seconds = in_turns(contestants, 3, clock=lambda: float(next(clock)))
    assert called == ["one", "two", "two", "one", "one", "two", "two", "one"]
    assert seconds == {"one": [1, 1, 1], "two": [1, 1, 1]}
    (told,) = ratios("maps", {"batch": 1}, {"base": [1, 2, 4], "other": [2, 2, 12]})
    assert (told["median"], told["against"], told["milliseconds"]) == (2, "base", 2000)
    values = row("host", "maps", {}, [5, 1, 2, 3, 4], "ms")
    assert (values["low"], values["median"], values["high"]) == (2, 3, 4)
