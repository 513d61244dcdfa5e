"""`train --resume` beside a last.pt that is no run's, or another's: one line, and it stays."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.samples import TINY

from diffsal.data.index import Index
from diffsal.training.run import train

QUICK = replace(TINY, epochs=1, batch_size=8)
Refused = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def run(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(index, out, QUICK)
    return out


def other(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], Any]:
    def changed(whole: dict[str, Any]) -> Any:
        change(whole)
        return whole

    return changed


FOREIGN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda whole: [whole],
    "a tensor": lambda _: torch.zeros(3),
    "a number": lambda _: 3,
    "nothing": lambda _: None,
    "a state alone": lambda whole: whole["state_dict"],
    "no run": other(lambda whole: whole.pop("run")),
    "a run that is a list": other(lambda whole: whole.update(run=[1])),
    "a run of tensors": other(lambda whole: whole["run"].update(epochs=torch.zeros(3))),
    "another run": other(lambda whole: whole["run"].update(epochs=7)),
    "no training": other(lambda whole: whole.pop("training")),
    "training of nothing": other(lambda whole: whole.update(training={})),
    "no optimizer": other(lambda whole: whole["training"].update(optimizer=None)),
    "another optimizer": other(
        lambda whole: whole["training"]["optimizer"].update(param_groups=[])
    ),
    "history of a number": other(lambda whole: whole["training"].update(history=3)),
    "history of words": other(lambda whole: whole["training"].update(history=["best"])),
    "no weights": other(lambda whole: whole.pop("state_dict")),
    "weights of words": other(lambda whole: whole.update(state_dict={"a": "b"})),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_checkpoint_is_one_line(
    foreign: str, run: Path, index: Index, tmp_path: Path, refused: Refused
) -> None:
    whole = torch.load(run / "last.pt", weights_only=True)
    torch.save(FOREIGN[foreign](whole), tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with refused("last.pt"):
        train(index, tmp_path, replace(QUICK, epochs=1), resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04.", bytes(999)])
def test_no_checkpoint_at_all_is_one_line(
    content: bytes, index: Index, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with refused("last.pt: is damaged and cannot be resumed; remove it to begin anew"):
        train(index, tmp_path, QUICK, resume=True)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    run: Path, index: Index, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To remove it, as is advised for damaged ones, would lose the run."""

    def open_regular(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("diffsal.training.run.open_regular", open_regular)
    with refused(r"last.pt: cannot be read \(Permission denied\); allow it, or choose another"):
        train(index, run, QUICK, resume=True)


def test_numbers_that_are_equal_are_the_same_setting(index: Index, tmp_path: Path) -> None:
    """A TOML file says 1, the command line makes 1.0 of it."""
    train(index, tmp_path, replace(QUICK, momentum=0))
    train(index, tmp_path, replace(QUICK, momentum=0.0), resume=True)
