"""`kill -9` at random moments: files stay whole, and the same command ends as if undisturbed."""

import random
import shutil
from pathlib import Path
from signal import SIGKILL
from time import perf_counter
from typing import Any

from hostile.runs import (
    COMMANDS,
    Fate,
    check_whole,
    contents,
    differing,
    make_data,
    run,
    scratch,
)
from hostile.tries import Tries


def kills(folder: Path, name: str, count: int, with_fooling: bool = False) -> Tries:
    """Kill a command ``count`` times, in new folders and among an earlier run's files.

    Every second kill comes just before a file is opened, renamed, removed or the like.
    """
    draw, data, whole = random.Random(name), folder / "data", folder / "whole"
    make_data(data, with_fooling)
    begun = perf_counter()
    undisturbed = run(COMMANDS[name].line(data, whole), whole)
    seconds = perf_counter() - begun
    assert undisturbed.code == 0, undisturbed.said
    for number in range(count):
        if number % 2:
            fate = Fate(seconds=draw.uniform(0.02, seconds))
        else:
            fate = Fate(event=draw.randint(1, undisturbed.events))

        def survives(number: int = number, fate: Fate = fate) -> None:
            out = folder / str(number)
            if number % 4 > 1 and name in ("explain", "audit", "fool"):  # they --overwrite
                shutil.copytree(whole, out)
            kill_and_go_on(name, data, out, fate, contents(whole))
            shutil.rmtree(out)

        yield f"kill {number} of {name}, {fate}", survives


def kill_and_go_on(
    name: str, data: Path, out: Path, fate: Fate, whole: dict[str, Any] | None
) -> None:
    """Kill a run, look at its folder, run the same command again, and look once more.

    Args:
        whole: what the folder must hold then; ``None``: whatever is whole.
    """
    line = COMMANDS[name].line(data, out)
    killed = run(line, out, fate)
    assert killed.code in (0, -SIGKILL), killed.said
    check_whole(out)
    again = run(line, out)
    assert again.code == 0, again.said
    check_whole(out)
    left = [*scratch(out), *killed.left, *again.left]
    assert not left, f"left behind: {left}"
    other = [] if whole is None else differing(out, whole)
    assert not other, f"not as if undisturbed: {other}"
