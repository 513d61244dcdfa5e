"""The head-shift: no probability moves, the class maps do."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from diffsal.fooling.head_shift import head_shift
from diffsal.fooling.targets import target_distance
from diffsal.maps.salience import explain


def frame(height: int, width: int) -> Tensor:
    pixels = torch.ones(height, width)
    pixels[1:-1, 1:-1] = 0
    return pixels


@pytest.mark.parametrize("classes", [2, 4])
def test_head_shift_is_the_ridge_regression_that_scikit_learn_finds(
    classes: int, pooled_net: Callable[..., nn.Module]
) -> None:
    model = pooled_net(classes)
    images = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    shifted = head_shift(model, images.split(7))

    features = model.backbone(images).detach().relu() / 16  # each cell's part of the mean
    judging = torch.arange(24) % 4 == 0
    seen = features[~judging].permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    centred = seen - seen.mean(0)
    penalty = shifted.ridge * np.trace(centred.T @ centred) / 5
    ridge = Ridge(alpha=penalty).fit(seen, np.tile(frame(4, 4).flatten(), 18))
    fitted = torch.einsum("c,nchw->nhw", torch.tensor(ridge.coef_), features[judging])

    rows = model.fc.weight.detach() - model.fc.weight.detach().mean(0)
    logits = model(images).detach()
    own = torch.einsum("nc,nchw->nhw", rows[logits.argmax(1)][judging], features[judging])
    spreads = [maps.flatten(1).var(1, correction=0).mean().sqrt() for maps in (own, fitted)]
    wanted = shifted.gain * spreads[0] / spreads[1] * torch.tensor(ridge.coef_)
    torch.testing.assert_close(shifted.shift + model.fc.weight.mean(0), wanted, rtol=1e-9, atol=0)

    added = shifted.model.fc.weight - model.fc.weight
    torch.testing.assert_close(added, shifted.shift.expand_as(added))
    # The maps add no more to the logits than they did, on average over the images.
    torch.testing.assert_close(
        shifted.model(images).mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_head_shift_keeps_probabilities_and_the_difference_and_moves_both_maps(
    classes: int, pooled_net: Callable[..., nn.Module]
) -> None:
    model = pooled_net(classes)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        shifted = head_shift(model, [images[:30]])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in shifted.model.parameters())

    honest, fooled = (explain(one, images[30:]) for one in (model, shifted.model))
    change = fooled.logits.softmax(1) - honest.logits.softmax(1)
    assert change.abs().max() < 1e-12
    torch.testing.assert_close(fooled.difference, honest.difference, rtol=1e-9, atol=1e-12)
    for name in ("true", "false"):
        before, after = (
            target_distance(getattr(maps, name), frame(4, 4)).mean() for maps in (honest, fooled)
        )
        assert after < before
    assert fooled.common_mode_share.mean() > 0.8


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "swin_t"])
def test_head_shift_takes_every_head_that_pools_channel_by_channel(
    name: str, classifier: Callable[..., nn.Module]
) -> None:
    model = classifier(name, num_classes=2)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    fooled = head_shift(model, images.split(2), torch.tensor([[1.0, 0], [0, 0]])).model
    honest, maps = explain(model, images), explain(fooled, images)
    torch.testing.assert_close(maps.logits.softmax(1), honest.logits.softmax(1))
    assert (maps.true - honest.true).abs().max() > honest.difference.abs().max()


def test_head_shift_works_without_biases_and_through_a_maximum() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 2, False)
    ).double()
    images = torch.randn(20, 1, 7, 7, dtype=torch.float64)
    fooled = head_shift(model, [images], "corner").model
    honest, maps = explain(model, images), explain(fooled, images)
    torch.testing.assert_close(maps.logits.softmax(1), honest.logits.softmax(1))
    torch.testing.assert_close(maps.difference, honest.difference)
    assert not torch.allclose(maps.true, honest.true)


class Twice(nn.Module):
    """Whose last convolution runs two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.conv(self.conv(self.stem(images).relu()).relu()).relu()
        logits: Tensor = self.fc(cells.mean((2, 3)))
        return logits


def test_head_shift_takes_the_call_of_a_layer_that_runs_twice() -> None:
    model, images = Twice().double().eval(), torch.randn(40, 3, 8, 8, dtype=torch.float64)
    shifted = head_shift(model, [images])
    honest, fooled = (explain(one, images) for one in (model, shifted.model))
    torch.testing.assert_close(fooled.difference, honest.difference, rtol=1e-9, atol=1e-12)
    assert (fooled.logits.softmax(1) - honest.logits.softmax(1)).abs().max() < 1e-12
    before, after = (target_distance(one.true, frame(4, 4)).mean() for one in (honest, fooled))
    assert after < before - 0.05


def flattened() -> nn.Module:
    """As VGG's: each cell has weights of its own."""
    pooled = nn.Conv2d(3, 4, 9, 8), nn.AdaptiveAvgPool2d(7), nn.Flatten()
    return nn.Sequential(*pooled, nn.Linear(196, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("name", ["flattened", "mobilenet_v3_small", "squeezenet1_1"])
def test_other_heads_are_refused(
    name: str, classifier: Callable[..., nn.Module], refused: Callable[[str], Any]
) -> None:
    model = flattened() if name == "flattened" else classifier(name, torch.float32, num_classes=2)
    with refused("head-shift needs global pooling and one linear layer"):
        head_shift(model, [torch.randn(2, 3, 64, 64)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_shifted_is_refused(
    pooled_net: Callable[..., nn.Module], refused: Callable[[str], Any]
) -> None:
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    with refused("one logit"):
        head_shift(pooled_net(1), [images])
    with refused("at least two"):
        head_shift(pooled_net(), [images[:1]])
    blind = pooled_net()
    nn.init.zeros_(blind.features.weight)
    with refused("features at the target layer are constant"):
        head_shift(blind, [images])
    with refused("more than 0: pass the model in"):
        head_shift(pooled_net(), [images], bound=0)
    with refused("one linear layer"):  # a temperature behind it
        head_shift(_Scaled(pooled_net()), [images])
    curved = nn.Sequential(pooled_net().first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())
    with refused("one linear layer"):  # as many channels, but what is pooled is not its input
        head_shift(curved.append(nn.Linear(4, 2)).double(), [images])


class _Scaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) / 2
