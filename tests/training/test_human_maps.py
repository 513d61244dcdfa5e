"""Human maps on the grid of the model's."""

import numpy as np
import pytest
import torch
from training.samples import norm, overlap_average

from diffsal.training.human_maps import targets_for


def touched_maximum(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    def span(cell: int, old: int, new: int) -> slice:
        return slice(cell * old // new, -(-(cell + 1) * old // new))

    (h, w), (H, W) = size, maps.shape[1:]
    rows = [[maps[:, span(i, H, h), span(j, W, w)].max((1, 2)) for j in range(w)] for i in range(h)]
    return np.moveaxis(np.array(rows), -1, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [((224, 224), (7, 7)), ((200, 200), (7, 7)), ((30, 50), (4, 7)), ((5, 3), (7, 7))],
)
def test_pooling_against_numpy(old: tuple[int, int], new: tuple[int, int]) -> None:
    human = torch.rand(3, *old, dtype=torch.float64)
    like = torch.rand(3, *new, dtype=torch.float64)
    for pool, reference in (("area", overlap_average), ("max", touched_maximum)):
        expected = norm(torch.from_numpy(reference(human.numpy(), new)))
        target, present = targets_for(human, like, pool)
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-12)
        assert present.all()


def test_one_pixel_of_two_thousand_squared_is_not_lost() -> None:
    defect = torch.zeros(1, 2000, 2000, dtype=torch.uint8)
    defect[0, 700, 1300] = 255
    like = torch.zeros(1, 7, 7)
    cell = (0, 700 * 7 // 2000, 1300 * 7 // 2000)
    for pool in ("area", "max"):
        target, present = targets_for(defect, like, pool)
        assert present.all()
        assert target[cell] == target.sum() == 1
    target, present = targets_for(255 - defect, like, "area")
    assert present.all()
    assert target[cell] == 0
    clutter = torch.rand(1, 2000, 2000) + 5 * defect / 255
    assert targets_for(clutter, like, "max")[0][cell] == 1
    assert targets_for(clutter, like, "area")[0][cell] != 1


def test_a_constant_average_is_no_map() -> None:
    board = ((torch.arange(28)[:, None] + torch.arange(28)) % 2).expand(3, -1, -1)
    values = torch.tensor([1.0, 0.1, 255.0])[:, None, None]
    assert not targets_for(board * values, torch.zeros(3, 7, 7), "area")[1].any()
    even = torch.full((3, 200, 200), 0.1) * values  # 200/7 of a pixel: weights that round
    assert not targets_for(even, torch.zeros(3, 7, 7, dtype=torch.float64), "area")[1].any()
