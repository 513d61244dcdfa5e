"""Does a map depend on what the model has learnt? Cascading randomisation."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffsal.faithfulness.statistics import Maps, rank_correlation


@dataclass(frozen=True)
class Randomization:
    """How alike a map stays while the model forgets.

    Attributes:
        layers: S names; at each stage, this layer and all above it are random.
        correlation: (B, S), rank correlation with the untouched model's map.

    Example:
        >>> result = Randomization(("fc", "features"), torch.tensor([[0.9, 0.1], [1.0, 1.0]]))
        >>> result.correlation[:, -1] > 0.5  # whose map outlives all layers?
        tensor([False,  True])
    """

    layers: tuple[str, ...]
    correlation: Tensor


def cascading_randomization(
    model: nn.Module,
    inputs: Tensor,
    explain: Callable[[nn.Module, Tensor], Maps],
    *,
    stages: int = 10,
    seed: int = 0,
) -> Randomization:
    """Randomise a copy of the model from the top down and watch the map (Adebayo et al. 2018).

    A map that survives does not show what the model has learned. Layers are taken in the reverse of
    the order in which they are registered. Every parameter is drawn anew from a normal distribution
    with the mean and standard deviation that it had, so that activations keep their scale (fresh
    initialisers, with no training, let them vanish on the way through a deep network); running
    statistics stay.

    Args:
        model: left untouched.
        inputs: (B, ...) on its device.
        explain: called with a model and the inputs, returns its maps (B, h, w). It must find its
            layer in the model that it is given, not in the original, and should name the class,
            which the copies would predict differently.
        stages: at how many depths the map is taken: evenly spaced, the top layer alone and the
            whole model among them; all layers, if there are fewer.
        seed: of the new parameters.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
        >>> images = torch.rand(3, 1, 8, 8)
        >>> brightness = cascading_randomization(model, images, lambda _, x: x[:, 0])
        >>> brightness.layers, brightness.correlation.shape
        (('2', '0'), torch.Size([3, 2]))
        >>> bool((brightness.correlation > 0.999).all())
        True
    """
    copy = deepcopy(model).eval()
    original = explain(copy, inputs)
    layers = [
        (name, parameters)
        for name, module in copy.named_modules()
        if (parameters := list(module.parameters(recurse=False)))
    ][::-1]
    stops = set(np.linspace(0, len(layers) - 1, min(stages, len(layers))).round().astype(int))
    generator = torch.Generator().manual_seed(seed)
    names, correlations = [], []
    for index, (name, parameters) in enumerate(layers):
        for parameter in parameters:
            _redraw(parameter, generator)
        if index in stops:
            names.append(name or type(copy).__name__)
            correlations.append(rank_correlation(original, explain(copy, inputs)))
    return Randomization(tuple(names), torch.stack(correlations, dim=1))


@torch.no_grad()
def _redraw(parameter: Tensor, generator: torch.Generator) -> None:
    drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
    parameter.copy_(parameter.mean() + parameter.std(correction=0) * drawn)
