import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.serving.composing import Rectangle, composed, region_of
from diffsal.serving.explained import maps_of

INSIDE = Rectangle(1, 2, 5, 4)


@pytest.fixture
def pair(served, picture):
    one = served(3, ("a", "b", "c"))
    return one, picture(one, 0), picture(one, 1)


def test_margins_are_those_of_plain_loops(pair) -> None:
    one, receiver, donor = pair
    found = composed(one, receiver, donor, INSIDE, true=2, false=0)
    maps = maps_of(one, [receiver.tensor, donor.tensor], 2, 0)
    share = 8 / 64
    bias = [float(m - d.double().sum()) for m, d in zip(maps.margin, maps.difference, strict=True)]
    predicted = (1 - share) * bias[0] + share * bias[1]
    pixels = receiver.tensor.clone()
    for row in range(8):
        for column in range(8):
            pasted = 1 <= row < 5 and 2 <= column < 4
            predicted += float(maps.difference[int(pasted), row, column])
            if pasted:
                rows, columns = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
                pixels[:, rows, columns] = donor.tensor[:, rows, columns]
    with torch.no_grad():
        logits = one.model(torch.stack([receiver.tensor, donor.tensor, pixels]))
    own, other, actual = (logits[:, 2] - logits[:, 0]).tolist()
    assert found["predicted"] == pytest.approx(predicted, abs=1e-5)
    assert found["actual"] == pytest.approx(actual, abs=1e-5)
    assert found["uniform"] == pytest.approx((1 - share) * own + share * other, abs=1e-5)
    assert (found["receiver"], found["donor"]) == pytest.approx((own, other), abs=1e-5)
    assert (found["true_name"], found["false_name"], found["share"]) == ("c", "a", share)


def test_the_picture_has_the_donors_pixels_inside(pair) -> None:
    one, receiver, donor = pair
    found = composed(one, receiver, donor, Rectangle(0, 0, 8, 4))
    data = base64.b64decode(found["picture"].partition(",")[2])
    shown = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32)), np.float32) / 255
    mine, other = ((one_.tensor.permute(1, 2, 0).numpy() * 0.5 + 0.5) for one_ in (receiver, donor))
    from_mine, from_other = (np.abs(shown - one_).mean((0, 2)) for one_ in (mine, other))
    assert from_other[:14].mean() < 0.03 < from_mine[:14].mean()
    assert from_mine[18:].mean() < 0.03 < from_other[18:].mean()


def test_classes_are_the_receivers_where_none_are_named(pair) -> None:
    one, receiver, donor = pair
    own = maps_of(one, [receiver.tensor])
    found = composed(one, receiver, donor, INSIDE)
    assert found["true_name"] == "abc"[int(own.true_class)]
    assert found["false_name"] == "abc"[int(own.false_class)]


@pytest.mark.parametrize(
    "cells", [(0, 0, 0, 4), (2, 0, 1, 4), (0, 0, 9, 4), (-1, 0, 4, 4), (0, 3, 4, 3)]
)
def test_rectangles_off_the_grid_are_refused(cells, refused) -> None:
    with refused("does not lie on the map's 8 × 8 cells"):
        region_of(Rectangle(*cells), (8, 8))


def test_the_whole_image_is_refused(refused) -> None:
    with refused("the whole image"):
        region_of(Rectangle(0, 0, 8, 8), (8, 8))


def test_the_rest_is_refused(pair, refused) -> None:
    with refused("the same two classes"):
        composed(*pair, INSIDE, false="rest")
