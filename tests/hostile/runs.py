"""The five commands that write, on tiny data; each run is forked from a process that imported all.

What is imported anew for every run takes seconds, a run tenths of one."""

import csv
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile.samples import write_index
from PIL import Image
from tqdm import tqdm
from training.samples import TINY, write_config

from diffsal.cli.main import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "matplotlib.pyplot", "pytorch_grad_cam", "scipy.stats"),
        *("diffsal.auditing.run", "diffsal.explaining.explanations", "diffsal.fooling.run"),
        *("diffsal.protocol.jobs", "diffsal.protocol.results", "diffsal.training.run"),
        *("hostile.runs", "PIL.PngImagePlugin"),
    ]
)
GRID = """
seeds = 1
[training]
architecture = "torchvision:DenseNet"
arguments = { growth_rate = 4, block_config = [1, 1], num_init_features = 8 }
weights = "none"
size = 32
epochs = 1
batch_size = 8
[tasks.bars]
index = "index.csv"
leave_out = false
[methods.cross-entropy]
[methods.contrast]
"""
FOOLING = """
[fooling]
epochs = 1
batch_size = 8
"""
_VOLATILE = ("seconds", "created")
_STAMP = re.compile(rb"20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\+00:00)?")


@dataclass(frozen=True)
class Command:
    """What is run.

    Attributes:
        words: the command line before ``--out``, from the folder of the data.
        is_file: whether ``--out`` is a file.
    """

    words: Callable[[Path], list[str]]
    is_file: bool = False

    def line(self, data: Path, out: Path) -> list[str]:
        """The command line that writes into the folder ``out``."""
        place = out / "fooled.pt" if self.is_file else out
        return [*self.words(data), "--out", str(place)]


def _with_model(*words: str) -> Callable[[Path], list[str]]:
    def made(data: Path) -> list[str]:
        told = [str(data / word) if word.endswith((".csv", ".png")) else word for word in words]
        return [*told, "--model", str(data / "model.pt"), "--device", "cpu", "--overwrite"]

    return made


COMMANDS = {
    "train": Command(
        lambda data: [
            *("train", str(data / "index.csv"), "--config", str(data / "train.toml"), "--resume")
        ]
    ),
    "protocol run": Command(
        lambda data: ["protocol", "run", str(data / "grid.toml"), "--device", "cpu"]
    ),
    "explain": Command(_with_model("explain", "12.png", "13.png", "--save-maps", "--overlays")),
    "audit": Command(_with_model("audit", "index.csv", "--limit", "2")),
    "fool": Command(_with_model("fool", "index.csv", "--epochs", "1"), is_file=True),
}


def make_data(data: Path, with_fooling: bool = False) -> None:
    """16 images of 32 x 32 pixels with human maps, configurations, a trained model."""
    data.mkdir()
    write_index(data)
    (data / "grid.toml").write_text(GRID + FOOLING * with_fooling)
    write_config(data / "train.toml", replace(TINY, epochs=2, batch_size=8))
    assert run(COMMANDS["train"].line(data, data / "run"), data / "run").code == 0
    shutil.move(data / "run/best.pt", data / "model.pt")


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: its exit status, negative where a signal ended it.
        said: what it wrote to stderr.
        printed: what it wrote to stdout.
        events: how often it was about to do something to files in its folder.
        left: what it left in the folder for temporary files.
    """

    code: int
    said: str
    printed: str
    events: int
    left: list[str]


@dataclass(frozen=True)
class Fate:
    """What befalls a run.

    Attributes:
        seconds: after which it is killed.
        event: the event of files before which it is killed.
        is_bereft: at that event its folder is removed instead.
        largest: bytes of a file; larger ones do not fit on the disk.
        threads: of torch.
    """

    seconds: float | None = None
    event: int | None = None
    is_bereft: bool = False
    largest: int | None = None
    threads: int = 1


def run(words: list[str], out: Path, fate: Fate = Fate()) -> Ended:
    """Run a command that writes to ``out``."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "tmp").mkdir()
        child = FORKS.Process(target=_child, args=(words, out, fate, place))
        child.start()
        child.join(fate.seconds)
        child.kill()
        child.join()
        assert child.exitcode is not None
        texts = [_text(place / file) for file in ("stderr", "stdout", "events")]
        left = sorted(path.name for path in (place / "tmp").iterdir())
        return Ended(child.exitcode, texts[0], texts[1], int(texts[2] or 0), left)


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _child(words: list[str], out: Path, fate: Fate, place: Path) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(one, "w", closefd=False) for one in (1, 2))
    tempfile.tempdir = str(place / "tmp")
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a run by itself
    tqdm.set_lock(threading.RLock())  # or the semaphores of killed runs are told of at the end
    torch.set_num_threads(fate.threads)
    if fate.largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fate.largest, fate.largest))
    watch = _Watch(out, fate)
    sys.addaudithook(watch)
    try:
        main(words)
    finally:
        watch.is_over = True
        if fate.largest is None:
            (place / "events").write_text(str(watch.events))
        sys.stdout.flush()
        sys.stderr.flush()


class _Watch:
    """Counts what happens to files in a folder, and strikes at one moment."""

    def __init__(self, out: Path, fate: Fate) -> None:
        self.out, self.fate = str(out), fate
        self.events, self.is_over = 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_over or not event.startswith(("open", "os.", "shutil.", "tempfile.")):
            return
        paths = [str(one) for one in arguments[:2] if isinstance(one, str | os.PathLike)]
        if not any(path.startswith(self.out) for path in paths):
            return
        self.events += 1
        if self.events == self.fate.event and self.fate.is_bereft:
            self.is_over = True
            shutil.rmtree(self.out, ignore_errors=True)
        elif self.events == self.fate.event:
            os.kill(os.getpid(), signal.SIGKILL)


def check_whole(out: Path) -> None:
    """See that every file of ``out`` that has a name of its own can be read to its end."""
    for path in sorted(out.rglob("*")):
        if not path.is_file() or is_scratch(path):
            continue
        try:
            _READ[path.suffix](path)
        except Exception as error:
            size = path.stat().st_size
            raise AssertionError(f"{path.name} ({size} bytes) is not whole: {error}") from error


def is_scratch(path: Path) -> bool:
    """Whether a file is one on the way to another, or a lock."""
    return path.name.startswith(".") or path.name == "lock"


def scratch(out: Path) -> list[str]:
    """What no ended run may leave: the protocol's lock of its cache is there to stay."""
    return [path.name for path in out.rglob("*") if is_scratch(path) and path.name != "lock"]


def _page(path: Path) -> bytes:
    page = path.read_bytes()
    assert page.rstrip().endswith(b"</html>")
    return page


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    return rows


_READ: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()],
    ".png": lambda path: Image.open(path).load(),
    ".npz": lambda path: {name: array.sum() for name, array in np.load(path).items()},
    ".npy": lambda path: np.load(path).sum(),
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".csv": _rows,
    ".html": _page,
    ".log": lambda path: path.read_text("utf-8"),
}


def contents(out: Path) -> dict[str, Any]:
    """What a run is for, by file: bytes, without times of day and seconds."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or is_scratch(path) or path.suffix == ".log":
            continue
        if path.suffix in (".json", ".jsonl"):
            texts = path.read_text("utf-8")
            lines = texts.splitlines() if path.suffix == ".jsonl" else [texts]
            found[name] = [steady(json.loads(line)) for line in lines]
        else:
            found[name] = _STAMP.sub(b"", path.read_bytes())
    return found


def steady(value: Any) -> Any:
    """Without times of day and seconds."""
    if isinstance(value, dict):
        return {key: steady(one) for key, one in value.items() if key not in _VOLATILE}
    return [steady(one) for one in value] if isinstance(value, list) else value


def differing(out: Path, reference: dict[str, Any]) -> list[str]:
    """The files in which a run's folder is not as it should be."""
    found = contents(out)
    return [name for name in {**found, **reference} if found.get(name) != reference.get(name)]
