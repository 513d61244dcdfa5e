"""Normalisation and resizing, the common-mode share, and maps as a batch."""

from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffsal.maps.salience import capture, explain
from diffsal.maps.salience_maps import SalienceMaps, normalize, resize

Make = Callable[..., nn.Module]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_common_mode_share_is_the_share_of_the_variance() -> None:
    rng = np.random.default_rng(0)
    true, false = rng.normal(size=(2, 3, 4, 5))
    maps = salience_maps(true, false)
    common, half = (true + false) / 2, (true - false) / 2
    expected = common.var((1, 2)) / (common.var((1, 2)) + half.var((1, 2)))
    np.testing.assert_allclose(maps.common_mode_share, expected, rtol=1e-12)


@pytest.mark.parametrize(("false", "share"), [(1.0, 1.0), (-1.0, 0.0)])
def test_common_mode_share_at_its_ends(false: float, share: float) -> None:
    true = np.random.default_rng(0).normal(size=(1, 3, 3))
    assert salience_maps(true, false * true).common_mode_share.item() == share


@pytest.mark.parametrize("value", [0.3, -7.1, 1e4])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (7, 7)])
def test_a_constant_map_stays_constant_when_it_is_resized(
    grid: tuple[int, int], value: float
) -> None:
    for size in ((5, 5), (64, 48), (224, 224)):
        resized = resize(torch.full((1, *grid), value), size)
        assert torch.equal(normalize(resized), torch.zeros(1, *size))


def test_common_mode_share_of_constant_maps_is_nan() -> None:
    assert salience_maps(np.ones((1, 3, 3)), np.zeros((1, 3, 3))).common_mode_share.isnan().all()


def test_maps_are_indexed_and_iterated_like_a_batch(pooled_net: Make) -> None:
    net, x = pooled_net(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    maps = explain(net, x)
    assert len(maps) == 3
    for chosen, samples in ((maps[1], [1]), (maps[-1], [2]), (maps[1:], [1, 2])):
        for name, value in vars(maps).items():
            part = getattr(chosen, name)
            assert torch.equal(part, value[samples]) if isinstance(value, Tensor) else part == value
    for outside in (3, -4):
        with pytest.raises(IndexError):
            maps[outside]
    assert [one.margin.item() for one in maps] == maps.margin.tolist()


def test_maps_move_to_a_device_together() -> None:
    maps = salience_maps(np.ones((1, 3, 3)), np.zeros((1, 3, 3))).to("meta")
    tensors = [value for value in vars(maps).values() if isinstance(value, Tensor)]
    assert len(tensors) == 7
    assert all(tensor.device.type == "meta" for tensor in tensors)


def salience_maps(true: np.ndarray, false: np.ndarray) -> SalienceMaps:
    """Maps with given values; the rest is filled in to agree."""
    t, f = (torch.as_tensor(map_, dtype=torch.float64) for map_ in (true, false))
    scores = t.flatten(1).sum(1), f.flatten(1).sum(1)
    classes = torch.zeros(len(t), dtype=torch.int64)
    return SalienceMaps(t, f, torch.stack(scores, 1), *scores, classes, 1 - classes, "label")


floats = st.floats(-1e6, 1e6)
maps_pairs = hnp.array_shapes(min_dims=3, max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float64, shape, elements=floats)] * 2)
)


@settings(max_examples=50, deadline=None)
@given(maps_pairs)
def test_invariant_1_difference_and_its_mirror(pair: tuple[np.ndarray, np.ndarray]) -> None:
    maps, swapped = salience_maps(*pair), salience_maps(*pair[::-1])
    assert torch.equal(maps.difference, maps.true - maps.false)
    assert torch.equal(swapped.difference, -maps.difference)
    both = maps.normalized().difference + swapped.normalized().difference
    for sample, difference in zip(both, maps.difference, strict=True):
        span = difference.max() - difference.min()
        if span > max(1e-12 * difference.abs().max().item(), 1e-15):
            close(sample, torch.ones_like(sample))
        elif span == 0:
            assert torch.equal(sample, torch.zeros_like(sample))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, (2, 3, 4), elements=floats))
def test_normalize_is_min_max(values: np.ndarray) -> None:
    low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
    result = normalize(torch.as_tensor(values)).numpy()
    assert (result >= 0).all()
    assert (result <= 1).all()
    for index in range(2):
        span = (high - low)[index].item()
        if span > max(1e-9 * np.abs(values[index]).max(), 1e-15):
            np.testing.assert_allclose(result[index], (values - low)[index] / span, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalize_in_every_precision(dtype: torch.dtype) -> None:
    small = torch.tensor([[0.001, 0.002, 0.005]], dtype=dtype)
    torch.testing.assert_close(
        normalize(small), torch.tensor([[0, 0.25, 1]], dtype=dtype), rtol=2e-2, atol=0
    )


@pytest.mark.parametrize("offset", [0.0, 0.1, -7e5])
def test_a_constant_map_normalizes_to_zero_even_with_rounding(offset: float) -> None:
    constant = torch.full((1, 3, 3), offset)
    constant[0, 1, 1] = torch.nextafter(constant[0, 1, 1], torch.tensor(torch.inf))
    expected = torch.zeros(1, 3, 3)
    assert torch.equal(normalize(constant), expected)


def test_normalized_maps_are_resized_first() -> None:
    maps = salience_maps(*np.random.default_rng(0).normal(size=(2, 2, 4, 4)))
    for name, map_ in maps.normalized((9, 6))._asdict().items():
        assert map_.shape == (2, 9, 6)
        assert torch.equal(map_.amin((1, 2)), torch.zeros(2, dtype=torch.float64))
        assert torch.equal(map_.amax((1, 2)), torch.ones(2, dtype=torch.float64))
        close(map_, normalize(resize(getattr(maps, name), (9, 6))))


def test_resize_keeps_values_and_places() -> None:
    """A ramp stays that ramp, seen at the new cells' centres (all but the clamped margin)."""
    ramp = (torch.arange(6, dtype=torch.float64) + 0.5).expand(1, 4, 6)
    centres = (torch.arange(18, dtype=torch.float64) + 0.5) / 3
    close(resize(ramp, (8, 18))[0, :, 2:-2], centres[2:-2].expand(8, -1))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("kind", ["varied", "constant", "one pixel"])
def test_invariant_5_values_and_gradients_are_finite(
    on_features: Make, kind: str, scale: float
) -> None:
    net = on_features(4).float()
    features = torch.randn(2, 4, 3, 3)
    if kind == "constant":
        features = torch.ones(2, 4, 3, 3)
    elif kind == "one pixel":
        features = torch.randn(2, 4, 1, 1)
    features = (scale * features).requires_grad_()
    with capture(net, net[0]) as captured:
        maps = captured.maps(net(features), torch.tensor([0, 1]))
    normalized = maps.normalized((5, 5))
    assert all(map_.isfinite().all() for map_ in (maps.true, maps.false, *normalized))
    sum(map_.square().mean() for map_ in normalized).backward()
    for tensor in (features, net[-1].weight):
        assert tensor.grad.isfinite().all()
    if kind != "varied" or scale == 0:
        assert all(torch.equal(map_, torch.zeros(2, 5, 5)) for map_ in normalized)
    if kind == "varied" and scale >= 1e-15:
        assert all(torch.allclose(map_.amax((1, 2)), torch.ones(2)) for map_ in normalized)
