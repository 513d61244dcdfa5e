"""Shared folders, full disks, killed runs, and cells that a spreadsheet would run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training.samples import TINY

from diffsal.data.index import Index, read_index
from diffsal.fooling.attack import FINE_TUNING, fool
from diffsal.models.checkpoints import load_model
from diffsal.training.run import train

QUICK = replace(TINY, epochs=3, batch_size=8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 noisy images, bright at the top or at the bottom, each with a human map."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = ["path,label,map,split"]
    for number in range(16):
        bright = np.zeros((32, 32), np.uint8)
        bright[slice(16) if number % 2 else slice(16, None)] = 255
        noise = generator.integers(0, 160, (32, 32), np.uint8)
        Image.fromarray(noise + bright // 4).save(folder / f"{number}.png")
        Image.fromarray(bright).save(folder / f"map{number}.png")
        split = "train" if number < 8 else "val" if number < 12 else "test"
        label = "top" if number % 2 else "bottom"
        lines.append(f"{number}.png,{label},map{number}.png,{split}")
    (folder / "index.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def index(folder: Path) -> Index:
    return read_index(folder / "index.csv")


def stop_after(epochs: int, index: Index, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle, between two epochs."""

    def broken(*arguments: object) -> bool:
        nonlocal epochs
        epochs -= 1
        if epochs < 0:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr("diffsal.training.run.is_best", broken)
        with pytest.raises(KeyboardInterrupt):
            train(index, out, QUICK)


def test_equal_runs_leave_equal_bytes_resumed_or_not(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again, resumed = (tmp_path / name for name in ("whole", "a/gain", "resumed"))
    train(index, whole, QUICK)
    train(index, again, QUICK)
    stop_after(2, index, resumed, monkeypatch)
    assert len((resumed / "log.jsonl").read_text().splitlines()) == 2
    train(index, resumed, QUICK, resume=True)
    for name in ("best.pt", "last.pt"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    lines = (resumed / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] > 0 for line in lines] == [True] * 3


def test_equal_attacks_leave_equal_bytes(index: Index, tmp_path: Path) -> None:
    honest = load_model(train(index, tmp_path / "run", replace(QUICK, epochs=1)))
    config = replace(FINE_TUNING, epochs=1, device="cpu")
    for name in ("a.pt", "b.pt"):
        fool(index, honest, tmp_path / name, config=config)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
