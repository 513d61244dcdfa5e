"""The same command again, and with another number of threads."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile.runs import COMMANDS, Fate, contents, differing, make_data, run
from hostile.tries import Tries

WITHIN = 1e-6
"""By how much numbers may differ with the threads, as a part of the largest of their kind."""


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


def threads(folder: Path) -> Tries:
    """Maps and numbers of explanations at 224 pixels with 1 to 4 threads of torch."""
    data, one = folder / "data", folder / "1"
    make_data(data)
    line = [*COMMANDS["explain"].words(data), "--size", "224", "--out"]
    assert run([*line, str(one)], one).code == 0
    for count in (1, 2, 3, 4):

        def near(count: int = count) -> None:
            out = folder / f"{count} threads"
            assert run([*line, str(out)], out, Fate(threads=count)).code == 0
            for path in one.glob("*.npz"):
                _compare(dict(np.load(path)), dict(np.load(out / path.name)))
            first, second = (
                json.loads((place / "manifest.json").read_text("utf-8")) for place in (one, out)
            )
            _compare(dict(_numbers(first)), dict(_numbers(second)))
            shutil.rmtree(out)

        yield f"{count} threads", near


def _compare(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        largest = np.nanmax(np.abs(values))
        apart = np.nanmax(np.abs(values - second[name]))
        assert apart <= WITHIN * largest, f"{name}: {apart} apart, the largest is {largest}"


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in pairs:
        if isinstance(one, dict | list):
            yield from _numbers(one, f"{name}.{key}")
        elif isinstance(one, float):
            yield f"{name}.{key}", one
