"""Regions against a plain flood fill, and where they are drawn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.regions import find_regions, on_image, outlined

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000))


def flooded(values, least):
    """Connected cells of one sign that reach ``least``, as sets; corners touch."""
    left = {tuple(cell) for cell in np.argwhere(np.abs(values) >= least)}
    found = []
    while left:
        todo = [left.pop()]
        region = set(todo)
        while todo:
            row, column = todo.pop()
            for other in [(row + a, column + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]:
                same = other in left and values[other] * values[row, column] > 0
                if same:
                    left.remove(other)
                    region.add(other)
                    todo.append(other)
        found.append(frozenset(region))
    return set(found)


@given(GRIDS, st.floats(0.1, 1.0))
def test_regions_are_those_of_a_flood_fill(grid, share):
    height, width, seed = grid
    values = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    found = find_regions(torch.from_numpy(values), share)
    exact = values.astype(np.float64)
    if exact.min() == exact.max():
        assert found == []
        return
    cells = [frozenset(map(tuple, np.argwhere(region.cells).tolist())) for region in found]
    assert set(cells) == flooded(exact, share * np.abs(exact).max())
    for region in found:
        side = exact[exact * region.logits > 0]
        assert region.logits == pytest.approx(exact[region.cells].sum())
        assert region.of == pytest.approx(side.sum())
        rows, columns = np.nonzero(region.cells)
        left, top, across, down = region.box
        assert (left, top) == (columns.min(), rows.min())
        assert (across, down) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
    sizes = [abs(region.logits) for region in found]
    assert sizes == sorted(sizes, reverse=True)


def test_there_are_none_where_nothing_is_marked():
    assert find_regions(torch.full((3, 3), 2.0)) == []
    assert find_regions(torch.tensor([[1.0, torch.nan]])) == []
    assert find_regions(torch.tensor([[1.0, torch.inf]])) == []


def test_a_region_lies_on_the_image_where_its_cells_do():
    difference = torch.zeros(4, 4)
    difference[1, 2] = 1.0
    region = find_regions(difference)[0]
    inside = on_image(region, Preprocessing(size=(32, 32)), (80, 120))
    rows, columns = np.nonzero(inside)
    assert (rows.min(), rows.max() + 1) == (20, 40)
    assert (columns.min(), columns.max() + 1) == (60, 90)
    # A crop sees the middle of a wide image alone.
    cropped = on_image(region, Preprocessing(size=(32, 32), resize="crop"), (80, 120))
    assert cropped[:, :20].sum() == cropped[:, -20:].sum() == 0
    assert cropped.any()


def test_outlines_are_drawn_at_the_edge_and_numbered():
    image = np.full((80, 120, 3), 128, np.uint8)
    inside = np.zeros((80, 120), bool)
    inside[20:60, 30:90] = True
    drawn = outlined(image, [inside])
    assert (image == 128).all()
    changed = (drawn != 128).any(2)
    assert changed[20, 30:90].all()
    assert changed[20:60, 89].all()
    assert not changed[:18].any()
    assert not changed[38:56, 50:84].any()
    assert changed[22:38, 32:46].any()  # the number
