"""Images with human maps, as files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsal.data.index import Index, read_index

# No batch normalisation, whose statistics are of each process's share; no dropout, whose random
# numbers are each process's own.
PLAIN_NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In all tests of training."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 noisy images, bright at the top or at the bottom; every other one with a human map."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = ["path,label,map"]
    for number in range(48):
        pixels = generator.integers(0, 160, (32, 32), np.uint8)
        half = np.zeros((32, 32), np.uint8)
        half[:16] = 255
        label = "bottom" if number % 3 else "top"
        bright = half[::-1] if number % 3 else half
        Image.fromarray(pixels + bright // 4).save(folder / f"{number}.png")
        Image.fromarray(bright).save(folder / f"map{number}.png")
        lines.append(f"{number}.png,{label},{f'map{number}.png' if number % 2 else ''}")
    (folder / "index.csv").write_text("\n".join(lines))
    (folder / "plain.py").write_text(PLAIN_NET)
    return folder


@pytest.fixture
def index(folder: Path) -> Index:
    return read_index(folder / "index.csv")
