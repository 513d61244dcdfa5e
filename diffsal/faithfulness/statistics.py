"""Rank correlations of maps, and means with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from diffsal.errors import DiffsalError
from diffsal.maps.salience_maps import normalize

Maps: TypeAlias = Tensor | NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Interval:
    """A mean over images and its 95 % bootstrap interval.

    Attributes:
        mean: NaN where nothing was left to average.
        low: NaN where there is no interval: fewer than two values, or all of them equal.
        high: as ``low``.
        count: how many values were no NaN.

    Example:
        >>> Interval(mean=0.5, low=0.4, high=0.6, count=20).count
        20
    """

    mean: float
    low: float
    high: float
    count: int


def rank_correlation(first: Maps, second: Maps) -> Tensor:
    """Spearman's rank correlation of each pair of maps, ties averaged.

    Of the true with the false map it is the map's sensitivity to the class: near 1, the map would
    have looked the same for the other answer. The difference map of two classes turns into its
    negative, so that for it -1 is no finding.

    Args:
        first: (B, ...) values of any unit.
        second: as many.

    Returns:
        (B,) in [-1, 1]; NaN where either is constant, up to rounding, or holds a NaN.

    Example:
        >>> first, second = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.1, 0.2, 0.3]])
        >>> rank_correlation(first, second).round()
        tensor([1.])
    """
    first = torch.as_tensor(first).flatten(1)
    second = torch.as_tensor(second, device=first.device).flatten(1)
    correlation = F.cosine_similarity(_centred_ranks(first), _centred_ranks(second), dim=1)
    return correlation.clamp(-1, 1).where(varies(first) & varies(second), torch.nan)


def interval(values: Maps | Sequence[float], seed: int = 0) -> Interval:
    """The mean of per-image numbers with its 95 % bootstrap interval (scipy, BCa, 9,999 draws).

    Images are drawn one by one: where several show the same thing, the interval is too narrow.

    Args:
        values: (N,) of any unit; NaN is left out.
        seed: of the draws.

    Example:
        >>> found = interval([0.2, 0.4, 0.9, float("nan")])
        >>> found.mean, found.count, found.low < found.mean < found.high
        (0.5, 3, True)
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    mean = float(known.mean()) if len(known) else math.nan
    if len(known) == 0 or np.ptp(known) == 0:
        return Interval(mean, math.nan, math.nan, len(known))
    bounds = stats.bootstrap(
        (known,),
        np.mean,
        batch=max(1, 1_000_000 // len(known)),  # bounds memory; the draws are the same
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(known))


def one_map_each(maps: Maps, inputs: Tensor) -> Tensor:
    """(B, h, w), on the device of the B ``inputs``: their maps, if there is one for each.

    Raises:
        DiffsalError: the maps are not B, or not in two dimensions.

    Example:
        >>> one_map_each(np.zeros((2, 4, 6)), torch.zeros(2, 3, 16, 24)).shape
        torch.Size([2, 4, 6])
    """
    maps = torch.as_tensor(maps, device=inputs.device)
    if maps.ndim != 3 or len(maps) != len(inputs):
        raise DiffsalError(
            f"maps of shape {tuple(maps.shape)} do not fit {len(inputs)} images: pass one map "
            "(height, width) for each"
        )
    return maps


def varies(values: Tensor) -> Tensor:
    """(B,) bool: whether (B, N) values are neither constant, up to rounding, nor NaN.

    Example:
        >>> varies(torch.tensor([[1.0, 2.0], [7.0, 7.0]]))
        tensor([ True, False])
    """
    return normalize(values).amax(1) > 0


def _centred_ranks(values: Tensor) -> Tensor:
    """(B, N): ranks, ties averaged, less their mean."""
    values = values.contiguous()  # or searchsorted warns
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - values.shape[1]) / 2
