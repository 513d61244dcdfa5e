"""Processes that work beside the model."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from diffsal.explaining.workers import working

THREADS = "__import__('torch').get_num_threads()"
OPENCV = "__import__('cv2').getNumThreads()"
PRIORITY = "__import__('os').nice(0)"


@pytest.mark.skipif(not hasattr(os, "nice"), reason="no priorities here")
def test_workers_leave_the_cores_to_the_model() -> None:
    with working(1) as do:
        torch, opencv, priority = (do(eval, one) for one in (THREADS, OPENCV, PRIORITY))
        assert (torch(), opencv(), priority()) == (1, 1, min(19, os.nice(0) + 10))


def test_a_process_that_ends_is_told(
    refused: Callable[[str], AbstractContextManager[None]],
) -> None:
    with refused("a process that reads images and draws ended"), working(1) as do:
        do(eval, "__import__('os')._exit(1)")()


def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from diffsal.explaining.workers import working\n"
        "with working(1) as do:\n    do(abs, -1)()\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert 'outside of `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]


def test_what_lies_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "cv2", "statistics"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    with working(1) as do:
        assert do(eval, "__import__('matplotlib').__name__")() == "matplotlib"
