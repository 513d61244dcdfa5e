"""Processes that share work get all of it in order, or stop."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from diffsal.system.processes import ApartError, check_alike, in_turns, process_group

Beside = Callable[..., AbstractContextManager[Any]]
CPU = torch.device("cpu")


def test_pieces_come_in_the_order_of_the_work(beside: Beside) -> None:
    def other() -> None:
        with process_group(CPU) as is_first:
            assert not is_first
            assert in_turns(["b"], 2, "letters") == ["a", "b", "c"]
            assert in_turns([], 2, "letters") == ["a"]
            check_alike((1, "a"), 2, "letter")

    with beside(other) as process, process_group(CPU) as is_first:
        assert is_first
        assert in_turns(["a", "c"], 2, "letters") == ["a", "b", "c"]
        assert in_turns(["a"], 2, "letters") == ["a"]
        check_alike((1, "a"), 2, "letter")
    assert process.exitcode == 0


def test_other_work_and_other_values_are_told(beside: Beside) -> None:
    def apart(work: str) -> None:
        with process_group(CPU):
            with pytest.raises(ApartError, match="at different work, letters and numbers: give"):
                in_turns([1], 2, work)
            with pytest.raises(ApartError, match="the processes differ in the number of images"):
                check_alike(work, 2, "number of images")

    with beside(lambda: apart("numbers")) as process:
        apart("letters")
    assert process.exitcode == 0


def test_who_is_left_says_that_another_ended(beside: Beside) -> None:
    def die() -> None:
        with process_group(CPU):
            in_turns([1], 2, "numbers")
            os._exit(3)

    with beside(die) as process, process_group(CPU):
        in_turns([2], 2, "numbers")
        with pytest.raises(ApartError, match="another process ended during ROAD: see what it said"):
            in_turns([2], 2, "ROAD")
    assert process.exitcode == 3
