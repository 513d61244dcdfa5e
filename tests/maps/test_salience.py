"""The mechanism against its equations, worked out by hand in float64, and under every caller."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffsal.salience import (
    SalienceMaps,
    capture,
    evaluation_mode,
    explain,
    normalize,
    resize,
)
from diffsal.target_layers import TargetLayer

Make = Callable[..., nn.Module]
Refused = Callable[[str], AbstractContextManager[None]]

REGNETS = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
EXACT = {
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "resnext": (  # wide ones are of the same blocks, at three times the parameters
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
        *("wide_resnet50_2", "wide_resnet101_2"),
    ),
    "densenet": ("densenet121", "densenet161", "densenet169", "densenet201"),
    "efficientnet": tuple(f"efficientnet_b{index}" for index in range(8)),
    "efficientnet_v2": ("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
    "mobilenet_v2": ("mobilenet_v2",),
    "regnet_x": tuple(f"regnet_x_{flops}" for flops in REGNETS),
    "regnet_y": tuple(f"regnet_y_{flops}" for flops in (*REGNETS, "128gf")),
    "shufflenet": tuple(f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")),
    "mnasnet": ("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    "googlenet": ("googlenet",),
    "inception": ("inception_v3",),
    "swin": ("swin_t", "swin_s", "swin_b"),
    "swin_v2": ("swin_v2_t", "swin_v2_s", "swin_v2_b"),
}
"""Torchvision's classifiers whose maps sum to the logit, smallest first in each family."""


def images(batch: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def on_features(
    channels: int, classes: int = 2, *head: nn.Module, volume: bool = False
) -> nn.Sequential:
    """A classifier whose input is its feature map, so that features can be chosen."""
    pool = nn.AdaptiveAvgPool3d(1) if volume else nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(nn.Identity(), *head, pool, nn.Flatten(), nn.Linear(channels, classes))
    return net.double().eval()


def cam(features: Tensor, weight: Tensor) -> Tensor:
    """Σ_c weight[c] · features[c] / cells, (B, ...); the paper's CAM, the pooling's divisor in."""
    return torch.einsum("bc,bc...->b...", weight, features) / features[0, 0].numel()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- closed forms -----------------------------------------------------------------------------


def test_maps_of_a_pooled_linear_head_are_the_papers_cams(pooled_net: Make) -> None:
    net, x, labels = pooled_net(3), images(), torch.tensor([2, 0, 1])
    others = torch.tensor([1, 1, 2])
    maps = explain(net, x, labels, others, target_layers=net.features)

    relu = F.relu(net.backbone(x).detach())
    weight, bias = net.fc.weight.detach(), net.fc.bias.detach()
    true, false = cam(relu, weight[labels]), cam(relu, weight[others])
    logits = net(x).detach()
    close(maps.true, true)
    close(maps.false, false)
    close(maps.difference, cam(relu, weight[labels] - weight[others]))
    close(maps.common, (true + false) / 2)
    close(maps.logits, logits)
    close(maps.true_score, logits[range(3), labels])
    close(maps.margin, logits[range(3), labels] - logits[range(3), others])
    close(maps.residual, bias[labels] - bias[others])
    assert maps.true_class.tolist() == [2, 0, 1]
    assert maps.false_class.tolist() == [1, 1, 2]
    assert maps.true_from == "label"


def test_without_labels_the_predicted_class_is_true(pooled_net: Make) -> None:
    net, x = pooled_net(3), images(8)
    maps = explain(net, x)
    ranked = net(x).argsort(dim=1, descending=True)
    assert maps.true_class.tolist() == ranked[:, 0].tolist()
    assert maps.false_class.tolist() == ranked[:, 1].tolist()
    assert maps.true_from == "prediction"


def test_one_logit_is_halved_so_that_the_margin_is_the_log_odds(pooled_net: Make) -> None:
    net, x = pooled_net(1), images(2)
    maps = explain(net, x, torch.tensor([1, 0]))
    whole = cam(F.relu(net.backbone(x).detach()), net.fc.weight.detach().expand(2, -1))
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    close(maps.difference, sign[:, None, None] * whole)
    close(maps.true, sign[:, None, None] * whole / 2)
    close(maps.common, torch.zeros_like(whole))
    close(maps.margin, sign * net(x).detach()[:, 0])
    assert maps.common_mode_share.isnan().all()


def test_the_map_against_the_rest_is_that_of_the_log_odds(pooled_net: Make) -> None:
    net, x, labels = pooled_net(4), images(), torch.tensor([3, 0, 0])
    maps = explain(net, x, labels, "rest")

    features = net.backbone(x).detach().requires_grad_()
    log_p = net.head(features.clone()).log_softmax(1)[range(3), labels]
    log_odds = log_p - torch.log1p(-log_p.exp())
    (gradient,) = torch.autograd.grad(log_odds.sum(), features)
    close(maps.difference, (features.detach() * gradient).sum(1))


def test_weightings_of_a_head_whose_gradient_varies_over_space() -> None:
    """Score Σ_c w_c Σ_ij A², so that the gradient is 2 w A."""
    features = torch.rand(2, 3, 4, 5, dtype=torch.float64) - 0.3
    weight = torch.randn(2, 3, dtype=torch.float64)

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().sum((2, 3)) @ weight.T

    net = Squares()
    labels = torch.tensor([1, 0])
    w = weight[labels][:, :, None, None]
    expected = {
        "elementwise": (2 * w * features**2).sum(1),
        "channel_mean": (features * (2 * w * features).mean((2, 3), keepdim=True)).sum(1),
        "xgrad": (
            features
            * (2 * w * features**2).sum((2, 3), keepdim=True)
            / features.sum((2, 3), keepdim=True)
        ).sum(1),
    }
    sums = {}
    for weighting, formula in expected.items():
        maps = explain(net, features, labels, target_layers=net.layer, weighting=weighting)
        close(maps.true, formula)
        sums[weighting] = maps.true.sum((1, 2))
    close(sums["xgrad"], sums["elementwise"])  # XGrad-CAM keeps the first-order total


@pytest.mark.parametrize("weighting", ["channel_mean", "xgrad"])
def test_weightings_agree_where_the_gradient_is_uniform(weighting: str) -> None:
    net, features = on_features(4), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    plain = explain(net, features, target_layers=net[0])
    close(explain(net, features, target_layers=net[0], weighting=weighting).true, plain.true)


def test_xgrad_of_channels_that_are_zero_or_sum_to_zero_is_finite() -> None:
    net, features = on_features(2, 2, nn.ReLU()), torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    features[0, 1] = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert explain(net, features, target_layers=net[0], weighting="xgrad").true.isfinite().all()


def test_volumes(refused: Refused) -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.Conv3d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).double()
    x = torch.randn(2, 1, 4, 8, 6, dtype=torch.float64)
    maps = explain(net, x, torch.tensor([0, 1]), target_layers=net[1])
    relu = F.relu(net[:2](x).detach())
    close(maps.true, cam(relu, net[-1].weight.detach()))
    assert maps.true.shape == (2, 2, 4, 3)
    assert maps.normalized((4, 8, 6)).difference.shape == x[:, 0].shape
    both = explain(net, x, torch.tensor([0, 1]), target_layers=[net[0], net[1]])
    assert both.true.shape == (2, 4, 8, 6)


def test_a_video_classifier() -> None:
    from torchvision.models.video import r3d_18

    net = r3d_18(weights=None, num_classes=3).double().eval()
    clips = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    maps = explain(net, clips, torch.tensor([2, 1]), 0)
    assert maps.true.ndim == 4
    close(maps.true.flatten(1).sum(1) + net.fc.bias.detach()[[2, 1]], maps.true_score)


def test_tokens_through_a_reshape_transform() -> None:
    """Patch tokens (B, N, C), averaged: a pooled linear head in another layout."""
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 2)).double()
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[1](self.net[0](x).mean(1))

    def grid(output: Tensor) -> Tensor:
        return output.transpose(1, 2).reshape(-1, 4, 2, 3)

    labels = torch.tensor([0, 1])
    expected = cam(grid(tokens), net[1].weight.detach())
    by_argument = explain(Pooled(), tokens, labels, target_layers=net[0], reshape_transform=grid)
    layer = TargetLayer("tokens", net[0], grid)
    close(by_argument.true, expected)
    close(explain(Pooled(), tokens, labels, target_layers=layer).true, expected)


def test_scores_may_be_callables(pooled_net: Make) -> None:
    net, x = pooled_net(3), images(2)
    weight = net.fc.weight.detach()
    maps = explain(net, x, lambda logits: 2 * logits[0], [lambda z: z[1], lambda z: z[2]])
    relu = F.relu(net.backbone(x).detach())
    close(maps.true, cam(relu, 2 * weight[[0, 0]]))
    close(maps.false, cam(relu, weight[[1, 2]]))
    assert maps.true_class.tolist() == maps.false_class.tolist() == [-1, -1]
    assert maps.true_from == "score"


def test_a_vector_of_logits_is_one_logit_each(pooled_net: Make) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled_net(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, 0]

    net, x = Flat(), images(2)
    flat = explain(net, x, target_layers=net.net.features)
    assert flat.logits.shape == (2, 1)
    close(flat.true, explain(net.net, x).true)


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
    net, x = pooled_net(), images(3)
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


# --- several layers ---------------------------------------------------------------------------


class TwoGrids(nn.Module):
    """``fine`` gives the features, ``coarse`` their block means; both reach the logits."""

    def __init__(self, block: int | tuple[int, int]) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Identity(), nn.Identity()
        self.pool = nn.AvgPool2d(block)
        self.fc = nn.Linear(1, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.coarse(self.pool(self.fine(x))).mean((2, 3)))

    def spread_of_coarse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The coarse map, and what of it is in the average of both layers' maps."""
        coarse, fine = (explain(self, x, 0, target_layers=one).true for one in self.children_maps())
        both = explain(self, x, 0, target_layers=list(self.children_maps())).true
        return coarse, 2 * both - fine

    def children_maps(self) -> tuple[nn.Module, nn.Module]:
        return self.coarse, self.fine


def test_layers_are_averaged_and_keep_their_sum(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    chosen = [net.features, net.first]
    single = [explain(net, x, labels, target_layers=layer) for layer in chosen]
    both = explain(net, x, labels, target_layers=chosen)
    assert both.true.shape == (3, 8, 8)  # the finest
    for side in ("true", "false", "difference"):
        sums = torch.stack([getattr(maps, side).sum((1, 2)) for maps in single])
        close(getattr(both, side).sum((1, 2)), sums.mean(0))


def test_layers_of_one_size_are_averaged_cell_by_cell() -> None:
    net = TwoGrids(1)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    coarse, spread = net.spread_of_coarse(x)
    close(spread, coarse)


@pytest.mark.parametrize("block", [2, 3, (1, 4), (2, 5)])
def test_every_cell_keeps_its_sum_and_its_place(block: int | tuple[int, int]) -> None:
    down, right = (block, block) if isinstance(block, int) else block
    net = TwoGrids(block)
    for row in range(4):
        for column in range(3):
            x = torch.zeros(1, 1, 4 * down, 3 * right, dtype=torch.float64)
            place = slice(row * down, (row + 1) * down), slice(column * right, (column + 1) * right)
            x[0, 0][place] = 1
            coarse, spread = net.spread_of_coarse(x)
            close(spread.sum(), coarse.sum())
            share = spread[0] / coarse.sum()
            assert share.min() > -1e-12
            densest = share.max()
            assert torch.isclose(share[place].max(), densest)
            rows, columns = (torch.arange(n, dtype=torch.float64) for n in share.shape)
            centre = (share.sum(1) @ rows).item(), (share.sum(0) @ columns).item()
            middle = row * down + (down - 1) / 2, column * right + (right - 1) / 2
            if 0 < row < 3:
                assert centre[0] == pytest.approx(middle[0])
            if 0 < column < 2:
                assert centre[1] == pytest.approx(middle[1])
            assert abs(centre[0] - middle[0]) < down / 2  # at an edge, within the cell
            assert abs(centre[1] - middle[1]) < right / 2


def test_grids_that_do_not_divide_each_other_keep_their_sum() -> None:
    class Odd(TwoGrids):
        def __init__(self) -> None:
            super().__init__(1)
            self.pool = nn.AdaptiveAvgPool2d((3, 5))

    coarse, spread = Odd().spread_of_coarse(torch.randn(2, 1, 7, 8, dtype=torch.float64))
    assert coarse.shape == (2, 3, 5)
    close(spread.sum((1, 2)), coarse.sum((1, 2)))


def test_layers_of_images_and_volumes_do_not_mix(refused: Refused) -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume, self.image = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.image(self.volume(x).mean(2)).mean((2, 3))

    net = Flattens()
    with refused("mix images and volumes"):
        explain(net, torch.randn(1, 2, 3, 4, 4), target_layers=[net.volume, net.image])


# --- normalisation ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("classes", [1, 2])
def test_invariant_1_through_a_model(pooled_net: Make, classes: int) -> None:
    net, x, labels = pooled_net(classes), images(), torch.tensor([0, 1, 1])
    maps, swapped = explain(net, x, labels), explain(net, x, 1 - labels)
    assert torch.equal(maps.difference, maps.true - maps.false)
    close(swapped.difference, -maps.difference)
    close(swapped.margin, -maps.margin)
    d, mirrored = maps.normalized((9, 9)).difference, swapped.normalized((9, 9)).difference
    close(d + mirrored, torch.ones_like(d))


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


def test_the_first_component_is_that_of_numpy_with_the_differences_sign() -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    net = on_features(3)
    with torch.no_grad(), capture(net, net[0]) as captured:
        component = captured.first_component(net(features), 0).numpy()
    weight = (net[-1].weight[0] - net[-1].weight[1]).detach()
    for sample, result in zip(features, component, strict=True):
        cells = (sample * weight[:, None, None] / 20).reshape(3, 20).T.numpy()
        centred = cells - cells.mean(0)
        direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        expected = centred @ direction
        expected *= np.sign(expected @ cells.sum(1))
        np.testing.assert_allclose(result.ravel(), expected, rtol=1e-9, atol=1e-12)


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


# --- invariants 2 to 5 ------------------------------------------------------------------------


def check_completeness(net: nn.Module, size: int) -> None:
    x = images(2, size)
    true, false = torch.tensor([0, 2]), torch.tensor([1, 1])
    maps = explain(net, x, true, false)
    bias = [module for module in net.modules() if isinstance(module, nn.Linear)][-1].bias.detach()
    logits = net(x).detach()
    close(logits, maps.logits)
    for side, label in ((maps.true, true), (maps.false, false)):
        logit = logits[range(2), label]
        assert torch.all((side.sum((1, 2)) + bias[label] - logit).abs() <= 1e-12 * logit.abs())
    close(maps.residual, bias[true] - bias[false])


@pytest.mark.parametrize("name", [names[0] for names in EXACT.values()])
def test_invariant_2_the_map_sums_to_the_logit(classifier: Make, name: str) -> None:
    check_completeness(classifier(name, num_classes=3), 75 if "inception" in name else 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for names in EXACT.values() for name in names[1:]])
def test_invariant_2_for_the_larger_models(classifier: Make, name: str) -> None:
    check_completeness(classifier(name, num_classes=3), 64)


def test_invariant_2_holds_in_training_mode_with_dropout(pooled_net: Make) -> None:
    net, x, labels = pooled_net().train(), images(), torch.tensor([0, 1, 0])
    with capture(net) as captured:
        logits = net(x)
        maps = captured.maps(logits, labels)
    close(maps.true.sum((1, 2)) + net.fc.bias[labels], logits[range(3), labels])
    assert not torch.allclose(logits, net.eval()(x))  # dropout did something


@pytest.mark.parametrize(
    ("name", "size", "arguments", "grid"),
    [
        ("alexnet", 64, {}, (1, 1)),
        ("vgg11", 64, {}, (2, 2)),
        ("squeezenet1_1", 64, {}, (3, 3)),
        ("mobilenet_v3_small", 64, {}, (2, 2)),
        ("convnext_tiny", 64, {}, (2, 2)),
        ("maxvit_t", 224, {}, (7, 7)),
        ("vit_b_32", 96, {"image_size": 96}, (3, 3)),
    ],
)
def test_other_heads_give_finite_first_order_maps(
    classifier: Make, name: str, size: int, arguments: dict[str, int], grid: tuple[int, int]
) -> None:
    net = classifier(name, torch.float32, num_classes=3, **arguments)
    maps = explain(net, images(2, size).float(), 2, "runner-up")
    assert maps.true.shape == (2, *grid)
    assert maps.difference.isfinite().all()
    assert maps.difference.abs().sum() > 0
    torch.testing.assert_close(maps.residual, maps.margin - maps.difference.sum((1, 2)))


def test_invariant_3_a_vector_added_to_every_row_changes_no_difference(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 0])
    before = explain(net, x, labels)
    with torch.no_grad():
        net.fc.weight += 10 * torch.randn(5, dtype=torch.float64)
        net.fc.bias += 3
    after = explain(net, x, labels)
    close(after.difference, before.difference)
    close(after.margin, before.margin)
    close(after.residual, before.residual)
    close(after.logits.softmax(1), before.logits.softmax(1))
    shift = after.logits - before.logits
    close(shift[:, 0], shift[:, 1])
    assert (after.true - before.true).abs().max() > 0.1
    assert torch.all(after.common_mode_share > before.common_mode_share)


@pytest.mark.parametrize("weighting", ["elementwise", "channel_mean", "xgrad"])
@pytest.mark.parametrize("false", ["runner-up", "rest"])
@pytest.mark.parametrize("layers", [["features"], ["first", "features"]])
def test_invariant_4_samples_do_not_see_each_other(
    pooled_net: Make, layers: list[str], false: str, weighting: str
) -> None:
    net, x, labels = pooled_net(3), images(5), torch.tensor([0, 2, 1, 1, 0])
    chosen = [getattr(net, layer) for layer in layers]

    def tensors(samples: Tensor) -> list[Tensor]:
        maps = explain(
            net, x[samples], labels[samples], false, target_layers=chosen, weighting=weighting
        )
        return [
            *(maps.true, maps.false, maps.logits, maps.margin, maps.residual),
            *(maps.common_mode_share, *maps.normalized((8, 8))),
        ]

    whole = tensors(torch.arange(5))
    order = torch.tensor([3, 0, 4, 2, 1])
    for expected, shuffled in zip(whole, tensors(order), strict=True):
        close(shuffled, expected[order])
    singles = zip(*(tensors(torch.tensor([index])) for index in range(5)), strict=True)
    for expected, single in zip(whole, singles, strict=True):
        close(torch.cat(single), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("kind", ["varied", "constant", "one pixel"])
def test_invariant_5_values_and_gradients_are_finite(kind: str, scale: float) -> None:
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


def test_invariant_5_a_batch_of_none(pooled_net: Make) -> None:
    net = pooled_net()
    maps = explain(net, images(0), torch.zeros(0, dtype=torch.int64))
    assert maps.true.shape == (0, 4, 4)
    assert maps.residual.shape == maps.margin.shape == (0,)
    assert maps.normalized((8, 8)).difference.shape == (0, 8, 8)


# --- invariant 6: nothing is left behind ------------------------------------------------------


class Failing(nn.Module):
    """Stands in for the head, and raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def state(net: nn.Module) -> list[object]:
    """Everything that must be as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, module.training) for name, module in net.named_modules()],
        [[len(getattr(module, kind)) for kind in hooks] for module in net.modules()],
        [
            (name, parameter.requires_grad, parameter.tolist(), id(parameter.grad))
            for name, parameter in net.named_parameters()
        ],
        [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    ]


def in_mixed_state(net: nn.Module) -> nn.Module:
    """Modules in different modes, frozen and trained parameters, gradients here and there."""
    net.train()
    net.features.eval()
    net.first.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    return net


CALLERS = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("event", ["success", "before", "behind", "maps", "KeyboardInterrupt"])
@pytest.mark.parametrize("way", ["explain", "capture", "several layers"])
def test_invariant_6_the_model_is_left_as_it_was(
    pooled_net: Make, way: str, event: str, caller: str
) -> None:
    net, x = in_mixed_state(pooled_net()), images(2)
    expected: type[BaseException] | None = None
    if event in ("behind", "KeyboardInterrupt"):
        expected = KeyboardInterrupt if event == "KeyboardInterrupt" else ZeroDivisionError
        net.relu = Failing(expected())
    elif event == "before":
        expected, net.first = ZeroDivisionError, Failing(ZeroDivisionError())
    elif event == "maps":
        expected = Exception
    label = 7 if event == "maps" else 1
    layers = [net.first, net.features] if way == "several layers" else net.features

    with CALLERS[caller]():
        before = state(net)
        with pytest.raises(expected) if expected else nullcontext():
            if way == "explain":
                explain(net, x, label, target_layers=layers)
            else:
                with capture(net, layers) as captured:
                    captured.maps(net(x), label)
        assert state(net) == before


def test_a_capture_can_be_entered_again_but_not_twice_at_once(
    pooled_net: Make, refused: Refused
) -> None:
    net, x = pooled_net(), images()
    captured = capture(net)
    results = []
    for _ in range(2):
        with captured:
            results.append(captured.maps(net(x)).true)
    assert torch.equal(*results)
    with captured, refused("open already"), captured:
        pass
    assert not net.features._forward_hooks


def test_evaluation_mode_puts_every_module_back(pooled_net: Make) -> None:
    net = in_mixed_state(pooled_net())
    before = state(net)
    net.relu = Failing(ZeroDivisionError())
    x = images()
    with pytest.raises(ZeroDivisionError), evaluation_mode(net):
        net(x)
    net.relu = nn.ReLU(inplace=True)
    with evaluation_mode(net):
        assert not any(module.training for module in net.modules())
    assert state(net) == before


def test_explain_works_in_evaluation_mode(pooled_net: Make) -> None:
    net, x = pooled_net(), images()
    expected = explain(net, x).true
    assert torch.equal(explain(net.train(), x).true, expected)
    assert net.training


# --- callers, modes, wrappers -----------------------------------------------------------------


@pytest.mark.parametrize("caller", CALLERS)
def test_explaining_under_every_grad_mode(pooled_net: Make, caller: str) -> None:
    net, x, labels = pooled_net(), images(2), torch.tensor([0, 1])
    relu = F.relu(net.backbone(x).detach())
    with CALLERS[caller]():
        maps = explain(net, x, labels)
    close(maps.true, cam(relu, net.fc.weight.detach()))
    close(maps.logits, net(x).detach())
    assert not any(t.requires_grad for t in vars(maps).values() if isinstance(t, Tensor))


def test_images_and_labels_may_be_made_in_inference_mode(pooled_net: Make) -> None:
    net = pooled_net()
    with torch.inference_mode():
        x, labels, others = images(2), torch.tensor([0, 1]), torch.tensor([1, 0])
        maps = explain(net, x, labels, others)
    relu = F.relu(net.backbone(x.clone()).detach())
    close(maps.true, cam(relu, net.fc.weight.detach()))


def test_a_layer_may_hand_its_input_on_in_inference_mode() -> None:
    net = on_features(3)
    with torch.inference_mode():
        features = images(2)
        maps = explain(net, features, torch.tensor([0, 1]), target_layers=net[0])
    close(maps.true, cam(features, net[-1].weight.detach()))


def test_explaining_keeps_no_graph_before_the_layer_and_calls_the_model_once(
    pooled_net: Make,
) -> None:
    net, seen = pooled_net(), []
    net.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    net.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    explain(net, images())
    assert seen == [False, True]


def test_a_capture_changes_no_logit(pooled_net: Make) -> None:
    net, x = pooled_net(), images()
    with capture(net):
        inside = net(x)
    assert torch.equal(inside, net(x))


def test_one_capture_serves_many_forward_passes(pooled_net: Make) -> None:
    net, batches = pooled_net(), [images() for _ in range(3)]
    expected = [explain(net, batch).true for batch in batches]
    with torch.no_grad(), capture(net) as captured:
        for batch, true in zip(batches, expected, strict=True):
            assert torch.equal(captured.maps(net(batch)).true, true)
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("train", [False, True])
def test_in_place_ops_behind_the_layer_do_not_touch_the_record(train: bool) -> None:
    net = on_features(4, 2, nn.LeakyReLU(0.5, inplace=True))
    features = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    kept = features.clone()
    with torch.set_grad_enabled(train), capture(net, net[0]) as captured:
        maps = captured.maps(net(features), torch.tensor([0, 1]))
    close(maps.true, cam(F.leaky_relu(kept, 0.5), net[-1].weight))
    assert torch.equal(features, kept)


def test_a_frozen_model_is_explained(pooled_net: Make) -> None:
    net, x = pooled_net(), images()
    expected = explain(net, x).true
    net.requires_grad_(False)
    assert torch.equal(explain(net, x).true, expected)
    with capture(net) as captured:
        assert torch.equal(captured.maps(net(x)).true, expected)


def test_data_parallel_is_looked_through(pooled_net: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net, x = pooled_net(), images()
    wrapped, expected = nn.DataParallel(net), explain(net, x).true
    for layers in (None, net.features, TargetLayer("module.features", net.features)):
        assert torch.equal(explain(wrapped, x, target_layers=layers).true, expected)


@pytest.mark.parametrize("layers", [["features"], ["first", "features"]])
@pytest.mark.parametrize("train", [False, True])
def test_autocast_gives_float32_maps(pooled_net: Make, train: bool, layers: list[str]) -> None:
    net, x = pooled_net().float(), images().float()
    chosen = [getattr(net, layer) for layer in layers]
    expected = explain(net, x, 0, target_layers=chosen)
    with (
        torch.set_grad_enabled(train),
        torch.autocast("cpu", torch.bfloat16),
        capture(net, chosen) as captured,
    ):
        maps = captured.maps(net(x), 0)
    assert maps.logits.dtype == torch.bfloat16
    assert maps.true.dtype == maps.false.dtype == maps.difference.dtype == torch.float32
    torch.testing.assert_close(maps.true, expected.true, rtol=0.05, atol=2e-3)
    if train:
        objective(maps).backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["elementwise", "channel_mean", "xgrad"])
def test_half_precision_weights_give_float32_maps(
    pooled_net: Make, dtype: torch.dtype, weighting: str
) -> None:
    net, x = pooled_net(), images()
    expected = explain(net, x, 1, weighting=weighting)
    maps = explain(net.to(dtype), x.to(dtype), 1, weighting=weighting)
    assert maps.logits.dtype == dtype
    assert maps.true.dtype == maps.residual.dtype == torch.float32
    torch.testing.assert_close(maps.true, expected.true.float(), rtol=0.05, atol=2e-3)


def test_logits_may_be_an_attribute_of_the_output(pooled_net: Make) -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled_net()

        def forward(self, x: Tensor) -> object:
            return type("ModelOutput", (), {"logits": self.net(x)})

    net, x = Output(), images()
    assert torch.equal(
        explain(net, x, target_layers=net.net.features).true, explain(net.net, x).true
    )


# --- training ---------------------------------------------------------------------------------


def objective(maps: SalienceMaps) -> Tensor:
    """Uses every part of the maps, non-linearly."""
    normalized = maps.normalized((6, 6))
    return (
        F.cross_entropy(maps.logits.to(maps.true.dtype), maps.true_class)
        + maps.difference.square().sum()
        + (normalized.true - 0.3).square().mean()
        + normalized.false.pow(3).mean()
    )


def by_hand(net: nn.Module, x: Tensor, labels: Tensor) -> SalienceMaps:
    """The maps of a :class:`PooledNet`, from its features and weights; no hooks, no gradients."""
    relu = F.relu(net.backbone(x))
    logits = F.linear(relu.mean((2, 3)), net.fc.weight, net.fc.bias)
    true, false = (cam(relu, net.fc.weight[classes]) for classes in (labels, 1 - labels))
    scores = (logits[range(len(x)), classes] for classes in (labels, 1 - labels))
    return SalienceMaps(true, false, logits, *scores, labels, 1 - labels, "label")


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor | None]:
    net.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in net.parameters()]


def captured_loss(net: nn.Module, x: Tensor, labels: Tensor, layer: nn.Module) -> Tensor:
    with capture(net, layer) as captured:
        return objective(captured.maps(net(x), labels))


def test_gradients_of_maps_are_those_of_the_closed_form(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    loss = captured_loss(net, x, labels, net.features)
    assert all(parameter.grad is None for parameter in net.parameters())
    expected = objective(by_hand(net, x, labels))
    close(loss, expected)
    actual = gradients(net, loss)
    for one, other in zip(actual, gradients(net, expected), strict=True):
        close(one, other)
        assert one.abs().max() > 0


def test_a_frozen_backbone_leaves_the_gradient_of_the_head(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    expected = gradients(net, objective(by_hand(net, x, labels)))
    net.first.requires_grad_(False)
    net.features.requires_grad_(False)
    actual = gradients(net, captured_loss(net, x, labels, net.features))
    assert actual[:4] == [None] * 4
    for one, other in zip(actual[4:], expected[4:], strict=True):
        close(one, other)


@pytest.mark.parametrize(
    ("weighting", "layers"),
    [
        ("elementwise", ["features"]),
        ("elementwise", ["first", "features"]),
        ("channel_mean", ["features"]),
        ("xgrad", ["features"]),
    ],
)
def test_gradcheck_through_the_capture(weighting: str, layers: list[str]) -> None:
    """A smooth head that is not linear, so that maps depend on weights in second order."""
    net = nn.Sequential()
    net.first = nn.Conv2d(1, 2, 3, padding=1)
    net.features = nn.Conv2d(2, 2, 2, stride=2)
    net.act, net.pool, net.flatten = nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net.fc, net.last = nn.Linear(2, 2), nn.Softplus()
    net.double()
    names = [name for name, _ in net.named_parameters()]
    chosen = [getattr(net, layer) for layer in layers]

    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def maps(*parameters: Tensor) -> tuple[Tensor, ...]:
        with capture(net, chosen, weighting=weighting) as captured:
            logits = torch.func.functional_call(
                net, dict(zip(names, parameters, strict=True)), (x,)
            )
            result = captured.maps(logits, torch.tensor([0, 1]))
        return result.true, result.difference, result.residual, result.normalized().false

    assert torch.autograd.gradcheck(maps, tuple(net.parameters()))


class Checkpointed(nn.Module):
    """A :class:`PooledNet`, a part of which is recomputed in the backward pass."""

    def __init__(self, net: nn.Module, part: str, reentrant: bool) -> None:
        super().__init__()
        net.relu = nn.ReLU()  # in place on a checkpoint's input, torch itself refuses
        self.net, self.part, self.reentrant = net, part, reentrant

    def forward(self, x: Tensor) -> Tensor:
        def run(part: str, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
            if part != self.part:
                return function(value)
            return checkpoint(function, value, use_reentrant=self.reentrant)

        def front(value: Tensor) -> Tensor:
            return torch.tanh(self.net.first(value))

        def whole(value: Tensor) -> Tensor:
            inner = run("front", front, value)
            return run("head", self.net.head, run("layer", self.net.features, inner))

        return run("whole", whole, x)


REFUSED = {  # part recomputed, reentrant, training
    ("layer", True, False),
    ("layer", True, True),
    ("head", True, False),
    ("head", True, True),
    ("whole", True, False),
    ("whole", True, True),
    ("whole", False, True),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["front", "layer", "head", "whole"])
def test_activation_checkpointing_is_right_or_refused(
    pooled_net: Make, refused: Refused, part: str, reentrant: bool, train: bool
) -> None:
    plain, x, labels = pooled_net(), images().requires_grad_(), torch.tensor([0, 1, 1])
    net = Checkpointed(plain, part, reentrant)
    fails = (part, reentrant, train) in REFUSED
    with refused("checkpointing|no gradient flows") if fails else nullcontext():
        if train:
            actual = gradients(plain, captured_loss(net, x, labels, plain.features))
            expected = gradients(plain, objective(by_hand(plain, x, labels)))
            for one, other in zip(actual, expected, strict=True):
                close(one, other)
        else:
            maps = explain(net, x, labels, target_layers=plain.features)
            close(maps.true, by_hand(plain, x, labels).true.detach())
    assert not plain.features._forward_hooks


@contextmanager
def one_process_group(path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path / 'store'}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_trains_and_its_static_graph_is_refused(
    pooled_net: Make, refused: Refused, tmp_path: Path
) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    expected = gradients(net, objective(by_hand(net, x, labels)))
    with one_process_group(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(net)
        with capture(parallel) as captured:
            loss = objective(captured.maps(parallel(x), labels))
        for one, other in zip(gradients(net, loss), expected, strict=True):
            close(one, other)

        static = nn.parallel.DistributedDataParallel(pooled_net(), static_graph=True)
        for model in (static, nn.Sequential(static)):
            with refused("static_graph"):
                capture(model, static.module.features)


def test_a_models_own_static_graph_attribute_means_nothing(pooled_net: Make) -> None:
    net = pooled_net()
    net.static_graph = True
    capture(net)


# --- what is refused --------------------------------------------------------------------------


def test_compiled_models(pooled_net: Make, refused: Refused) -> None:
    net = pooled_net()
    compiled = torch.compile(net)
    for layers in (None, net.features):
        with refused("compiled .*_orig_mod"):
            capture(compiled, layers)
    capture(compiled._orig_mod)  # what the error says to pass

    partly = pooled_net()
    layer, partly.features = partly.features, torch.compile(partly.features)
    with refused("compiled"):
        capture(partly, layer)

    in_place = pooled_net()
    in_place.compile()
    with refused("compiled .*copy"):
        capture(in_place)

    head = pooled_net()
    head.fc = torch.compile(head.fc)
    capture(head, head.features)  # hooks run: the layer is outside


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_models_made_in_inference_mode(pooled_net: Make, refused: Refused, kind: str) -> None:
    net = pooled_net()
    with torch.inference_mode():
        if kind == "parameter":
            net.fc = nn.Linear(5, 2)
        else:
            net.register_buffer("scale", torch.ones(5))
    with refused("inference"):
        capture(net)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_a_forward_pass_that_turns_gradients_off(
    pooled_net: Make, refused: Refused, switch: Callable[[], AbstractContextManager], caller: str
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled_net()

        def forward(self, x: Tensor) -> Tensor:
            with switch():
                features = self.net.backbone(x)
            return self.net.head(features.clone())

    net = Wrapped()
    with (
        refused("no gradient flows .*'net.features'"),
        CALLERS[caller](),
        capture(net, net.net.features) as captured,
    ):
        captured.maps(net(images()))


def test_a_layer_that_runs_twice(refused: Refused) -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, shared, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with refused("ran twice"):
        explain(net, torch.randn(1, 3, 8, 8), target_layers=shared)


def test_a_second_forward_pass_before_the_maps(pooled_net: Make, refused: Refused) -> None:
    net, x = pooled_net(), images()
    with capture(net):
        net(x)
        with refused("'features' ran twice"):
            net(x)


def test_maps_are_taken_inside_and_once_per_forward_pass(
    pooled_net: Make, refused: Refused
) -> None:
    net, x = pooled_net(), images()
    with capture(net) as captured:
        with refused("'features' did not run"):
            captured.maps(torch.zeros(3, 2))
        logits = net(x)
        captured.maps(logits)
        with refused("'features' did not run"):
            captured.maps(logits)
        logits = net(x)
    with refused("inside the capture"):
        captured.maps(logits)
    with refused("inside the capture"):
        capture(net).maps(logits)


def test_an_error_in_the_maps_uses_the_forward_pass_up(pooled_net: Make, refused: Refused) -> None:
    net, x = pooled_net(), images()
    with torch.no_grad(), capture(net) as captured:
        with refused("class 7"):
            captured.maps(net(x), 7)
        assert not torch.is_grad_enabled()
        again = captured.maps(net(x)).true
    assert torch.equal(again, explain(net, x).true)


class Odd(nn.Module):
    """Layers that give no feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 3)
        self.pair = Odd.Pair()
        self.unused = nn.Conv2d(3, 2, 3)
        self.aside = nn.Identity()
        self.mixes_the_batch = nn.Flatten(0, 1)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.pair(self.features(x))
        self.aside(features.detach())
        rows = self.mixes_the_batch(features)
        return rows.reshape(len(x), 2, -1).mean(2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("pair", "'pair' returns a tuple"),
        ("unused", "'unused' did not run"),
        ("aside", "no gradient flows from the scores to layer 'aside'"),
        ("mixes_the_batch", r"'mixes_the_batch' gives \(6, 6, 6\) for a batch of 3"),
        ("", r"gives \(3, 2\) for a batch of 3"),
    ],
)
def test_layers_that_give_no_feature_map(refused: Refused, layer: str, message: str) -> None:
    net = Odd()
    with refused(message):
        explain(net, torch.randn(3, 3, 8, 8), target_layers=net.get_submodule(layer))


def test_layers_and_weightings_that_do_not_exist(pooled_net: Make, refused: Refused) -> None:
    net = pooled_net()
    with refused("Conv2d is not part of the model"):
        capture(net, nn.Conv2d(1, 1, 1))
    with refused("target_layers is empty"):
        capture(net, [])
    with refused("'gradcam' is unknown: pass one of elementwise, channel_mean, xgrad"):
        capture(net, weighting="gradcam")


def test_outputs_and_scores_that_cannot_be_explained(pooled_net: Make, refused: Refused) -> None:
    net, x = pooled_net(), images()
    with capture(net) as captured:
        with refused("is a tuple, not a tensor of logits"):
            captured.maps((net(x),))
        with refused("no gradient flows"):
            captured.maps(net(x).detach())
        with refused("no gradient flows"):
            captured.maps(net(x), lambda z: z[0].detach(), 1)
        with refused("no gradient flows"):
            captured.maps(net(x), 0, lambda z: torch.zeros(()))
