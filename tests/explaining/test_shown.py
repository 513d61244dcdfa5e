"""Maps as figures and in notebooks, from Python."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.figures import figure_pixels, save_figure
from diffsal.explaining.overlays import SIGNED
from diffsal.explaining.records import draft
from diffsal.explaining.shown import as_html, as_png
from diffsal.maps.salience import explain

ASSUMED = "Assumed: the model saw the whole image, resized (see preprocessing)."


@pytest.fixture
def model():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), *head).eval()


@pytest.fixture
def maps(model):
    return explain(model, torch.rand(3, 3, 12, 16), [0, 1, 2])


def drawn(figure):
    """The figure as it is saved, (H, W, 3)."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def test_a_figure_is_the_one_of_the_command(maps, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    names, preprocessing = ["a", "b", "c"], Preprocessing(size=(12, 16), resize="crop")
    figure = maps.figure(image, sample=1, classes=names, preprocessing=preprocessing, title="x.png")
    told = draft(Path("x.png"), "", image, (60, 80), maps[1], names, preprocessing)
    save_figure(tmp_path / "x.png", told.explanation)
    np.testing.assert_array_equal(drawn(figure), np.asarray(Image.open(tmp_path / "x.png")))


def test_images_of_every_form_give_the_same_figure(maps, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    first = drawn(maps.figure(pixels, title="a.png"))
    for image in (Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(drawn(maps.figure(image, title="a.png")), first)
    np.testing.assert_array_equal(drawn(maps.figure(tmp_path / "a.png")), first)  # its name
    assert not np.array_equal(drawn(maps.figure(pixels, -1, title="a.png")), first)


def test_what_is_assumed_of_the_image_is_said(maps):
    pixels, whole = np.zeros((60, 80, 3), np.uint8), Preprocessing(size=(12, 16))
    names = ["a", "b", "c"]
    for given, said in ((whole, []), (None, [ASSUMED])):
        told = draft(Path("x"), "", pixels, (60, 80), maps[0], names, whole, said)
        figure = maps.figure(pixels, classes=names, preprocessing=given, title="x")
        np.testing.assert_array_equal(drawn(figure), figure_pixels(told.explanation))


def test_without_an_image_maps_stand_on_white(maps):
    page = drawn(maps.figure())
    assert (page == 255).all(2).mean() > 0.3
    assert len(np.unique(page.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ("image", "how", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), {}, "array of float32 and shape .* is no image"),
        (torch.rand(3, 4, 4), {}, "a Tensor is no image: pass a path"),
        ("missing.png", {}, "missing.png"),
        (None, {"sample": 3}, "sample 3 is not among the 3"),
        (None, {"classes": ["a"]}, "1 class names for a model of 3"),
    ],
)
def test_what_cannot_be_shown_is_one_line(maps, refused, image, how, message):
    with refused(message):
        maps.figure(image, **how)


def test_volumes_and_maps_that_are_not_finite_have_no_figure(maps, refused):
    broken = maps[1]
    broken.true[0, 0, 0] = torch.nan
    with refused("not finite"):
        broken.figure()
    head = nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    volume = explain(nn.Sequential(nn.Conv3d(1, 4, 3), *head), torch.rand(1, 1, 5, 5, 5))
    with refused("volumes have no figure"):
        volume.figure()
    assert "a volume" in volume._repr_html_()


def test_repr_is_one_line(maps):
    told = repr(maps)
    assert told.startswith("SalienceMaps(3 × 5 × 7 cells, margins ")
    assert "\n" not in told
    low, high = (float(one) for one in re.findall(r"[+-][\d.]+", told))
    assert low == pytest.approx(maps.margin.min().item(), rel=1e-2)
    assert high == pytest.approx(maps.margin.max().item(), rel=1e-2)
    assert "margins" not in repr(maps[:0])


def test_a_notebook_shows_numbers_and_signs(maps):
    page = as_html(maps)
    for number in [*maps.margin, *maps.residual]:
        cells = re.findall(r"<td>([+-][\d.]+)</td>", page)
        assert min(abs(float(cell) - float(number)) for cell in cells) <= 0.005
    assert page.count("<img") == 3
    data = re.findall(r"base64,([^\"]+)", page)[0]
    cells = np.asarray(Image.open(BytesIO(b64decode(data))))
    for row, column in ((0, 0), (4, 6)):  # of 5 × 7 cells, on 69 × 96 pixels
        value = maps.difference[0, row, column] / maps.difference[0].abs().max()
        colour = np.array(SIGNED(float(value + 1) / 2)[:3]) * 255
        at = cells[int((row + 0.5) * 69 / 5), int((column + 0.5) * 96 / 7)]
        np.testing.assert_allclose(at, colour, atol=3)


def test_a_strip_of_many_is_short(model):
    many = explain(model, torch.rand(11, 3, 12, 16))
    strip = Image.open(BytesIO(as_png(many)))
    assert strip.height == 96
    assert strip.width == 8 * 96 + 7 * 8
    assert "and 3 more" in as_html(many)
