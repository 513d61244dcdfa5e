"""The pictures: sizes, colours, words; and that no image, map or name spoils them."""

import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from diffsal.explaining import figures
from diffsal.explaining.figures import Explanation, save_figure, save_overlays
from diffsal.explaining.typography import write

PANELS = ("true", "false", "difference", "evidence")


def explanation(height=40, width=40, **changes):
    rng = np.random.default_rng(0)
    true, false = rng.normal(size=(2, height, width)).astype(np.float32)
    fields = {
        "title": "image.png",
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "true": true,
        "false": false,
        "difference": true - false,
        "cells": (8, 8),
        "true_name": "eight",
        "false_name": "three",
        "true_from": "prediction",
        "true_probability": 0.982,
        "false_probability": 0.018,
        "predicted_name": "eight",
        "predicted_probability": 0.982,
        "outputs": 2,
        "margin": 4.2,
        "evidence_for": 5.3,
        "evidence_against": -1.2,
        "residual": 0.1,
        "common_mode_share": 0.02,
    }
    return Explanation(**fields | changes)


def on_white(difference):
    """An explanation of a white image; the class maps are half the difference, up and down."""
    difference = np.array(difference, dtype=np.float32)
    white = np.full((*difference.shape, 3), 255, np.uint8)
    half = difference / 2
    return explanation(image=white, true=half, false=-half, difference=difference)


def read(path):
    return np.asarray(Image.open(path))


def overlays(folder, shown):
    paths = save_overlays(folder, "x", shown)
    return dict(zip(PANELS, map(read, paths), strict=True))


def figure(folder, shown):
    path = folder / "figure.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(path, shown)
    return read(path)


@pytest.fixture
def said(monkeypatch, tmp_path):
    """Returns a function from an explanation to the pieces of text on its figure."""
    texts = []

    def recording(page, x, baseline, text, *how):
        texts.append(text)
        write(page, x, baseline, text, *how)

    monkeypatch.setattr(figures, "write", recording)

    def say(shown):
        texts.clear()
        figure(tmp_path, shown)
        return list(filter(None, texts))

    return say


def expected(name, position):
    return np.array(matplotlib.colormaps[name](position)[:3]) * 255


# Overlays


@pytest.mark.parametrize("size", [(64, 64), (1000, 200), (30, 400), (1, 1), (1, 7)])
def test_overlays_have_the_image_s_size_and_say_in_their_names_what_they_are(tmp_path, size):
    paths = save_overlays(tmp_path, "scan.1", explanation(*size))
    assert paths == [tmp_path / f"scan.1.{panel}.png" for panel in PANELS]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert {read(path).shape for path in paths} == {(*size, 3)}


def test_evidence_is_red_above_zero_blue_below_and_neutral_at_zero(tmp_path):
    evidence = overlays(tmp_path, on_white([[-2, -1, 0, 1, 2]]))["evidence"][0].astype(float)
    positions = [0.1, 0.3, 0.5, 0.7, 0.9]  # a scale symmetric about zero, without the dark ends
    assert evidence == pytest.approx(
        np.array([expected("RdBu_r", position) for position in positions]), abs=2
    )
    red, blue = evidence[:, 0], evidence[:, 2]
    assert (red - blue)[:2].max() < -50
    assert abs(red - blue)[2] <= 2
    assert (red - blue)[3:].min() > 50


def test_the_scale_of_the_evidence_stays_symmetric_when_the_evidence_is_not(tmp_path):
    evidence = overlays(tmp_path, on_white([[-1, 0, 4]]))["evidence"][0].astype(float)
    assert evidence[1] == pytest.approx(expected("RdBu_r", 0.5), abs=2)
    assert evidence[0] == pytest.approx(expected("RdBu_r", 0.5 - 0.4 / 4), abs=2)


def test_other_maps_span_their_own_scale_from_blue_to_red(tmp_path):
    maps = [np.array([[low, low + span]], np.float32) for low, span in ((5, 1), (-9, 0.1), (0, 3))]
    white = np.full((1, 2, 3), 255, np.uint8)
    shown = explanation(image=white, true=maps[0], false=maps[1], difference=maps[2])
    for panel, overlay in overlays(tmp_path, shown).items():
        if panel != "evidence":
            assert overlay[0, 0] == pytest.approx(expected("RdYlBu_r", 0.0), abs=1)
            assert overlay[0, 1] == pytest.approx(expected("RdYlBu_r", 1.0), abs=1)


def test_colours_keep_their_hue_over_black_and_the_image_shows_through(tmp_path):
    shown = on_white([[-1, -1, 1, 1]])
    image = np.zeros((1, 4, 3), np.uint8)
    image[:, ::2] = 255
    white_minus, minus, white_plus, plus = overlays(tmp_path, replace(shown, image=image))[
        "evidence"
    ][0].astype(int)
    assert minus[2] > minus[0] + 50
    assert plus[0] > plus[2] + 50
    assert (minus < white_minus).all()
    assert (plus < white_plus).all()


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-30, 1e20])
def test_a_constant_map_is_drawn_as_such_and_its_evidence_by_its_sign(tmp_path, value):
    shown = on_white(np.full((3, 4), value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = overlays(tmp_path, shown)
    assert (drawn["difference"] == shown.image).all()  # nothing is lowest or highest
    position = 0.5 + 0.4 * np.sign(value)
    assert drawn["evidence"][0, 0] == pytest.approx(expected("RdBu_r", position), abs=2)
    figure(tmp_path, shown)


def test_what_the_model_did_not_see_is_left_as_it_is(tmp_path, said):
    shown = explanation()
    seen = np.zeros((40, 40), bool)
    seen[5:35, 8:30] = True
    cropped = {
        name: np.where(seen, getattr(shown, name), np.float32(np.nan)) for name in PANELS[:3]
    }
    for overlay in overlays(tmp_path, replace(shown, **cropped)).values():
        changed = (overlay != shown.image).any(axis=-1)
        assert not changed[~seen].any()
        assert changed[seen].mean() > 0.95
    assert "did not see" in " ".join(said(replace(shown, **cropped)))
    assert "did not see" not in " ".join(said(shown))


def test_maps_that_cover_nothing_leave_the_image_alone(tmp_path):
    nothing = np.full((40, 40), np.nan, np.float32)
    shown = explanation(true=nothing, false=nothing, difference=nothing)
    for overlay in overlays(tmp_path, shown).values():
        assert (overlay == shown.image).all()
    figure(tmp_path, shown)


# The figure


def place(page, panel):
    """Where the pixels of ``panel`` stand on ``page``: (row, column)."""
    height, width = panel.shape[:2]
    for row, column in np.argwhere((page == panel[0, 0]).all(axis=-1)):
        if np.array_equal(page[row : row + height, column : column + width], panel):
            return row, column
    raise AssertionError("the panel is not on the page")


def test_the_figure_shows_the_input_and_the_overlays_side_by_side(tmp_path):
    shown = explanation(365, 365)  # as wide as a column of the page, so that nothing is resized
    page = figure(tmp_path, shown)
    where = {name: place(page, panel) for name, panel in overlays(tmp_path, shown).items()}
    where["input"] = place(page, shown.image)
    assert where["input"][0] == where["true"][0] == where["false"][0]
    assert where["difference"][0] == where["evidence"][0] > where["true"][0] + 365
    assert where["input"][1] < where["true"][1] < where["false"][1]
    assert where["true"][1] == where["difference"][1]
    assert where["false"][1] == where["evidence"][1]


def test_the_colour_bar_runs_from_blue_over_neutral_to_red(tmp_path):
    white = on_white(np.zeros((100, 100)))
    page = figure(tmp_path, white).astype(int)
    redness = (page[..., 0] - page[..., 2])[-80:]  # below the panels there is colour in bars alone
    long_rows = [row for row in redness if (abs(row[-393:]) > 25).sum() > 250]
    assert len(long_rows) == 10
    bar = long_rows[0][-28 - 365 : -28]
    assert bar[0] < -100
    assert abs(bar[182]) <= 2
    assert bar[-1] > 100


@pytest.mark.parametrize(
    "size", [(64, 64), (1000, 200), (200, 1000), (3000, 4000), (1, 1), (1, 3000), (3000, 1)]
)
def test_any_shape_makes_a_page_that_fits_a_screen(tmp_path, size):
    height, width, _ = figure(tmp_path, explanation(*size)).shape
    assert 1000 <= width <= 1350
    assert 400 <= height <= 1300


ODD_NAMES = [
    "a very long class name, " * 30,
    r"$\frac{ $ unbalanced_math^{",
    "two\nlines\tand a tab",
    "猫 кот قط 🐈",
    "control \x00\x07 and \udcff surrogate",
    "W" * 300,
    "",
]


@pytest.mark.parametrize("size", [(40, 40), (90, 20)])
def test_no_name_breaks_the_page_or_leaves_its_column(tmp_path, size):
    plain = figure(tmp_path, explanation(*size))
    gutters = (plain[90:] == 255).all(axis=(0, 2)).nonzero()[0]  # below the title and first line
    assert len(gutters) > 90
    for name in ODD_NAMES:
        names = dict.fromkeys(("title", "true_name", "false_name", "predicted_name"), name)
        page = figure(tmp_path, explanation(*size, **names))
        assert page.shape[1] == plain.shape[1]
        assert (page[90:, gutters] == 255).all(), name
        assert (page[:, -26:] == 255).all(), name


@pytest.mark.parametrize(
    ("name", "drawn"), [("$a_1$", "$a_1$"), ("two\nlines\tand a tab ", "two lines and a tab")]
)
def test_names_are_drawn_as_they_are_on_one_line(said, name, drawn):
    assert drawn in said(explanation(true_name=name))


def test_equal_input_gives_equal_bytes_without_metadata(tmp_path):
    shown = explanation()
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_figure(folder / "x.png", shown)
        save_overlays(folder, "x", shown)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert Image.open(tmp_path / "a" / name).info == {}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def interrupted(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    for save in (save_figure, lambda path, shown: save_overlays(path.parent, "y", shown)):
        with pytest.raises(KeyboardInterrupt):
            save(path, explanation())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.png"]
    assert path.read_bytes() == b"old"


# Words


def test_the_sum_adds_up_in_logits(said):
    texts = said(explanation())
    lines = ["red cells: for eight", "blue cells: against eight", "bias and rest, not on the map"]
    for line in [*lines, "margin", "+5.30", "−1.20", "+0.10", "+4.20"]:
        assert line in texts
    for line in [
        "logits",
        "logits per cell",
        "for eight",
        "against eight",
        "p = 0.982",
        "p = 0.018",
    ]:
        assert line in texts


@pytest.mark.parametrize(
    ("true_from", "why"),
    [("prediction", "predicted"), ("label", "given as label"), ("score", "given as score")],
)
def test_it_says_which_class_was_taken_as_true_and_why(said, true_from, why):
    shown = explanation(
        true_from=true_from, true_name="three", predicted_name="nine", predicted_probability=0.7
    )
    texts = said(shown)
    assert f"true class, {why}" in texts
    assert any(
        text.startswith(f"Predicted: nine (p = 0.700). Taken as true: three ({why}).")
        for text in texts
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"common_mode_share": 0.02}, "2% of the class maps' variance is common to both classes"),
        ({"common_mode_share": 0.001}, "Under 1% of"),
        ({"common_mode_share": 0.999}, "Over 99% of"),
        ({"common_mode_share": 0.5, "outputs": 10}, "against a third class it can matter"),
        ({"common_mode_share": 0.01}, "low share does not prove a map faithful"),
        ({"common_mode_share": np.nan}, "undefined, both class maps are constant"),
        ({"common_mode_share": np.nan, "outputs": 1}, "not applicable, the model has one output"),
        ({"margin": 4.2}, "Margin above 0: eight scores higher than three."),
        ({"margin": -4.2}, "Margin below 0: three scores higher than eight."),
        ({"caveats": ["The map explains little."]}, "The map explains little."),
        (
            {"regions": [(np.ones((2, 2), bool), 3.1, 5.9)]},
            "Outlined: region 1, +3.10 of +5.90 logits.",
        ),
        ({"outputs_are": "sigmoid"}, "The model ends in a sigmoid: maps are of the logits before"),
    ],
)
def test_the_remarks_say_what_the_numbers_mean(said, changes, words):
    assert words in " ".join(said(explanation(**changes)))


def test_two_logits_have_no_third_class_and_a_small_residual_no_remark(said):
    words = " ".join(said(explanation()))
    assert "third class" not in words
    assert "explains little" not in words


@pytest.mark.parametrize(
    ("numbers", "texts"),
    [
        ((0.0, -0.0, 0.0, 0.0), {"+0.00"}),
        ((0.0123, -0.001, 0.0, 0.0113), {"+0.0123", "−0.0010", "+0.0000", "+0.0113"}),
        ((1234.5, -0.5, 0.0, 1234.0), {"+1234.50", "−0.50", "+0.00", "+1234.00"}),
        ((3e9, -1e3, 0.0, 3e9), {"+3.00e+09", "−1.00e+03", "+0.00e+00"}),
    ],
)
def test_numbers_of_any_size_stay_legible(said, numbers, texts):
    names = ("evidence_for", "evidence_against", "residual", "margin")
    shown = on_white(np.ones((4, 4)))
    said_of_it = set(said(replace(shown, **dict(zip(names, numbers, strict=True)))))
    assert texts <= said_of_it
    assert "−0.00" not in said_of_it


def test_probabilities_are_never_rounded_to_certainty(said):
    texts = said(explanation(true_probability=1.0, false_probability=1e-9))
    assert {"p > 0.999", "p < 0.001"} <= set(texts)
    texts = said(explanation(true_probability=None, false_probability=None))
    assert not any(text.startswith("p ") for text in texts)
