"""Damaged folders of results: `protocol table` prints its tables, or one line."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hostile.plans import CHANGES, JOBS, changed, places, write_results

from diffsal.cli.main import main
from diffsal.system.files import write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_results(tmp_path)
    return tmp_path


def table(folder: Path) -> Any:
    return CliRunner().invoke(main, ["protocol", "table", str(folder)])


def test_a_whole_folder_is_read(folder: Path) -> None:
    result = table(folder)
    assert result.exit_code == 0, result.output
    assert "composite skill, rectangles" in result.stdout


@pytest.mark.parametrize("file", ["protocol.json", *(str(job.file) for job in JOBS)])
def test_every_change_of_a_file_is_a_table_or_one_line(folder: Path, file: str) -> None:
    """A few places, each changed in two of many ways; `make hostile` has more."""
    whole = json.loads((folder / file).read_text("utf-8"))
    draw = random.Random(0)
    every = sorted(places(whole), key=len)
    chosen = every[:3] + draw.sample(every[3:], 3)
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
