"""Means, spreads and paired differences over seeds and subsets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

BySeed: TypeAlias = dict[int, float]


@dataclass(frozen=True)
class Estimate:
    """A number of a table.

    Attributes:
        value: itself; a mean, where there is a spread.
        std: standard deviation, of the kind that the table's note names.
        low: lower end of its 95 % interval.
        high: upper end.
        count: of seeds or subsets that it comes from.
    """

    value: float
    std: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 1


Cell: TypeAlias = Estimate | None


def mean_over_seeds(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation; none of one value."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), std, count=len(values))


def mean_over_subsets(means: Sequence[float]) -> Cell:
    """Unweighted mean of the subsets' means, and their population standard deviation."""
    if not means:
        return None
    return Estimate(float(np.mean(means)), float(np.std(means)), count=len(means))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Cell:
    """Mean of the differences of equal seeds, and Student's 95 % interval for it.

    Of one pair, or of differences that are all the same, there is no interval.
    """
    differences = _differences(values, baseline)
    if len(differences) == 0:
        return None
    low, high = None, None
    if len(differences) > 1 and np.ptp(differences) > 0:
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        low, high = float(interval.low), float(interval.high)
    return Estimate(float(differences.mean()), None, low, high, len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values that all hold together."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = highest
    return [float(value) for value in adjusted]


def wilcoxon(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test over the seeds that both have."""
    differences = _differences(values, baseline)
    if len(differences) < 2:
        return None
    return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def _differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> NDArray[np.float64]:
    return np.array([values[seed] - baseline[seed] for seed in sorted({*values} & {*baseline})])


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
