"""The layers that maps could be taken of, side by side, so that a person can choose."""

from dataclasses import dataclass

from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.layouts import Grid
from diffsal.maps.looking import Candidate, look_at
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import get_target_layer, unwrap


@dataclass(frozen=True)
class LayerRow:
    """A layer that all of the logits pass through.

    Attributes:
        name: dotted.
        layout: how its output lies over the image, as ``--reshape`` takes it.
        grid: its cells along each axis.
        exactness: ``|residual| / |margin|`` of one image: 0 where maps add up to the margin, biases
            apart; 1 and more where they explain nothing. ``None``: no map could be taken.
        chosen: whether maps are taken there unless another layer is named.
    """

    name: str
    layout: str
    grid: Grid
    exactness: float | None
    chosen: bool


def layer_table(model: nn.Module, image: Tensor) -> list[LayerRow]:
    """Every layer that could be named, in the order in which they run.

    Args:
        model: in any mode; it is left as it was.
        image: (1, C, H, W), as the model takes it.

    Raises:
        DiffsalError: see :func:`diffsal.maps.looking.look_at`.

    Example:
        >>> import torch
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2, bias=False)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 8, 3), *head)
        >>> rows = layer_table(model, torch.rand(1, 3, 16, 16))
        >>> [(row.name, row.grid, row.chosen) for row in rows]
        [('0', (14, 14), False), ('1', (14, 14), False), ('2', (12, 12), True)]
        >>> rows[-1].exactness < 1e-3
        True
    """
    _, inner = unwrap(model)
    look = look_at(inner, image)
    named = [
        one for one in look.candidates if (one.carries_all and one.alive) or one in look.chosen
    ]
    return [_row(inner, one, image, one in look.chosen) for one in named]


def _row(model: nn.Module, candidate: Candidate, image: Tensor, chosen: bool) -> LayerRow:
    grid, exactness = candidate.layout.grid, None
    try:
        layer = get_target_layer(model, str(candidate), image)
        maps = explain(model, image, target_layers=layer)
        grid = tuple(maps.true.shape[1:])
        exactness = float(maps.residual.abs() / maps.margin.abs().clamp(min=1e-12))
    except DiffsalError:  # told by the dash in the table
        pass
    return LayerRow(str(candidate), str(candidate.layout), grid, exactness, chosen)
