"""Images, maps and their names: no regular files, large ones, and names that are no text."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffsal.cli.main import main
from diffsal.data.datasets import DecodedImages
from diffsal.data.images import read_image, read_map
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.explaining.explanations import Settings, explain_images
from diffsal.explaining.one_image import Outputs, Prepared, Wanted, prepare
from diffsal.explaining.overlays import SIGNED, Layer, resized
from diffsal.models.checkpoints import load_model
from diffsal.system.files import check_writable

Refused = Callable[[str], AbstractContextManager[None]]
SETTINGS = Settings(Preprocessing(size=(32, 32)), torch.device("cpu"))


def png(path: Path | bytes, width: int = 6, height: int = 4) -> None:
    with open(path, "wb") as file:
        Image.new("RGB", (width, height), "red").save(file, "PNG")


def test_what_has_no_end_is_refused_at_once(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        for read in (read_image, read_map):
            with refused("is a pipe, device or socket"):
                read(path)


def test_names_that_are_no_text_or_too_long(tmp_path: Path, own_file: Callable[..., Path]) -> None:
    """They lost the manifest after all the work was done."""
    names = [b"b\xffd.png", "é".encode() * 120 + b".png", b"l" * 250 + b".png"]
    (tmp_path / "images").mkdir()
    for name in names:
        png(os.fsencode(tmp_path / "images") + b"/" + name)
    command = ["explain", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--size", "32"]
    command += ["--overlays", "--save-resized-maps", "--model", str(own_file())]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))["images"]
    assert {os.fsencode(Path(record["path"]).name) for record in records} == set(names)
    assert all((tmp_path / "out" / file).exists() for one in records for file in one["files"])


def test_a_folder_of_an_impossible_name(refused: Refused) -> None:
    for name in ("x" * 300, "a\0b"):
        with refused("name another --out"):
            check_writable(Path(name))


def test_thousands_of_images_of_one_stem(tmp_path: Path, own_file: Callable[..., Path]) -> None:
    """That is quadratic no longer; all are refused here, once they have names."""
    images = [Path(f"folder-{number}/image.png") for number in range(4_000)]
    manifest = explain_images(images, load_model(own_file()), tmp_path / "out", SETTINGS)
    assert manifest["failed"] == 4_000


def test_a_large_image_is_held_at_the_size_of_its_figure(
    tmp_path: Path, own_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(
        "diffsal.explaining.one_image.save_figure", lambda _path, one: shown.append(one)
    )
    png(tmp_path / "large.png", 6_000, 3_000)
    explain_images([tmp_path / "large.png"], load_model(own_file()), tmp_path / "out", SETTINGS)
    assert shown[0].size == (3_000, 6_000)
    for pixels in (shown[0].image, shown[0].true, shown[0].false, shown[0].difference):
        assert pixels.shape[:2] == (800, 1_600)


def test_a_large_image_still_has_overlays_and_maps_of_its_own_size(
    tmp_path: Path, own_file: Callable[..., Path]
) -> None:
    png(tmp_path / "large.png", 2_000, 1_000)
    settings = Settings(
        **{**vars(SETTINGS), "outputs": Outputs(False, overlays=True, resized_maps=True)}
    )
    explain_images([tmp_path / "large.png"], load_model(own_file()), tmp_path / "out", settings)
    assert Image.open(tmp_path / "out/large.true.png").size == (2_000, 1_000)
    with np.load(tmp_path / "out/large.npz") as maps:
        assert maps["difference_normalized"].shape == (1_000, 2_000)


def test_colours_in_bands_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 40, 3), np.uint8)
    values = np.random.default_rng(1).normal(size=(7, 9)).astype(np.float32)
    for raw in (values, resized(values, 40, 70)):
        layer = Layer(raw, -2, 2, SIGNED)
        whole = layer.over(image)
        with monkeypatch.context() as patch:
            patch.setattr("diffsal.explaining.overlays._BAND", 300)
            bands = layer.over(image)
        assert np.abs(whole.astype(int) - bands).max() <= 1  # rounding


def test_a_full_disk_is_told_before_anything_is_mapped(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int, _start: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    png(tmp_path / "a.png")
    with refused("no room for 0 MB of decoded images .*No space left"):
        DecodedImages([Sample(tmp_path / "a.png", 0)], SETTINGS.preprocessing, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("field", [{"mean": (123.0, 117.0, 104.0)}, {"std": (58.0, 57.0, 57.0)}])
def test_means_of_pixels_to_255(field: dict[str, Any], refused: Refused) -> None:
    with refused("divide by 255"):
        Preprocessing(**field)


@pytest.mark.parametrize("value", ["9" * 5_000, "0x8", "²"])
def test_sizes_that_are_no_numbers(value: str) -> None:
    result = CliRunner().invoke(main, ["explain", "a.png", "--model", "a.pt", "--size", value])
    assert result.exit_code == 2
    assert "Invalid value for '--size'" in result.output


def test_classes_that_are_no_numbers(tmp_path: Path, own_file: Callable[..., Path]) -> None:
    png(tmp_path / "a.png")
    settings = Settings(**{**vars(SETTINGS), "true": "9" * 5_000})
    with pytest.raises(DiffsalError, match="no class is called"):
        explain_images([tmp_path / "a.png"], load_model(own_file()), tmp_path / "out", settings)


def test_12_bits_in_16_are_noted(tmp_path: Path, own_file: Callable[..., Path]) -> None:
    for most in (4_095, 4_096):
        Image.fromarray(np.full((8, 8), most, np.uint16)).save(tmp_path / f"{most}.png")
    manifest = explain_images(
        [tmp_path / f"{most}.png" for most in (4_095, 4_096)],
        load_model(own_file()),
        tmp_path / "out",
        SETTINGS,
    )
    noted = [" ".join(record["caveats"]).count("nearly black") for record in manifest["images"]]
    assert noted == [1, 0]


def deflated(path: Path, beside: int = 0) -> bytes:
    """Writes a DICOM file with as many zeros beside its pixels; returns these."""
    examples = pytest.importorskip("pydicom.examples")
    dataset = examples.ct
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.add_new(0x00091010, "UN", bytes(beside))
    dataset.save_as(path)
    pixels: bytes = read_image(Path(examples.get_path("ct"))).tobytes()
    return pixels


def test_what_deflated_dicom_inflates_to_is_bounded(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.dcm"
    pixels = deflated(path)
    assert read_image(path).tobytes() == pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    assert read_image(path).tobytes() == pixels
    deflated(path, beside=3_000_000)
    assert path.stat().st_size < 200_000
    with refused("inflates to more than 3 MB"):
        read_image(path)
    path.write_bytes(path.read_bytes()[:2_000])
    with refused("cannot be decoded"):
        read_image(path)


@pytest.mark.parametrize("outputs", [Outputs(figure=False), Outputs()])
def test_no_more_of_an_image_is_held_than_is_drawn(tmp_path: Path, outputs: Outputs) -> None:
    png(tmp_path / "large.png", 6_000, 3_000)
    one = prepare(Wanted(tmp_path, Preprocessing(size=(64, 64)), outputs), tmp_path / "large.png")
    assert isinstance(one, Prepared)
    base = one.image if one.image.base is None else one.image.base
    assert getattr(base, "nbytes", 0) <= 1_600 * 800 * 3
    assert one.size == (3_000, 6_000)


def test_overlays_that_no_png_holds_are_an_error_of_that_image(
    tmp_path: Path, own_file: Callable[..., Path]
) -> None:
    png(tmp_path / "wide.png", 1_200_000, 1)
    png(tmp_path / "usual.png", 60, 40)
    settings = replace(SETTINGS, outputs=Outputs(figure=False, overlays=True))
    images = [tmp_path / "wide.png", tmp_path / "usual.png"]
    manifest = explain_images(images, load_model(own_file()), tmp_path / "out", settings)
    assert "1200000 × 1 pixels are too many" in manifest["images"][0]["error"]
    assert manifest["explained"] == 1
