"""How well two classes are told apart at the points where a field reports it, with intervals.

The second class is the one that is looked for (attacks, the ill). Its error at a fixed error of the
other is, of presentation attacks, APCER at BPCER (ISO/IEC 30107-3); of patients, 1 - sensitivity at
a fixed specificity."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from diffsal.auditing.rows import Measured, Number, described
from diffsal.faithfulness.statistics import Interval
from diffsal.maps.contrast import class_count
from diffsal.training.loop import auroc

Scores = NDArray[np.float64]
"""(..., N) margins for the second class, in logits."""
_BINS = 15  # of the calibration error


def operating_points(measured: Measured) -> list[Number]:
    """Errors at fixed errors, the equal error rate and the calibration error.

    Intervals: 95 %, percentile bootstrap of images within each class.

    Args:
        measured: rows with margins and labels of two classes, at least one image of each.
    """
    labels = np.array([sample.label for sample in measured.samples])
    margins = measured.column("margin") * np.where(labels == 1, 1, -1)
    second, first = margins[labels == 1], margins[labels == 0]
    names = measured.names
    points: list[tuple[str, str, Callable[..., Scores]]] = [
        (
            f"miss_at_{percent}",
            f"{names[1]} missed where {percent} % of {names[0]} are taken for it",
            partial(missed, false_alarms=percent / 100),
        )
        for percent in (1, 5)
    ]
    points += [
        ("equal_error_rate", "Equal error rate", equal_error_rate),
        ("calibration_error", f"Calibration error, {_BINS} bins", calibration_error),
    ]
    return [
        described(name, label, "share", _interval(measure, second, first, measured.seed))
        for name, label, measure in points
    ]


def area_under_curve(measured: Measured) -> Number:
    """By scikit-learn; its interval, for two classes, from images drawn anew within each class.

    Raises:
        DiffsalError: the images are not of all classes.
    """
    logits = torch.stack(measured.logits).float()
    labels = np.array([sample.label for sample in measured.samples])
    area = auroc(logits, labels.tolist())
    low = high = math.nan
    margins = measured.column("margin") * np.where(labels == 1, 1, -1)
    groups = margins[labels == 1], margins[labels == 0]
    if class_count(logits) == 2 and min(map(len, groups)) > 1:
        low, high = stats.bootstrap(
            groups,
            _rank_area,
            method="percentile",
            batch=max(1, 1_000_000 // len(labels)),
            random_state=np.random.default_rng(measured.seed),
        ).confidence_interval
    if low == high:
        low = high = math.nan
    found = Interval(area, float(low), float(high), len(labels))
    return described("auroc", "Area under the ROC curve", "area", found, chance=0.5)


def missed(second: Scores, first: Scores, false_alarms: float, axis: int = -1) -> Scores:
    """Share of the second class below the threshold that at most such a share of the first passes.

    Example:
        >>> first = np.arange(100.0)  # 99 alone may pass: the threshold is 98
        >>> missed(np.array([97.5, 98.0, 98.5, 200.0]), first, false_alarms=0.01)
        array(0.5)
    """
    del axis  # the last; scipy passes it
    allowed = math.floor(false_alarms * first.shape[-1] + 1e-9)
    threshold = np.sort(first, axis=-1)[..., -1 - allowed]
    return np.asarray((second <= threshold[..., None]).mean(-1))


def equal_error_rate(second: Scores, first: Scores, axis: int = -1) -> Scores:
    """The error where both classes have the same, between thresholds by a straight line.

    Example:
        >>> equal_error_rate(np.array([1.0, 2.0, 3.0, 4.0]), np.array([-1.0, 0.0, 0.5, 1.5]))
        array(0.25)
    """
    del axis
    scores = np.concatenate([second, first], axis=-1)
    thresholds = np.sort(scores, axis=-1)
    above = -np.inf * np.ones((*thresholds.shape[:-1], 1))
    thresholds = np.concatenate([above, thresholds], axis=-1)[..., None]
    misses = (second[..., None, :] <= thresholds).mean(-1)
    alarms = (first[..., None, :] > thresholds).mean(-1)
    gap = misses - alarms  # from -1 up to 1
    after = (gap >= 0).argmax(-1)[..., None]
    before = np.maximum(after - 1, 0)

    def at(values: Scores, position: NDArray[np.intp]) -> Scores:
        return np.asarray(np.take_along_axis(values, position, -1)[..., 0])

    low, high = at(gap, before), at(gap, after)
    part = np.where(high > low, -low / np.where(high > low, high - low, 1), 0.0)
    return np.asarray(at(misses, before) + part * (at(misses, after) - at(misses, before)))


def calibration_error(second: Scores, first: Scores, axis: int = -1) -> Scores:
    """Mean distance of probability and frequency of the second class, in bins of equal width.

    Guo et al. (2017), of the probability of the second class.

    Example:
        >>> calibration_error(np.full(3, 0.0), np.full(1, 0.0))  # said 0.5, and 3 of 4 are
        array(0.25)
    """
    del axis
    scores = np.concatenate([second, first], axis=-1)
    truth = np.concatenate([np.ones_like(second), np.zeros_like(first)], axis=-1)
    share = 1 / (1 + np.exp(-np.clip(scores, -700, 700)))
    bins = np.minimum((share * _BINS).astype(int), _BINS - 1)
    gaps = [np.abs(np.where(bins == number, share - truth, 0.0).sum(-1)) for number in range(_BINS)]
    return np.asarray(sum(gaps) / scores.shape[-1])


def _interval(measure: Callable[..., Scores], second: Scores, first: Scores, seed: int) -> Interval:
    low = high = math.nan
    if min(len(second), len(first)) > 1:
        low, high = stats.bootstrap(
            (second, first),
            measure,
            method="percentile",
            n_resamples=2000,
            batch=max(1, 1_000_000 // (len(second) + len(first)) ** 2),
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    if low == high:
        low = high = math.nan
    return Interval(
        float(measure(second, first)), float(low), float(high), len(second) + len(first)
    )


def _rank_area(
    positive: NDArray[np.float64], negative: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    """The area under the ROC curve from ranks, along the last axis (Mann and Whitney)."""
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=-1), axis=-1)
    count, others = positive.shape[-1], negative.shape[-1]
    above = ranks[..., :count].sum(-1) - count * (count + 1) / 2
    return np.asarray(above / (count * others))
