"""The protocol's pictures show what they are given, and nothing else."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from diffsal.auditing.report import data_uri
from diffsal.explaining.overlays import overlay
from diffsal.protocol.plots import save_aurocs, save_fooling

COLOURS = (255 * np.array(matplotlib.colormaps["tab10"].colors)).round().astype(int)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places(image, colour):
    """Rows and columns of the pixels of a colour."""
    return np.nonzero((np.abs(image - colour) <= 2).all(2))


def test_methods_have_colours_and_higher_areas_are_higher_up(tmp_path):
    areas = {
        "low": {"a": {0: 0.6, 1: 0.62}, "b": {0: 0.65}},
        "high": {"a": {0: 0.9, 1: 0.92}, "b": {0: 0.9}},
    }
    save_aurocs(tmp_path / "a.png", "title", areas)
    image = pixels(tmp_path / "a.png")
    plot = image[: int(0.8 * len(image))]  # without the legend
    low, high = (places(plot, COLOURS[number]) for number in (0, 1))
    assert high[0].max() < low[0].min()
    assert not len(places(image, COLOURS[2])[0])
    # Subsets lie side by side, and in each the methods in their order.
    middle = image.shape[1] // 2
    for columns in (low[1], high[1]):
        assert columns.min() < middle < columns.max()
    assert low[1].min() < high[1].min()


def test_names_are_shown_as_they_are(tmp_path):
    """Between dollars, matplotlib would read mathematics, and refuse what is none."""
    save_aurocs(tmp_path / "a.png", r"$\nope{$", {r"a $\nope{$": {r"$\nope{$": {0: 0.5, 1: 0.6}}})
    assert (tmp_path / "a.png").is_file()


def test_a_method_without_results_in_a_subset_leaves_a_gap(tmp_path):
    areas = {"one": {"a": {0: 0.6}, "b": {0: 0.7}}, "two": {"b": {0: 0.9}}}
    save_aurocs(tmp_path / "a.png", "title", areas)
    image = pixels(tmp_path / "a.png")
    columns = places(image[: int(0.8 * len(image))], COLOURS[1])[1]
    assert columns.min() > image.shape[1] / 2


def job(models, samples=2):
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    maps = {name: generator.normal(size=(samples, 4, 4)).tolist() for name in models}
    return {
        "classes": ["no", "yes"],
        "samples": {"path": [f"{number}.png" for number in range(9)], "label": [0] * 5 + [1] * 4},
        "pictured": [1, 7][:samples],
        "pictures": [data_uri(picture)] * samples,
        "models": {
            name: {"maps": dict.fromkeys(("true", "false", "difference"), maps[name])}
            for name in models
        },
    }


def test_figure_1_has_a_row_for_each_model(tmp_path):
    heights = []
    for models in (["honest"], ["honest", "fooled"], ["honest", "fooled", "head-shifted"]):
        save_fooling(tmp_path / "f.png", "title", job(models))
        heights.append(len(pixels(tmp_path / "f.png")))
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=2)
    assert heights[1] > heights[0] + 100


def test_figure_1_colours_each_map_on_its_own_scale(tmp_path):
    one = job(["honest"], samples=1)
    values = np.array(one["models"]["honest"]["maps"]["true"][0], np.float32)
    save_fooling(tmp_path / "raw.png", "title", one)
    scaled = (1000 * values - 7).tolist()
    one["models"]["honest"]["maps"] = {name: [scaled] for name in ("true", "false", "difference")}
    save_fooling(tmp_path / "scaled.png", "title", one)
    assert np.abs(pixels(tmp_path / "raw.png") - pixels(tmp_path / "scaled.png")).max() <= 3
    grey = np.full((32, 32, 3), 128, np.uint8)
    hottest = overlay(grey, values)
    place = np.unravel_index(values.argmax(), values.shape)
    red, _, blue = hottest[place[0] * 8 + 4, place[1] * 8 + 4].astype(int)
    assert red > blue
