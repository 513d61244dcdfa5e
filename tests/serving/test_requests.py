import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from diffsal.errors import DiffsalError
from diffsal.explaining.figures import figure_pixels
from diffsal.serving import requests
from diffsal.serving.explained import drafted, maps_of, read_picture
from diffsal.serving.requests import Desk, is_from_here


@pytest.fixture
def desk(served):
    return Desk(served(3, ("a", "b", "c")))


@pytest.fixture
def asked(desk, png):
    return {"image": desk.take(png(), "a.png")["image"]}


@pytest.mark.parametrize(
    ("further", "told"),
    [
        ({"true": "a"}, "'a' is no class"),
        ({"true": True}, "'True' is no class"),
        ({"true": 0.5}, "'0.5' is no class"),
        ({"true": "runner-up"}, "is no class"),
        ({"true": 3}, "3"),
        ({"false": -1}, "-1"),
        ({"false": 10**30}, "is no class"),
        ({"false": ["rest"]}, "is no class"),
        ({"true": 1, "false": 1}, "the false class is the true class"),
        ({"image": "guess"}, "drop it once more"),
        ({"image": None}, "drop it once more"),
    ],
)
def test_questions_that_make_no_sense_are_refused(desk, asked, refused, further, told) -> None:
    for answer in (desk.explain, desk.figure):
        with refused(told):
            answer(asked | further)


@pytest.mark.parametrize("strength", [None, "1", True, float("nan"), float("inf"), 2, -1, []])
def test_strengths_that_make_no_sense_are_refused(desk, asked, refused, strength) -> None:
    with refused("strength"):
        desk.lie(asked | {"strength": strength})


@pytest.mark.parametrize("cells", [None, [], [1, 2, 3], [0, 0, 1, 1.5], ["0", 0, 1, 1], [0] * 5])
def test_cells_that_make_no_sense_are_refused(desk, asked, refused, cells) -> None:
    with refused("four whole numbers"):
        desk.compose(asked | {"donor": asked["image"], "cells": cells})


def test_too_many_bytes_are_refused(desk, refused, monkeypatch) -> None:
    monkeypatch.setattr(requests, "LARGEST_FILE", 2**20)
    with refused("larger than 1 MB"):
        desk.take(bytes(2**20 + 1), "a.png")


def test_a_name_is_of_bounded_length(desk) -> None:
    with pytest.raises(DiffsalError, match="not a readable image") as error:
        desk.take(b"nothing", "<script>" * 10_000)
    assert len(str(error.value)) < 400


def test_the_figure_is_that_of_explain(desk, asked, png) -> None:
    picture = read_picture(desk.served, png(), "a.png")
    made = drafted(desk.served, picture, maps_of(desk.served, [picture.tensor], 1, "rest"))
    shown = np.asarray(Image.open(io.BytesIO(desk.figure(asked | {"true": 1, "false": "rest"}))))
    assert np.array_equal(shown, figure_pixels(made.explanation))


def test_many_users_at_once_get_what_each_would_get_alone(desk, png) -> None:
    files = [png(seed) for seed in range(6)]

    def play(content):
        image = desk.take(content, "a.png")["image"]
        other = desk.take(files[0], "b.png")["image"]
        told = desk.explain({"image": image})
        lie = desk.lie({"image": image, "strength": 0.5, "target": "corner"})
        composite = desk.compose({"image": image, "donor": other, "cells": [0, 0, 4, 4]})
        return told, lie, composite

    alone = [play(content) for content in files]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(play, files))
    assert together == alone
    assert alone[1][0]["margin"] != alone[2][0]["margin"]


@pytest.mark.parametrize(
    ("headers", "fits"),
    [
        ({"host": "127.0.0.1:7860"}, True),
        ({"host": "localhost"}, True),
        ({"host": "[::1]:7860"}, True),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, True),
        ({"host": "localhost:7860", "origin": "http://localhost:9999"}, False),
        ({"host": "localhost:7860", "origin": "null"}, False),
        ({"host": "rebound.example:7860"}, False),
        ({"host": "localhost.example"}, False),
        ({}, False),
    ],
)
def test_on_this_machine_only_its_own_page_is_answered(headers, fits) -> None:
    assert is_from_here("127.0.0.1", headers) is fits
    assert is_from_here("0.0.0.0", headers)
