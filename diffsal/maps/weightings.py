"""How gradients weigh activations, and how the maps of several layers become one."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsal.errors import DiffsalError

Weighting: TypeAlias = Literal["elementwise", "channel_mean", "xgrad"]


def _elementwise(activation: Tensor, gradient: Tensor) -> Tensor:
    return activation * gradient


def _channel_mean(activation: Tensor, gradient: Tensor) -> Tensor:
    space = tuple(range(2, activation.ndim))
    return activation * gradient.mean(space, keepdim=True)


def _xgrad(activation: Tensor, gradient: Tensor) -> Tensor:
    space = tuple(range(2, activation.ndim))
    total = activation.sum(space, keepdim=True)
    weighted = (activation * gradient).sum(space, keepdim=True)
    return activation * (weighted / total.where(total != 0, 1))


WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elementwise": _elementwise,
    "channel_mean": _channel_mean,
    "xgrad": _xgrad,
}


def mean_over_layers(maps: list[Tensor]) -> Tensor:
    """One map (B, h, w) of several layers' maps, on the finest of their grids; sums are averaged.

    Raises:
        DiffsalError: some layers give images, others volumes.

    Example:
        >>> fine, coarse = torch.ones(1, 2, 2), torch.tensor([[[8.0]]])
        >>> mean_over_layers([fine, coarse])  # the coarse cell is worth 2 in each of the four
        tensor([[[1.5000, 1.5000],
                 [1.5000, 1.5000]]])
    """
    if len(maps) == 1:
        return maps[0]
    with torch.autocast(maps[0].device.type, enabled=False):  # it would take products in half
        return torch.stack(_on_finest_grid(maps)).mean(0)


def sum_over_branches(maps: list[Tensor]) -> Tensor:
    """The maps of branches, added on the finest grid among theirs; their sums add up.

    Example:
        >>> sum_over_branches([torch.ones(1, 2, 2), torch.full((1, 1, 1), 4.0)])
        tensor([[[2., 2.],
                 [2., 2.]]])
    """
    if len(maps) == 1:
        return maps[0]
    with torch.autocast(maps[0].device.type, enabled=False):
        return torch.stack(_on_finest_grid(maps)).sum(0)


def _on_finest_grid(maps: list[Tensor]) -> list[Tensor]:
    if len({map_.ndim for map_ in maps}) > 1:
        raise DiffsalError("the target layers mix images and volumes: name layers of one kind")
    size = [max(sizes) for sizes in zip(*(map_.shape[1:] for map_ in maps), strict=True)]
    return [_spread(map_, size) for map_ in maps]


def _spread(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bring (B, h, w) maps to a finer grid; every cell's value is shared out, so sums stay.

    Along each axis the shares are those of linear interpolation, scaled to add up to one.
    """
    for axis, (old, new) in enumerate(zip(maps.shape[1:], size, strict=True), start=1):
        cells = torch.eye(old, dtype=maps.dtype, device=maps.device)
        shares = F.interpolate(cells[None], size=new, mode="linear", align_corners=False)[0]
        maps = torch.tensordot(maps.movedim(axis, -1), shares / shares.sum(1, keepdim=True), 1)
        maps = maps.movedim(-1, axis)
    return maps


def first_component(contributions: Tensor) -> Tensor:
    """(B, h, w): contributions (B, C, h, w) along their first principal axis over cells.

    Centred; of its two signs, that which agrees with the sum over the channels.

    Example:
        >>> first_component(torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])).round()
        tensor([[[-1.,  1.]]])
    """
    cells = contributions.flatten(2).transpose(1, 2)
    centred = cells - cells.mean(1, keepdim=True)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    projection = left[:, :, 0] * singular[:, :1]
    agrees = (projection * centred.sum(2)).sum(1, keepdim=True) >= 0
    return torch.where(agrees, projection, -projection).reshape(contributions[:, 0].shape)
