"""Many hostile files: each loads, or is refused in one line. ``--slow`` tries six times as many."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.attacks import attack
from hostile.report import QUICK, ROWS, WHOLE

from diffsal.errors import DiffsalError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROWS)
def test_a_sixth_of_the_tries(kind: str, tmp_path: Path) -> None:
    assert attack(kind, ROWS[kind](tmp_path, QUICK)).failures == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROWS)
def test_all_tries(kind: str, tmp_path: Path) -> None:
    row = attack(kind, ROWS[kind](tmp_path, WHOLE))
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
