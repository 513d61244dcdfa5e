"""Networks of any shape, type and scale: maps are finite and add up, or a sentence is said."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffsal import DiffsalError, SalienceMaps, explain
from diffsal.maps.caveats import caveats
from diffsal.maps.weightings import WEIGHTINGS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Drawn:
    """A network, its input, and the classes that are asked for."""

    dtype: torch.dtype
    batch: int
    image: tuple[int, int]
    widths: tuple[int, int]
    classes: int
    exponent: int
    head: str
    layer: str | None
    weighting: Any
    true: Any
    false: Any

    @property
    def is_exact(self) -> bool:
        """Whether the map of this head, asked for thus, adds up to the logits less the biases."""
        return self.weighting == "elementwise" and self.layer != "0" and self.head != "norm"


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    classes = draw(st.sampled_from([1, 2, 3, 7]))
    one_class = st.integers(-1, classes)
    return Drawn(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=draw(st.integers(1, 3)),
        image=(draw(st.integers(4, 12)), draw(st.integers(4, 12))),
        widths=(draw(st.integers(1, 4)), draw(st.integers(1, 5))),
        classes=classes,
        exponent=draw(st.integers(-30, 30)),
        head=draw(st.sampled_from(["linear", "norm", "sigmoid", "softmax"])),
        layer=draw(st.sampled_from([None, "0", "2"])),
        weighting=draw(st.sampled_from(list(WEIGHTINGS))),
        true=draw(st.none() | one_class),
        false=draw(st.none() | one_class | st.sampled_from(["rest", "runner-up"])),
    )


def network(one: Drawn) -> nn.Sequential:
    """Its features are of the size that is drawn: 10 to the exponent."""
    torch.manual_seed(0)
    first, second = one.widths
    squash = {"sigmoid": [nn.Sigmoid()], "softmax": [nn.Softmax(1)]}.get(one.head, [])
    norm = [nn.LayerNorm(second)] if one.head == "norm" else []
    model = nn.Sequential(
        *(nn.Conv2d(3, first, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(first, second, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(*norm, nn.Linear(second, one.classes), *squash),
    ).eval()
    model[2].weight.data *= 10.0**one.exponent
    model[2].bias.data *= 10.0**one.exponent
    return model.to(one.dtype)


def check(one: Drawn) -> None:
    model = network(one)
    x = torch.rand(one.batch, 3, *one.image).to(one.dtype)
    try:
        maps = explain(
            model, x, one.true, one.false, target_layers=one.layer, weighting=one.weighting
        )
    except DiffsalError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most examples raise nothing
        return
    said = caveats(maps)
    for index, told in enumerate(said):
        check_sample(maps[index], told)
    if one.is_exact and maps.logits.isfinite().all() and one.dtype != torch.float16:
        adds_up(maps, model, one)


def check_sample(maps: SalienceMaps, told: list[str]) -> None:
    values = torch.cat([maps.logits.flatten(), maps.true.flatten(), maps.false.flatten()])
    if not values.isfinite().all():
        assert told
        return
    share, normalized = maps.common_mode_share, maps.normalized((9, 9))
    assert maps.residual.isfinite().all()
    for map_ in normalized:
        assert map_.isfinite().all()
        assert map_.min() >= 0
        assert map_.max() <= 1
    if not maps.normalized().difference.any():
        assert any("constant" in sentence for sentence in told)
    if maps.logits.shape[1] > 1 and (maps.common.std() > 0 or maps.difference.std() > 0):
        assert 0 <= share <= 1
    margin = maps.difference.double().sum() + maps.residual.double()
    size = maps.difference.double().abs().sum() + maps.margin.double().abs()
    assert (margin - maps.margin.double()).abs() <= 1e-2 * size


def adds_up(maps: SalienceMaps, model: nn.Sequential, one: Drawn) -> None:
    bias = next(layer for layer in reversed(model) if isinstance(layer, nn.Linear)).bias
    true = maps.true.double().sum((1, 2))
    size = maps.true.double().abs().sum((1, 2)) + maps.true_score.double().abs()
    offset = bias.detach().double()[maps.true_class if one.classes > 1 else maps.true_class * 0]
    if one.classes == 1:
        offset = torch.where(maps.true_class == 1, offset / 2, -offset / 2)
    off = (true + offset - maps.true_score.double()).abs()
    near = 32 * torch.finfo(one.dtype).eps
    assert (off <= near * (size + offset.abs()) + torch.finfo(one.dtype).tiny * 1e3).all()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn())
def test_maps_are_finite_and_add_up_or_say_so(one: Drawn) -> None:
    check(one)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=3_000, deadline=None)
@given(drawn())
def test_many_more(one: Drawn) -> None:
    check(one)
