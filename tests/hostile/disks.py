"""Disks without room, folders that may not be written to, and folders that are taken away."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostile.runs import (
    COMMANDS,
    Ended,
    Fate,
    check_whole,
    contents,
    differing,
    make_data,
    run,
    scratch,
)
from hostile.tries import Tries

SIZES = (0.02, 0.1, 0.3, 0.6, 0.9)
"""Of disks, as parts of what a run needs."""


@contextmanager
def disk(place: Path, size: int) -> Iterator[bool]:
    """A disk of some bytes at an empty folder; yields whether this process may mount one."""
    place.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)
        place.rmdir() if mounted else shutil.rmtree(place)


def _mount(*words: str | Path) -> bool:
    try:
        return subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def full_disks(
    folder: Path, names: tuple[str, ...] = tuple(COMMANDS), sizes: tuple[float, ...] = SIZES
) -> Tries:
    """Every command on disks of several sizes, and over an earlier run where nothing more fits.

    Where mounting is not allowed, files larger than this do not fit.
    """
    data = folder / "data"
    make_data(data)
    for name in names:
        whole = folder / f"{name}, whole"
        assert run(COMMANDS[name].line(data, whole), whole).code == 0
        for size in sizes:
            yield (
                f"{name}, {size} of the room",
                lambda name=name, size=size, whole=whole: _full(name, data, folder, whole, size),
            )
        yield (
            f"{name}, no room beside an earlier run",
            lambda name=name, whole=whole: _full_of_earlier(name, data, folder, whole),
        )


def _full(name: str, data: Path, folder: Path, whole: Path, part: float) -> None:
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
    with disk(folder / "disk", int(part * sum(sizes))) as mounted:
        out = folder / "disk" / "out"
        line = COMMANDS[name].line(data, out)
        ended = run(line, out, Fate(largest=None if mounted else int(part * max(sizes))))
        assert ended.code in (1, 3), f"exit status {ended.code}"
        check_told(ended, out)
        if mounted:
            assert _mount("-o", "remount,size=64m", folder / "disk")
        again = run(line, out)
        assert again.code == 0, again.said
        check_whole(out)
        assert not differing(out, contents(whole)), differing(out, contents(whole))


def _full_of_earlier(name: str, data: Path, folder: Path, whole: Path) -> None:
    with disk(folder / "disk", 64 << 20) as mounted:
        out = folder / "disk" / "out"
        shutil.copytree(whole, out)
        if mounted:
            used = shutil.disk_usage(folder / "disk").used
            assert _mount("-o", f"remount,size={used}", folder / "disk")
        ended = run(COMMANDS[name].line(data, out), out, Fate(largest=None if mounted else 100))
        if name in ("explain", "audit", "fool"):  # others have nothing to do
            assert ended.code in (1, 3), f"exit status {ended.code}"
        check_told(ended, out)
        assert not differing(out, contents(whole)), differing(out, contents(whole))


def check_told(ended: Ended, out: Path) -> None:
    """See that a run ended in an error of a line, or well, and that no broken file is there."""
    assert "Traceback" not in ended.said, ended.said[-500:]
    assert ended.code in (0, 1, 3), f"exit status {ended.code}: {ended.said}"
    told = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
    assert (ended.code == 0) != bool(told), ended.said
    check_whole(out)
    assert not scratch(out) + ended.left, f"left behind: {scratch(out) + ended.left}"


def read_only_folders(folder: Path, names: tuple[str, ...] = tuple(COMMANDS)) -> Tries:
    """Every command on a disk that is mounted to be read, in a new folder, and an earlier run's.

    There are none where mounting is not allowed.
    """
    data = folder / "data"
    make_data(data)
    for name in names:

        def refused(name: str = name, is_new: bool = True) -> None:
            with disk(folder / "disk", 64 << 20):
                out = folder / "disk" / "out"
                assert is_new or run(COMMANDS[name].line(data, out), out).code == 0
                before = contents(out)
                assert _mount("-o", "remount,ro", folder / "disk")
                ended = run(COMMANDS[name].line(data, out), out)
                assert ended.code == 1, f"exit status {ended.code}: {ended.said}"
                check_told(ended, out)
                assert ended.said.count("\n") == 1, ended.said
                assert not differing(out, before)

        with disk(folder / "disk", 1 << 20) as mounted:
            pass
        if mounted:
            yield f"{name}, new folder", refused
            yield f"{name}, earlier run", lambda name=name, act=refused: act(name, False)


def removed_folders(folder: Path, count: int, names: tuple[str, ...] = tuple(COMMANDS)) -> Tries:
    """Every command, ``count`` times, its folder removed while it runs."""
    draw, data = random.Random(0), folder / "data"
    make_data(data)
    for name in names:
        out = folder / "out"
        events = run(COMMANDS[name].line(data, out), out).events
        shutil.rmtree(out)
        for _ in range(count):
            fate = Fate(event=draw.randint(1, events), is_bereft=True)

            def told(name: str = name, fate: Fate = fate, out: Path = out) -> None:
                ended = run(COMMANDS[name].line(data, out), out, fate)
                try:
                    check_told(ended, out)
                finally:
                    shutil.rmtree(out, ignore_errors=True)

            yield f"{name}, event {fate.event}", told
