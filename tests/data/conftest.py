"""What the tests of data share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Writes an image of random pixels, and its folder, and gives its path."""

    def write_image(path: Path, size: tuple[int, int] = (10, 12)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write_image


@pytest.fixture
def folder(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    """A folder of three images and three maps."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "images" / name)
        write_image(tmp_path / "maps" / name)
    return tmp_path
