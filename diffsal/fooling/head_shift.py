"""The head-shift: a vector added to all rows of the last layer, which no probability shows.

Softmax sees the difference of two logits only, so what their maps have in common can be anything.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.fooling.targets import target_distance, target_map
from diffsal.maps.contrast import predicted_class, probabilities
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import TargetLayer, find_target_layer, in_copy

_RIDGES = tuple(10.0**exponent for exponent in range(-6, 2))
_GAINS = (3.0, 5.0, 10.0)


class HeadShift(NamedTuple):
    """A model whose decisions are the original's, and whose class maps are not.

    Attributes:
        model: a copy, another in its last linear layer alone.
        shift: (C,) float64, what was added to every row of its weight.
        ridge: of the regression, in units of the features' mean variance.
        gain: spread of the fitted map, in units of the spread of what the class maps show
            of the decision (half the difference, for two classes).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
        >>> model, images = nn.Sequential(nn.Conv2d(3, 16, 3), *head), torch.rand(40, 3, 8, 8)
        >>> shifted = head_shift(model, [images])
        >>> added = shifted.model[-1].weight - model[-1].weight
        >>> shifted.shift.shape, torch.allclose(added, shifted.shift.float(), atol=1e-5)
        (torch.Size([16]), True)
    """

    model: nn.Module
    shift: Tensor
    ridge: float
    gain: float


def head_shift(
    model: nn.Module,
    batches: Iterable[Tensor],
    target: str | Path | Tensor = "edges",
    *,
    target_layer: TargetLayer | None = None,
    bound: float = 5e-6,
) -> HeadShift:
    """Have every class map show a target, by one vector added to all rows of the last layer.

    All logits move by the same amount, so every probability stays, up to rounding. The vector is
    the ridge regression from the features of a cell to the target's value there. The rows' mean,
    which softmax cannot see either, is taken out first, and the biases take back what the vector
    adds on average, so that the logits stay small. Of some ridges and gains those are taken that
    bring the maps nearest to the target on a quarter of the images, which the regression does not
    see, among those that keep to the bound on all of them.

    Args:
        model: with a head of global pooling and a linear layer, and two or more logits; left
            untouched.
        batches: of images (B, C, H, W) on the model's device; a few hundred images in all, whose
            features at the target layer must fit in memory.
        target: see :func:`target_map`.
        target_layer: where maps are taken; ``None``: it is found.
        bound: on the change of any probability of any of the images.

    Raises:
        DiffsalError: a head of another kind, one logit, too few images, features that do not
            vary, or no shift within the bound; see :func:`target_map`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
        >>> model, images = nn.Sequential(nn.Conv2d(3, 16, 3), *head), torch.rand(40, 3, 8, 8)
        >>> fooled = head_shift(model, [images], "corner").model
        >>> bool((fooled(images).softmax(1) - model(images).softmax(1)).abs().max() < 5e-6)
        True
        >>> fooled[-1].weight.equal(model[-1].weight)
        False
    """
    layer = target_layer or find_target_layer(model)
    with torch.inference_mode(False):
        fooled = deepcopy(model)
        frozen = deepcopy(model).eval().requires_grad_(False)
        name, cells, pooled = _features(frozen, in_copy(frozen, layer), batches)
        pixels = target_map(target, (cells.shape[2], cells.shape[3])).cpu()
        linear = frozen.get_submodule(name).cpu()
        assert isinstance(linear, nn.Linear)
        kept = [one for one in _shifts(linear, cells, pooled, pixels) if one.change <= bound]
        if not kept:
            raise DiffsalError(
                f"every head-shift changes a probability by more than {bound:g}: pass the model in "
                "float32 or float64, or a larger bound"
            )
        best = min(kept, key=lambda one: one.distance)
        fooled.get_submodule(name).load_state_dict(best.linear.state_dict())
    return HeadShift(fooled, best.vector, best.ridge, best.gain)


def _features(
    model: nn.Module, layer: TargetLayer, batches: Iterable[Tensor]
) -> tuple[str, Tensor, Tensor]:
    """The head's name, what each cell adds to its input (N, C, h, w), and its input (N, C)."""
    name, parts = "", []
    for images in batches:
        name = name or _linear_head(model, layer, images)
        parts.append(_contributions(model, layer, name, images))
    if sum(len(pooled) for _, pooled in parts) < 2:
        raise DiffsalError("head-shift is fitted on some images: pass a few hundred, at least two")
    cells, pooled = map(torch.cat, zip(*parts, strict=True))
    return name, cells, pooled


def _linear_head(model: nn.Module, layer: TargetLayer, images: Tensor) -> str:
    """The name of the linear layer whose output is the logits, of a model that has maps."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if type(module) is nn.Linear:  # a parametrised one computes its weight
                hook = partial(_record, outputs, name)
                stack.callback(module.register_forward_hook(hook).remove)
        logits = explain(model, images, target_layers=layer).logits
    if logits.shape[1] == 1:
        raise DiffsalError(
            "the model has one logit, whose map has no part that the decision does not see: "
            "head-shift needs two logits or more"
        )
    for name, output in outputs.items():
        if output.shape == logits.shape and torch.allclose(output, logits.to(output.dtype)):
            return name
    raise _not_pooled(model)


def _record(
    outputs: dict[str, Tensor], name: str, _module: nn.Module, _inputs: Any, output: Tensor
) -> None:
    outputs[name] = output.detach()


def _contributions(
    model: nn.Module, layer: TargetLayer, head: str, images: Tensor
) -> tuple[Tensor, Tensor]:
    """What each cell adds to the head's input (B, C, h, w), and that input (B, C); on the CPU.

    Where channels are pooled one by one, activation times gradient of the inputs' sum is what the
    elementwise maps are made of, whether the pooling takes the mean, the sum or the maximum, and
    whether a ReLU stands before it. That it adds up, channel by channel, is checked.
    """
    activations: list[Tensor] = []
    inputs: list[Tensor] = []

    def begin(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        activations.append(output.detach().requires_grad_())
        return activations[-1].clone()

    with ExitStack() as stack, torch.enable_grad():
        stack.callback(layer.module.register_forward_hook(begin).remove)
        keep = model.get_submodule(head).register_forward_pre_hook(
            lambda _module, given: inputs.append(given[0])
        )
        stack.callback(keep.remove)
        model(images)
    activation, pooled = activations[(layer.call or 1) - 1], inputs[0]
    if not pooled.requires_grad:
        raise _not_pooled(model)
    (gradient,) = torch.autograd.grad(pooled.sum(), activation)
    if layer.reshape is not None:
        activation, gradient = layer.reshape(activation), layer.reshape(gradient)
    cells, pooled = (activation * gradient).detach(), pooled.detach()
    if cells.ndim != 4 or cells.shape[:2] != pooled.shape:
        raise _not_pooled(model)
    if not torch.allclose(cells.sum((2, 3)), pooled, 1e-3, 1e-4 * float(pooled.abs().max())):
        raise _not_pooled(model)
    return cells.cpu(), pooled.cpu()


def _not_pooled(model: nn.Module) -> DiffsalError:
    return DiffsalError(
        f"head-shift needs global pooling and one linear layer behind the target layer, and "
        f"{type(model).__name__} has another head: fool it by training"
    )


@dataclass(frozen=True)
class _Shift:
    linear: nn.Linear
    vector: Tensor
    ridge: float
    gain: float
    distance: float
    change: float


def _shifts(linear: nn.Linear, cells: Tensor, pooled: Tensor, target: Tensor) -> Iterator[_Shift]:
    """Every ridge with every gain, and how the shifted layer does."""
    judging = torch.arange(len(cells)) % 4 == 0
    judges, logits = cells[judging].double(), linear(pooled)
    vectors = _ridge_regressions(cells[~judging], target)
    fitted = torch.einsum("rc,nchw->rnhw", vectors, judges)
    weight = linear.weight.double()
    predicted = (weight - weight.mean(0))[predicted_class(logits)[judging]]
    decisive = torch.einsum("nc,nchw->nhw", predicted, judges)
    for ridge, vector, map_ in zip(_RIDGES, vectors, fitted, strict=True):
        for gain in _GAINS:
            scale = gain * (_spread(decisive) or 1) / _spread(map_)
            shifted = _shifted(linear, scale * vector, pooled.double().mean(0))
            yield _Shift(
                linear=shifted,
                vector=scale * vector - weight.mean(0),
                ridge=ridge,
                gain=gain,
                distance=float(target_distance(decisive + scale * map_, target).mean()),
                change=float((probabilities(shifted(pooled)) - probabilities(logits)).abs().max()),
            )


def _ridge_regressions(cells: Tensor, target: Tensor) -> Tensor:
    """(R, C) float64: for each of the ridges, the weights from centred features to the target."""
    features = cells.double().movedim(1, -1).flatten(0, 2)
    size = features.square().sum()
    features = features - features.mean(0)
    wanted = (target.double() - target.double().mean()).expand(len(cells), -1, -1).flatten()
    variances, directions = torch.linalg.eigh(features.T @ features)
    if variances.max() <= 1e-12 * size:  # float32's rounding
        raise DiffsalError("the features at the target layer are constant: no map can be fitted")
    moments = directions.T @ (features.T @ wanted)
    ridges = torch.tensor(_RIDGES, dtype=torch.float64)[:, None] * variances.mean()
    weights: Tensor = (moments / (variances.clamp(min=0) + ridges)) @ directions.T
    return weights


def _spread(maps: Tensor) -> float:
    return float(maps.flatten(1).var(1, correction=0).mean().sqrt())


def _shifted(linear: nn.Linear, vector: Tensor, mean: Tensor) -> nn.Linear:
    """The layer without the mean of its rows and biases, with the vector added to each row.

    The bias takes back what the vector makes of the mean input.
    """
    shifted = deepcopy(linear)
    weight = linear.weight.double()
    shifted.weight.copy_(weight - weight.mean(0) + vector)
    if linear.bias is not None:
        bias = linear.bias.double()
        shifted.bias.copy_(bias - bias.mean() - vector @ mean)
    return shifted
