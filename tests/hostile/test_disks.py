"""No room, no right to write, no folder: each once; ``make hostile`` tries every command."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hostile.attacks import attack
from hostile.disks import check_told, full_disks, read_only_folders, removed_folders
from hostile.runs import COMMANDS, Fate, make_data, run
from hostile.tries import Tries

ONE_EACH: dict[str, Callable[[Path], Tries]] = {
    "full": partial(full_disks, names=("fool",), sizes=(0.3,)),
    "read-only": partial(read_only_folders, names=("fool",)),
    "removed": partial(removed_folders, names=("protocol run",), count=2),
}


@pytest.mark.parametrize("kind", ONE_EACH)
def test_what_cannot_be_written_is_a_line(kind: str, tmp_path: Path) -> None:
    assert attack(kind, ONE_EACH[kind](tmp_path)).failures == []


def test_a_folder_that_is_removed_before_it_is_looked_at_is_no_traceback(tmp_path: Path) -> None:
    """At the event of which it is listed for scratch files."""
    make_data(tmp_path / "data")
    out = tmp_path / "run"
    ended = run(COMMANDS["train"].line(tmp_path / "data", out), out, Fate(event=3, is_bereft=True))
    check_told(ended, out)
