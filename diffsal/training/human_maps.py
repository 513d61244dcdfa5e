"""Human maps on the grid of a model's maps."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsal.errors import DiffsalError
from diffsal.maps.salience_maps import normalize

Pool: TypeAlias = Literal["area", "max"]


def targets_for(human_maps: Tensor | None, like: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Targets in [0, 1], shaped ``like`` the maps, 0 where there is none; and which (B,) are.

    Args:
        human_maps: (B, H, W) or (B, 1, H, W), or with a depth, see
            :mod:`diffsal.training.losses`; ``None``: there are none.
        like: (B, h, w) or (B, d, h, w), the model's maps.
        pool: how they come to the size of the model's: ``area`` or ``max``.

    Raises:
        DiffsalError: human maps of another batch size, number of axes or device.

    Example:
        >>> human_maps = torch.zeros(2, 4, 4)
        >>> human_maps[0, :, :3] = 1
        >>> human_maps[1] = torch.nan
        >>> targets_for(human_maps, torch.zeros(2, 1, 2), "area")
        (tensor([[[1., 0.]],
        <BLANKLINE>
                [[0., 0.]]]), tensor([ True, False]))
    """
    if human_maps is None:
        return torch.zeros_like(like), like.new_zeros(len(like), dtype=torch.bool)
    human = _check_human(human_maps, like)
    # float64 is out of reach of autocast and TF32, and what an average of equal values loses to
    # rounding stays far below float32's, by which constant maps are told. MPS has no float64.
    human = human.to(torch.float32 if human.device.type == "mps" else torch.float64)
    pooled = _POOLS[check_pool(pool)](human, like.shape[1:])
    # 0 everywhere for a map that is constant to float32, else up to 1.
    target = normalize(pooled, eps=torch.finfo(torch.float32).eps)
    present = target.flatten(1).amax(1) > 0  # false for NaN, and so for infinity, too
    target = target.where(present.view(-1, *[1] * (like.ndim - 1)), 0)
    return target.to(like.dtype), present


def _check_human(human_maps: Tensor, like: Tensor) -> Tensor:
    """Human maps without their channel axis, if they fit the model's maps."""
    shape = tuple(human_maps.shape)
    if human_maps.ndim == like.ndim + 1 and shape[1] == 1:
        human_maps = human_maps[:, 0]
    if human_maps.ndim != like.ndim or len(human_maps) != len(like) or 0 in shape:
        sides = "depth, height, width" if like.ndim == 4 else "height, width"
        raise DiffsalError(
            f"human maps have shape {shape} for a batch of {len(like)}: pass ({len(like)}, {sides})"
            f" or ({len(like)}, 1, {sides}), with a map of NaN for a sample that has none"
        )
    if human_maps.is_complex():
        raise DiffsalError(f"human maps have type {human_maps.dtype}: pass real numbers or bool")
    if human_maps.device != like.device:
        raise DiffsalError(
            f"human maps are on {human_maps.device}, the model's maps on {like.device}: move them "
            "there, as the images"
        )
    return human_maps


def masked_mse(target: Tensor, maps: Tensor, present: Tensor | None = None) -> Tensor:
    """The mean over the batch of each present sample's mean over cells; an absent one counts 0.

    Args:
        target: (B, h, w).
        maps: (B, h, w).
        present: (B,) bool; ``None``: all are.

    Example:
        >>> target, maps = torch.zeros(2, 7, 7), torch.ones(2, 7, 7)
        >>> masked_mse(target, maps), masked_mse(target, maps, torch.tensor([True, False]))
        (tensor(1.), tensor(0.5000))
    """
    per_sample = F.mse_loss(maps, target, reduction="none").flatten(1).mean(1)
    return (per_sample if present is None else per_sample.where(present, 0)).mean()


def check_pool(pool: Pool) -> Pool:
    """Give back the name of a way to pool.

    Raises:
        DiffsalError: an unknown one.

    Example:
        >>> check_pool("max")
        'max'
    """
    """The pool, if there is such a one."""
    if pool not in _POOLS:
        raise DiffsalError(f"pool {pool!r} is unknown: pass one of {', '.join(_POOLS)}")
    return pool


def _area(maps: Tensor, size: Sequence[int]) -> Tensor:
    """The mean of what each cell of a grid of ``size`` covers of maps (B, H, W) or (B, D, H, W)."""
    for axis in reversed(range(1, maps.ndim)):  # the innermost first, which copies nothing
        shares = _shares(maps.shape[axis], size[axis - 1], maps.dtype, maps.device)
        maps = (maps.movedim(axis, -1) @ shares).movedim(-1, axis)
    return maps


@lru_cache(maxsize=16)  # the same at every training step
def _shares(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(old, new): the share of each new cell that each old pixel covers."""
    edges = torch.arange(new + 1)[:, None] * old  # in 1/new of a pixel
    covered = (edges - torch.arange(old) * new).clamp(0, new).diff(dim=0)  # (new, old), exact
    return (covered.T.to(dtype) / old).to(device)


def _max(maps: Tensor, size: Sequence[int]) -> Tensor:
    """The largest of the pixels that each cell of a grid of ``size`` touches."""
    pool = F.adaptive_max_pool2d if maps.ndim == 3 else F.adaptive_max_pool3d
    return pool(maps[:, None], tuple(size))[:, 0]


_POOLS = {"area": _area, "max": _max}
