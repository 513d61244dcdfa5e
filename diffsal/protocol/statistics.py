"""Means, spreads and paired differences over seeds and subsets, and the tables they stand in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

BySeed: TypeAlias = dict[int, float]
"""Seed to a number of the model that was trained from it."""


@dataclass(frozen=True)
class Estimate:
    """A number of a table.

    Attributes:
        value: itself; a mean, where there is a spread.
        std: standard deviation, of the kind that the table's note names.
        low: lower end of its 95 % interval.
        high: upper end.
        count: of seeds or subsets that it comes from.

    Example:
        >>> Estimate(0.75, std=0.02, count=10).count
        10
    """

    value: float
    std: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 1


Cell: TypeAlias = Estimate | None
"""Of a table; ``None``: there is no such number."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        name: what it holds: ``overall``, ``subsets``, ``differences``, ``maps``,
            ``map-differences``, ``seeds``, and of experiment (a) ``fooling``,
            ``fooling-differences``, ``fooling-tests``, ``fooling-test-differences`` or
            ``fooling-told``.
        task: whose; ``""``: of all.
        title: for people.
        note: what the numbers and their spreads are.
        columns: names.
        rows: name and cells; ``None``: there is no such number.

    Example:
        >>> row = ("baseline, crack", (Estimate(0.75), None))
        >>> table = Table("seeds", "tiles", "AUROC", "One each.", ("seed 0", "seed 1"), (row,))
        >>> dict(table.rows)["baseline, crack"][0].value
        0.75
    """

    name: str
    task: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def mean_over_seeds(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation; none of one value.

    Example:
        >>> mean_over_seeds([0.5, 0.75, 1.0])
        Estimate(value=0.75, std=0.25, low=None, high=None, count=3)
    """
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), std, count=len(values))


def mean_over_subsets(means: Sequence[float]) -> Cell:
    """Unweighted mean of the subsets' means, and their population standard deviation.

    Example:
        >>> mean_over_subsets([0.5, 1.0])
        Estimate(value=0.75, std=0.25, low=None, high=None, count=2)
    """
    if not means:
        return None
    return Estimate(float(np.mean(means)), float(np.std(means)), count=len(means))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Cell:
    """Mean of the differences of equal seeds, and Student's 95 % interval for it.

    Of one pair, or of differences that are all the same, there is no interval.

    Example:
        >>> found = paired_difference({0: 0.75, 1: 1.0, 2: 0.5}, {0: 0.5, 1: 0.5})
        >>> found.value, found.count
        (0.375, 2)
        >>> round(found.low, 3), round(found.high, 3)
        (-1.213, 1.963)
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
    """Holm's step-down adjustment (1979): p-values that all hold together.

    Example:
        >>> holm([0.25, 0.0625, 0.5])
        [0.5, 0.1875, 0.5]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = highest
    return [float(value) for value in adjusted]


def wilcoxon(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test over the seeds that both have.

    Example:
        >>> round(wilcoxon({0: 0.6, 1: 0.8, 2: 1.0}, {0: 0.5, 1: 0.5, 2: 0.5}), 3)  # 2 of 2³ signs
        0.25
    """
    differences = _differences(values, baseline)
    if len(differences) < 2:
        return None
    return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def told_by_low(values: Sequence[float], control: Sequence[float]) -> float:
    """AUROC, over models, of a low value for telling them from their controls.

    1: each is below every control; 0.5: told by chance; 0: each is above.

    Example:
        >>> told_by_low([-0.5, 0.2], control=[0.1, 0.7])
        0.75
    """
    is_fooled = [0] * len(control) + [1] * len(values)
    return float(roc_auc_score(is_fooled, [-one for one in (*control, *values)]))


def _differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> NDArray[np.float64]:
    return np.array([values[seed] - baseline[seed] for seed in sorted({*values} & {*baseline})])


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; ``None`` where none is.

    Example:
        >>> mean_known([0.5, None, 1.0])
        0.75
    """
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
