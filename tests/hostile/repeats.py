"""The same command again, and with another number of threads."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile.runs import COMMANDS, Fate, contents, differing, make_data, run, steady
from hostile.tries import Tries

WITHIN = {"explain": 1e-6, "audit": 1e-5}
"""By how much numbers may differ with the threads: a part of the largest of their kind. An audit's
are taken as 1 at least: what the head-shift changes is rounding itself."""


def repeats(folder: Path, names: tuple[str, ...] = tuple(COMMANDS)) -> Tries:
    """Every command three times in new folders: equal bytes, but for times of day and seconds."""
    data = folder / "data"
    make_data(data, with_fooling=True)
    for name in names:
        first = folder / f"{name} 0"
        assert run(COMMANDS[name].line(data, first), first).code == 0
        for number in (1, 2):

            def equal(name: str = name, number: int = number, first: Path = first) -> None:
                out = folder / f"{name} {number}"
                assert run(COMMANDS[name].line(data, out), out).code == 0
                assert not differing(out, contents(first)), differing(out, contents(first))

            yield f"{name}, again {number}", equal


def threads(folder: Path, names: tuple[str, ...] = tuple(WITHIN)) -> Tries:
    """Maps and numbers of explanations and audits at 224 pixels with 1 to 4 threads of torch."""
    data = folder / "data"
    make_data(data)
    for name in names:
        line = [*COMMANDS[name].words(data), "--size", "224", "--out"]
        first = folder / name
        assert run([*line, str(first)], first).code == 0
        for count in (1, 2, 3, 4):

            def near(
                name: str = name, count: int = count, line: list[str] = line, first: Path = first
            ) -> None:
                out = folder / f"{name} {count}"
                assert run([*line, str(out)], out, Fate(threads=count)).code == 0
                _compare(_told(first), _told(out), WITHIN[name], 1 if name == "audit" else 0)
                shutil.rmtree(out)

            yield f"{name}, {count} threads", near


def _told(out: Path) -> dict[str, Any]:
    """Every map and number of a folder by its name."""
    told: dict[str, Any] = {}
    for path in out.rglob("*"):
        if path.suffix == ".npz":
            told |= {f"{path.name} {name}": values for name, values in np.load(path).items()}
        elif path.suffix == ".json":
            told |= dict(_numbers(steady(json.loads(path.read_text("utf-8"))), path.name))
        elif path.suffix == ".csv":
            told |= {f"{path.name} {name}": values for name, values in _columns(path)}
    return told


def _columns(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0]:
        try:
            yield name, np.array([float(row[name] or "nan") for row in rows])
        except ValueError:  # words
            continue


def _compare(first: dict[str, Any], second: dict[str, Any], within: float, at_least: float) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert np.array_equal(np.isnan(values), np.isnan(second[name])), name
        if np.isnan(values).all():
            continue
        largest = max(np.nanmax(np.abs(values)), at_least)
        apart = np.nanmax(np.abs(values - second[name]))
        assert apart <= within * largest, f"{name}: {apart} apart, the largest is {largest}"


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in pairs:
        if isinstance(one, dict | list):
            yield from _numbers(one, f"{name}.{key}")
        elif isinstance(one, float):
            yield f"{name}.{key}", one
