"""From pixels to inputs as torchvision makes them, and from maps back to the image."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(224, 224), (256, 256), (300, 451), (451, 300), (37, 90)])
@pytest.mark.parametrize("side", [224, 64, 299])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_input_is_torchvisions_to_the_bit(shape, side, resize):
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size=(side, side), resize=resize)
    geometry = (
        [transforms.Resize((side, side))]
        if resize == "squash"
        else [transforms.Resize(round(side * 256 / 224)), transforms.CenterCrop(side)]
    )
    oracle = transforms.Compose(
        [
            *geometry,
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    ours = preprocessing(image)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, oracle(Image.fromarray(image)))


def test_size_is_height_and_width_and_image_is_left_alone():
    image = COLOUR.copy()
    for resize in ("squash", "crop"):
        assert Preprocessing(size=(20, 30), resize=resize)(image).shape == (3, 20, 30)
    assert np.array_equal(image, COLOUR)


def test_dict_round_trip_through_json():
    value = Preprocessing((64, 96), "crop", (0, 0.5, 1), (1.0, 2.0, 3.0))
    assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 224),
        ("size", [224]),
        ("size", [224, 0]),
        ("size", [224.0, 224]),
        ("size", [True, True]),
        ("size", None),
        ("resize", "stretch"),
        ("resize", ["crop"]),
        ("mean", [0, 0]),
        ("mean", ["0", "0", "0"]),
        ("mean", [0, 0, float("nan")]),
        ("std", [1, 1, 0]),
        ("std", [1, 1, float("inf")]),
        ("colour", 1),
    ],
)
def test_bad_field_is_named(field, value):
    with pytest.raises(DiffsalError, match=field):
        Preprocessing.from_dict({**Preprocessing().to_dict(), field: value})


@pytest.mark.parametrize("value", [None, [], {}, {"size": [224, 224]}])
def test_missing_fields_are_refused(value):
    with pytest.raises(DiffsalError, match="size, resize, mean, std"):
        Preprocessing.from_dict(value)


def test_grey_is_pillows_luminance():
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    grey = Preprocessing(size=(40, 30), mean=(0.5,), std=(0.25,), channels=1)
    expected = (np.asarray(Image.fromarray(image).convert("L"), np.float32) / 255 - 0.5) / 0.25
    assert torch.equal(grey(image), torch.from_numpy(expected)[None])
    assert Preprocessing.from_dict(grey.to_dict()) == grey
    assert grey.to_dict()["channels"] == 1
    assert "channels" not in Preprocessing().to_dict()


def test_means_fit_the_channels():
    assert Preprocessing(channels=1).mean == (0.449,)
    assert Preprocessing(mean=(0.5,)).mean == (0.5, 0.5, 0.5)
    with pytest.raises(DiffsalError, match="channels must be 3, or 1 for grey"):
        Preprocessing(channels=2)


def test_elongated_image_is_not_blown_up():
    strip = np.zeros((1, 400_000, 3), np.uint8)
    with pytest.raises(DiffsalError, match="--resize squash"):
        Preprocessing(resize="crop")(strip)
    assert Preprocessing()(strip).shape == (3, 224, 224)


def test_place_squashed_is_bilinear_interpolation():
    maps = torch.randn(2, 3, 7, 5)
    placed = Preprocessing().place(maps, (50, 41))
    expected = F.interpolate(maps, size=(50, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(placed, expected)


sides = st.integers(8, 70)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(size=st.tuples(sides, sides), original=st.tuples(sides, sides), crop=st.booleans())
def test_place_undoes_the_geometry(size, original, crop):
    """A picture of its own coordinates, brought in by torchvision, lands where it came from."""
    preprocessing = Preprocessing(size=size, resize="crop" if crop else "squash")
    whole, _ = preprocessing._geometry(*original)
    assert whole[0] >= size[0]
    assert whole[1] >= size[1]
    if crop:
        scales = [full / resized for full, resized in zip(original, whole, strict=True)]
        # Equal up to the whole pixels that torchvision cuts the longer side to.
        assert max(scales) / min(scales) <= 1 + 1 / min(whole)
    geometry = transforms.Compose([transforms.Resize(whole), transforms.CenterCrop(size)])
    centres = np.mgrid[: original[0], : original[1]].astype(np.float32) + 0.5
    seen = [np.array(geometry(Image.fromarray(axis))) for axis in centres]
    for ours, theirs in zip(map(preprocessing.resized, centres), seen, strict=True):
        assert np.array_equal(ours, theirs)

    placed = preprocessing.place(torch.from_numpy(np.stack(seen)), original).numpy()
    # Pixels of the network's input, at least of the original.
    pixels = [max(full / resized, 1) for full, resized in zip(original, whole, strict=True)]
    inside = np.ones(original, bool)
    outside = np.zeros(original, bool)
    for axis, (coordinate, pixel) in enumerate(zip(centres, pixels, strict=True)):
        line = seen[axis].mean(axis=1 - axis)
        # At the image's border the antialiasing filter shifts the centres inwards.
        inside &= (coordinate >= line[0] + pixel) & (coordinate <= line[-1] - pixel)
        outside |= (coordinate < line[0] - pixel) | (coordinate > line[-1] + pixel)
    for ours, coordinate, pixel in zip(placed, centres, pixels, strict=True):
        # Antialiasing at an odd scale moves a centre by a few hundredths, too.
        assert np.abs(ours - coordinate)[inside].max(initial=0) <= 0.1 * pixel
    if crop:
        assert np.isnan(placed[:, outside]).all()
    else:
        assert np.isfinite(placed).all()


def test_place_marks_exactly_what_the_crop_kept():
    """448 x 512 becomes 256 x 292; rows 16 to 240, columns 34 to 258 of that go in."""
    placed = Preprocessing(resize="crop").place(torch.ones(1, 7, 7), (448, 512))[0]
    kept = ~placed.isnan()
    rows, columns = kept.any(1).nonzero().flatten(), kept.any(0).nonzero().flatten()
    assert (rows[0], rows[-1]) == (28, 419)  # 16 and 240, times 448 / 256
    assert (columns[0], columns[-1]) == (60, 451)  # 34 and 258, times 512 / 292: 59.6 and 452.4
    assert torch.equal(placed[kept], torch.ones(int(kept.sum())))
