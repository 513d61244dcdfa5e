"""Damaged folders of results: `protocol table` prints its tables, or one line."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from diffsal.cli.main import main
from diffsal.protocol.configuration import Job, hash_of
from diffsal.protocol.job_files import COLUMNS, FURTHER
from diffsal.protocol.scores import FOOLING
from diffsal.system.files import write_json

PLAN = {
    "seeds": [0],
    "tasks": {"tiles": {"subsets": ["crack"]}},
    "methods": {"contrast": {}, "baseline": {}},
    FOOLING: {},
}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)
MODELS = ("honest", "fine-tuned", "passively fooled", "head-shifted", "adaptively fooled")


def content(job: Job) -> dict[str, Any]:
    """What a job of four samples leaves."""
    samples = {"path": list("abcd"), "label": [0, 1, 0, 1], "subset": ["", "crack", "", "crack"]}
    logits = [[1.0, 0.0], [0.0, 2.0], [0.5, 0.25], [0.0, 1.5]]
    measured: dict[str, Any] = {
        "logits": logits,
        **{name: [0.5, None, 0.25, 1] for name in COLUMNS},
    }
    about = {"hash": hash_of(PLAN), "format_version": 2, **vars(job), "samples": samples}
    if job.method != FOOLING:
        return about | {"models": {job.method: measured}}
    maps = [[[0.0, 1.0], [2.0, -1.0]]]
    measured |= {name: [0.5, 0.25, None, 0.1] for name in FURTHER}
    measured["maps"] = dict.fromkeys(("true", "false", "difference"), maps)
    measured["composite_skill"] = {"rectangles": 0.5, "marked": None}
    models = dict.fromkeys((*MODELS, "knows composites"), measured)
    about |= {"classes": ["intact", "worn"]}
    return about | {"models": models, "pictured": [1], "pictures": [PIXEL]}


JOBS = [
    Job("tiles", FOOLING, "", 0),
    *(Job("tiles", method, "crack", 0) for method in ("contrast", "baseline")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "protocol.json", {"hash": hash_of(PLAN), "protocol": PLAN})
    for job in JOBS:
        write_json(tmp_path / job.file, content(job))
    return tmp_path


def table(folder: Path) -> Any:
    return CliRunner().invoke(main, ["protocol", "table", str(folder)])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON types."""
    if path:
        yield path
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(value))
    within = copy
    for key in path[:-1]:
        within = within[key]
    change(within, path[-1])
    return copy


def test_a_whole_folder_is_read(folder: Path) -> None:
    result = table(folder)
    assert result.exit_code == 0, result.output
    assert "composite skill, rectangles" in result.stdout


CHANGES: list[Callable[[Any, Any], None]] = [
    lambda within, key: within.pop(key),
    *(
        lambda within, key, value=value: within.__setitem__(key, value)
        for value in (None, "x", [], {}, [[]], -1, 10**400, 0.5, True, {"a": [1]})
    ),
]


@pytest.mark.parametrize("file", ["protocol.json", *(str(job.file) for job in JOBS)])
def test_every_change_of_a_file_is_a_table_or_one_line(folder: Path, file: str) -> None:
    """All places of the upper levels, some of the others, each changed in two of many ways."""
    whole = json.loads((folder / file).read_text("utf-8"))
    draw = random.Random(0)
    every = sorted(places(whole), key=len)
    chosen = every[:12] + draw.sample(every[12:], min(12, len(every) - 12))
    for path in chosen:
        for change in draw.sample(CHANGES, 2):
            write_json(folder / file, changed(whole, path, change))
            shutil.rmtree(folder / "plots", ignore_errors=True)
            result = table(folder)
            assert result.exit_code in (0, 1), (path, result.exception)
            if result.exit_code:
                assert result.stderr.count("\n") == 1, (path, result.stderr)
                assert result.stderr.startswith("Error: "), (path, result.stderr)
            assert result.exception is None or isinstance(result.exception, SystemExit), path


@pytest.mark.parametrize("text", ["", "[" * 10**5, "{", "\x00", "[]", "null", "NaN"])
def test_what_is_no_json_is_one_line(folder: Path, text: str) -> None:
    for file in ("protocol.json", str(JOBS[1].file)):
        before = (folder / file).read_text("utf-8")
        (folder / file).write_text(text, "utf-8")
        result = table(folder)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        (folder / file).write_text(before, "utf-8")
