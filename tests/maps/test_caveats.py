"""A map that says little is not shown without a word."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffsal.maps.caveats import caveats
from diffsal.maps.numbers import signed
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps


def maps_of(stride: int = 4, bias: float = 0.0) -> SalienceMaps:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride, 1), *head)
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([0.0, bias]))
    return explain(model, torch.rand(2, 3, 32, 32), true=1)


def words(maps: SalienceMaps) -> str:
    return " ".join(caveats(maps)[0])


def test_a_map_that_adds_up_over_a_fine_grid_needs_no_word() -> None:
    assert caveats(maps_of()) == [[], []]


@pytest.mark.parametrize(("share", "is_said"), [(0.51, True), (-0.7, True), (0.49, False)])
def test_half_the_margin_off_the_map(share: float, is_said: bool) -> None:
    maps = maps_of()
    off = maps.margin * share
    moved = replace(maps, true=maps.true - (off / maps.true[0].numel())[:, None, None])
    assert ("explains little" in words(moved)) == is_said
    written = signed(float(maps.margin[0]), float(off[0]))
    told = f"of a margin of {written[0]} logits, {written[1]} are not on it"
    assert (told in words(moved)) == is_said


@pytest.mark.parametrize(("stride", "is_said"), [(8, True), (6, False)])
def test_few_cells(stride: int, is_said: bool) -> None:
    assert ("regions, not places" in words(maps_of(stride))) == is_said


def test_a_constant_map() -> None:
    maps = maps_of()
    constant: Tensor = torch.full_like(maps.true, 0.25)
    assert "is constant: it marks nothing" in words(replace(maps, true=constant, false=-constant))


def test_a_map_that_is_drawn_as_constant_marks_nothing() -> None:
    maps = maps_of()
    tiny = replace(maps, true=maps.true * 1e-25, false=maps.false * 1e-25)
    assert "constant" in words(tiny)


def test_what_is_not_finite_tells_nothing() -> None:
    maps = maps_of()
    assert words(replace(maps, logits=maps.logits / 0)) == (
        "Logits or maps are not finite: they tell nothing."
    )
