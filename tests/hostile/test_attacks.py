"""Many hostile files: each loads, or is refused in one line. ``--slow`` tries six times as many."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.attacks import attack
from hostile.report import BEGIN, END, FILES, QUICK, WHOLE, renewed

from diffsal.errors import DiffsalError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_a_sixth_of_the_tries(kind: str, tmp_path: Path) -> None:
    assert attack(kind, FILES[kind](tmp_path, QUICK)).failures == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_all_tries(kind: str, tmp_path: Path) -> None:
    row = attack(kind, FILES[kind](tmp_path, WHOLE))
    assert row.failures == []
    assert row.worst_mb < 1_000


def test_attacks_can_fail() -> None:
    def raises(error: Exception) -> Callable[[], object]:
        def run() -> None:
            raise error

        return run

    tries = [("a", raises(KeyError("x"))), ("b", raises(DiffsalError("y"))), ("c", list)]
    row = attack("all", tries)
    assert (row.tries, row.refused, row.failures) == (3, 1, ["a: KeyError: 'x'"])


def test_a_row_takes_the_place_of_its_own_kind_alone() -> None:
    table = "| attack | tries |\n|---|---|---|---|---|\n| index files | 3 | old |\n| gone | 1 |"
    row = {"kind": "index files", "tries": 9, "failures": 1, "worst_seconds": 0.25, "worst_mb": 12}
    page = renewed(f"a\n{BEGIN}{table}{END}\nb", row)
    page = renewed(page, {"kind": "kill -9 of fool", "died": -9})
    assert page.splitlines()[2:-2] == [
        "| attack | tries |",
        "|---|---|---|---|---|",
        "| index files | 9 | 1 | 0.25 s | 12 MB |",
        "| kill -9 of fool | died | 1 | | |",
    ]
