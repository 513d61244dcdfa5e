"""How gradients weigh activations, and how several layers' maps become one, worked out by hand."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffsal.maps.salience import capture, explain

Make = Callable[..., nn.Module]
Refused = Callable[[str], AbstractContextManager[None]]


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


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
def test_weightings_agree_where_the_gradient_is_uniform(on_features: Make, weighting: str) -> None:
    net, features = on_features(4), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    plain = explain(net, features, target_layers=net[0])
    close(explain(net, features, target_layers=net[0], weighting=weighting).true, plain.true)


def test_xgrad_of_channels_that_are_zero_or_sum_to_zero_is_finite(on_features: Make) -> None:
    net, features = on_features(2, nn.ReLU()), torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    features[0, 1] = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert explain(net, features, target_layers=net[0], weighting="xgrad").true.isfinite().all()


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


def test_the_first_component_is_that_of_numpy_with_the_differences_sign(on_features: Make) -> None:
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
