"""Killed runs: a few of each command; ``make hostile`` kills each fifty times."""

from pathlib import Path
from signal import SIGKILL

import pytest
from hostile.kills import kill_and_go_on
from hostile.runs import COMMANDS, Fate, check_whole, contents, make_data, run, scratch

# Before which event of files a run is killed.
MOMENTS = {"train": (18, 33), "protocol run": (16, 47), "fool": (8,), "explain": (40,)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("runs") / "data"
    make_data(data)
    return data


def test_killed_runs_leave_whole_files_and_go_on(data: Path, tmp_path: Path) -> None:
    for name, moments in MOMENTS.items():
        whole = tmp_path / f"{name}, undisturbed"
        assert run(COMMANDS[name].line(data, whole), whole).code == 0
        for moment in moments:
            out, fate = tmp_path / f"{name} {moment}", Fate(event=moment)
            kill_and_go_on(name, data, out, fate, contents(whole))


def test_a_killed_audit_leaves_nothing_elsewhere(data: Path, tmp_path: Path) -> None:
    """Killed while its pictures are drawn, of which there are many files."""
    kill_and_go_on("audit", data, tmp_path / "audit", Fate(event=300), None)


def test_workers_of_a_killed_run_do_not_hold_its_lock(data: Path, tmp_path: Path) -> None:
    """They live on for some seconds."""
    out = tmp_path / "run"
    words = [*COMMANDS["train"].line(data, out), "--workers", "2"]
    assert run(words, out, Fate(event=30)).code == -SIGKILL
    assert any(name.endswith(".lock") for name in scratch(out))
    again = run(words, out)
    assert again.code == 0, again.said


def test_what_is_not_whole_is_seen(tmp_path: Path) -> None:
    for name in ("a.json", "a.png", "a.npz", "a.pt", "a.html", "a.npy"):
        (tmp_path / name).write_bytes(b"{")
        with pytest.raises(AssertionError, match=f"{name} .1 bytes. is not whole"):
            check_whole(tmp_path)
        (tmp_path / name).unlink()
