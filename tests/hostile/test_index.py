"""Index files: those of spreadsheets are read, others are refused in one line."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from diffsal.data.index import read_index
from diffsal.training.config import read_toml

Refused = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def index(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an index beside images ``0.png`` to ``9.png``."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(b"")

    def index(text: str) -> Path:
        (tmp_path / "index.csv").write_text(text, encoding="utf-8")
        return tmp_path / "index.csv"

    return index


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_case_and_columns_of_spreadsheets(
    delimiter: str, index: Callable[[str], Path]
) -> None:
    lines = ["\ufeffPath,LABEL,Patient,Group", "0.png,x,Jo,1", "1.png,y,Al,2"]
    read = read_index(index("\n".join(lines).replace(",", delimiter)))
    assert [(one.path.name, one.label, one.group) for one in read.samples] == [
        ("0.png", 0, "1"),
        ("1.png", 1, "2"),
    ]
    assert [note.partition(": ")[2] for note in read.notes] == ["passed over the columns patient"]


@pytest.mark.parametrize("column", ["groups", "grop", "spilt", "maps", "subsets"])
def test_misspelt_columns_are_not_passed_over(
    column: str, index: Callable[[str], Path], refused: Refused
) -> None:
    with refused(f"'{column}' is misspelt"):
        read_index(index(f"path,label,{column}\n0.png,x,1\n1.png,y,2\n"))


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        (["0.png,x", "a.png,x", "b.png,y", "c.png,y"], r"line 3: .*a\.png.*\(2 further lines are"),
        (["0.png,x", "1.png", "2.png", "3.png,y"], r"line 3: has 1 .*\(1 further line is wrong"),
        (["0.png,x", "0.png,x", "1.png,y", "1.png,y"], r"line 3: .*\(1 further line is wrong\)"),
    ],
)
def test_further_lines_that_are_wrong_are_counted(
    lines: list[str], pattern: str, index: Callable[[str], Path], refused: Refused
) -> None:
    with refused(pattern):
        read_index(index("\n".join(["path,label", *lines])))


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "x/" * 5_000])
def test_impossible_paths(path: str, index: Callable[[str], Path], refused: Refused) -> None:
    with refused("line 2: there is no image"):
        read_index(index(f"path,label\n{path},x\n1.png,y\n"))
    with refused("line 2: there is no map"):
        read_index(index(f"path,label,map\n0.png,x,{path}\n1.png,y,\n"))


def test_labels_of_thousands_of_digits(index: Callable[[str], Path], refused: Refused) -> None:
    path = index(f"path,label\n0.png,{'9' * 5_000}\n1.png,{'8' * 5_000}\n")
    assert [len(name) for name in read_index(path).classes] == [5_000, 5_000]
    with refused("line 2: the class '999"):
        read_index(path, classes=("x", "y"))


def test_what_has_no_end_is_refused_at_once(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (read_index, read_toml):
            with refused("is a pipe, device or socket"):
                read(path)


def test_values_that_are_nested_too_deeply(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(f"a = {'[' * 100_000}{']' * 100_000}")
    with refused("is no TOML"):
        read_toml(path)
