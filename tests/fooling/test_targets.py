"""What a fooled map is to show, and how far it got."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.fooling.targets import centroid_shift, target_distance, target_map, top_cells


@pytest.mark.parametrize(("size", "width"), [((7, 7), 1), ((8, 8), 1), ((4, 4), 1), ((14, 21), 2)])
def test_the_frame_is_a_seventh_of_the_shorter_side_wide(size: tuple[int, int], width: int) -> None:
    rows, columns = np.indices(size)
    inside = (np.minimum(rows, columns) >= width) & (rows < size[0] - width)
    wanted = ~(inside & (columns < size[1] - width))
    np.testing.assert_array_equal(target_map("edges", size), wanted)


def test_the_width_of_the_frame_can_be_chosen() -> None:
    assert target_map("edges", (8, 8), width=3).sum() == 64 - 4


def test_the_corner_is_a_third_of_each_side() -> None:
    assert target_map("corner", (7, 6)).nonzero().tolist() == [
        [row, column] for row in range(3) for column in range(2)
    ]


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((7, 6), (2, 5), (2, 4)), ((8, 14), (3, 5), (5, 9)), ((2, 5), (0, 2), (2, 3))],
)
def test_the_middle_is_a_third_of_each_side_in_the_centre(
    size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    found = target_map("middle", size)
    wanted = torch.zeros(size)
    wanted[slice(*rows), slice(*columns)] = 1
    assert torch.equal(found, wanted)
    assert torch.equal(found, found.flip(0, 1))


def test_an_image_is_averaged_over_each_cell_and_normalised(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:2, :4], pixels[6:, 6:] = 200, 100
    Image.fromarray(pixels).save(tmp_path / "target.png")
    wanted = torch.zeros(4, 4)
    wanted[0, :2], wanted[3, 3] = 1, 0.5
    torch.testing.assert_close(target_map(tmp_path / "target.png", (4, 4)), wanted)
    torch.testing.assert_close(target_map(str(tmp_path / "target.png"), (4, 4)), wanted)


def test_bad_targets_are_refused(refused: Callable[[str], Any], tmp_path: Path) -> None:
    with refused("no width"):
        target_map("corner", (8, 8), width=1)
    with refused("target middle has no width"):
        target_map("middle", (8, 8), width=1)
    with refused("constant on a map of 2 × 2"):
        target_map("middle", (2, 2))
    with refused("does not fit"):
        target_map("edges", (8, 8), width=4)
    with refused("constant on a map of 2 × 2"):
        target_map(torch.eye(2).repeat(2, 2), (2, 2))
    with refused("nothing.png"):
        target_map(tmp_path / "nothing.png", (8, 8))


def test_measures_equal_plain_loops() -> None:
    generator = np.random.default_rng(0)
    maps, references = generator.normal(size=(2, 4, 5, 6))
    target = generator.random((5, 6))

    def centroid(pixels: np.ndarray) -> np.ndarray:
        total, moment = 0.0, np.zeros(2)
        for (row, column), value in np.ndenumerate(pixels):
            total += value
            moment += value * np.array([(row + 0.5) / 5, (column + 0.5) / 6])
        return moment / total

    for number, (map_, reference) in enumerate(zip(maps, references, strict=True)):
        scaled = (map_ - map_.min()) / (map_.max() - map_.min())
        base = (reference - reference.min()) / (reference.max() - reference.min())
        wanted = (
            np.mean((scaled - target) ** 2),
            np.mean([scaled.flat[cell] for cell in np.argsort(reference.flat)[-3:]]),
            np.abs(centroid(scaled) - centroid(base)).sum(),
        )
        one, other = torch.tensor(map_[None]), torch.tensor(reference[None])
        got = (
            target_distance(one, torch.tensor(target)),
            *(measure(one, other) for measure in (top_cells, centroid_shift)),
        )
        assert [value.item() for value in got] == pytest.approx(wanted, rel=1e-12), number


def test_a_constant_map_has_its_centroid_in_the_centre_and_finite_gradients() -> None:
    constant = torch.zeros(1, 4, 4, requires_grad=True)
    corner = torch.zeros(1, 4, 4)
    corner[:, 0, 0] = 1
    shift = centroid_shift(constant, corner)
    assert shift.item() == pytest.approx(2 * (1 / 2 - 1 / 8))
    shift.backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()
