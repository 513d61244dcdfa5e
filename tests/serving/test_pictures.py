import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import as_shown
from diffsal.explaining.overlays import own_layer
from diffsal.serving.pictures import as_uri, for_screen, layer_over, seen_box

NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_an_address_holds_the_picture() -> None:
    smooth = for_screen(NOISE)
    assert np.abs(decoded(as_uri(smooth)).astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("shape", [(5, 7), (1, 4_000), (3_000, 2_000)])
def test_all_are_of_one_size_on_the_screen(shape) -> None:
    height, width = for_screen(np.zeros((*shape, 3), np.uint8)).shape[:2]
    assert max(height, width) == 640
    assert min(height, width) == max(1, round(640 * min(shape) / max(shape)))


def test_a_layer_is_the_projects_own() -> None:
    layer = own_layer(np.float32([[0, 1], [2, 4]]))
    image = for_screen(NOISE)
    shown = layer_over(image, layer)
    assert np.abs(decoded(shown["picture"]).astype(int) - layer.over(image)).mean() < 3
    assert (shown["low"], shown["high"]) == (0, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_input_shows_the_image_that_it_was_made_of(channels) -> None:
    made = Preprocessing(size=(12, 20), channels=channels)
    shown = as_shown(made(NOISE), made)
    grey = np.asarray(Image.fromarray(NOISE).convert("L"))[..., None].repeat(3, axis=-1)
    assert np.array_equal(shown, NOISE if channels == 3 else grey)


def test_what_is_out_of_range_is_clipped() -> None:
    assert as_shown(torch.full((3, 1, 1), 99.0), Preprocessing()).max() == 255


def test_a_crop_is_seen_in_its_place() -> None:
    left, top, width, height = seen_box(Preprocessing(size=(100, 100), resize="crop"), (300, 900))
    share = 100 / 114  # of the resized side, as torchvision rounds it
    assert (width * 900, height * 300) == pytest.approx((300 * share, 300 * share), abs=3)
    assert (left + width / 2, top + height / 2) == pytest.approx((0.5, 0.5), abs=0.01)


def test_all_of_an_image_that_is_squashed_is_seen() -> None:
    assert seen_box(Preprocessing(), (300, 900)) == [0, 0, 1, 1]
