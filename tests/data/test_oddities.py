"""What is odd about data that can be read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.data.index import Sample
from diffsal.data.oddities import oddities
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import hold


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def saved(name: str, values: object, **options: object) -> Path:
        image = Image.fromarray(np.asarray(values))
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return saved


def plain(height: int = 8, width: int = 8) -> np.ndarray:
    values = np.zeros((height, width), np.uint8)
    values[: height // 2] = 255
    return values


def test_nothing_is_odd_about_plain_files(saved: Callable[..., Path]) -> None:
    image = saved("a.png", plain(48, 64))
    maps = [
        saved("same.png", plain(48, 64)),
        saved("grid.png", plain(5, 7)),  # as near as so few cells can be
        saved("empty.png", np.zeros((48, 64), np.uint8)),
    ]
    deep = saved("deep.png", plain(48, 64).astype(np.uint16) * 257)
    samples = [*(Sample(image, 0, map=one) for one in maps), Sample(deep, 0)]
    assert oddities(samples) == []
    assert oddities([]) == []


def test_12_bits_in_16(saved: Callable[..., Path]) -> None:
    dark = saved("dark.png", np.full((8, 8), 4095, np.uint16))
    samples = [Sample(dark, 0), Sample(saved("a.png", plain()), 0)]
    assert oddities(samples) == [
        "1 of 2 images looked at use 4096 of 65536 levels of grey and are nearly black (dark.png)"
    ]


def test_maps_of_another_shape(saved: Callable[..., Path]) -> None:
    image, squashed = saved("a.png", plain(48, 64)), saved("m.png", plain(32, 32))
    (told,) = oddities([Sample(image, 0, map=squashed)] * 2)
    assert told.startswith("2 of 2 human maps looked at have another aspect ratio")
    assert told.endswith("(m.png, …)")


def test_a_photograph_that_is_stored_on_its_side(saved: Callable[..., Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = saved("a.jpg", plain(48, 64), exif=exif)
    assert oddities([Sample(image, 0, map=saved("m.png", plain(64, 48)))]) == []
    assert oddities([Sample(image, 0, map=saved("n.png", plain(48, 64)))]) != []


@pytest.mark.parametrize("value", [255, 1])
def test_maps_that_mark_everything(saved: Callable[..., Path], value: int) -> None:
    image, full = saved("a.png", plain()), saved("m.png", np.full((8, 8), value, np.uint8))
    (told,) = oddities([Sample(image, 0, map=full)])
    assert "mark the whole image" in told


def test_of_many_some_are_looked_at_all_over(saved: Callable[..., Path]) -> None:
    image, full = saved("a.png", plain()), saved("m.png", np.full((8, 8), 9, np.uint8))
    good = saved("good.png", plain())
    samples = [Sample(image, 0, map=good if at < 500 else full) for at in range(1_000)]
    assert oddities(samples)[0].startswith("16 of 32 human maps looked at mark")


def test_unreadable_files_are_left_to_their_reader(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    assert oddities([Sample(tmp_path / "broken.png", 0, map=tmp_path / "gone.png")]) == []


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, Image.fromarray])
def test_maps_in_memory_are_looked_at_as_files_are(form: Callable[..., object]) -> None:
    image = plain(48, 64)[..., None].repeat(3, 2)
    maps = [plain(48, 64), plain(5, 7), np.zeros((48, 64), np.uint8)]
    odd = [plain(32, 32), np.full((48, 64), 255, np.uint8)]
    items = [(image, 0, None), *((image, 0, form(one)) for one in (*maps, *odd))]
    held = hold(items, classes=None, preprocessing=Preprocessing(size=(8, 8)))
    assert held.index.notes == (
        "1 of 5 human maps looked at have another aspect ratio than their images and are taken to "
        "span them whole (image 4)",
        "1 of 5 human maps looked at mark the whole image: they say nothing (image 5)",
    )
    tensors = [(torch.rand(3, 48, 64), 0, form(one)) for one in odd]
    assert len(hold(tensors, classes=None, preprocessing=None).index.notes) == 2
