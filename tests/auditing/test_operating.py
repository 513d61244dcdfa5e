"""Operating points against scikit-learn's ROC curve and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from diffsal.auditing.operating import calibration_error, equal_error_rate, missed

SCORES = st.lists(st.integers(-8, 8).map(lambda level: level / 2), min_size=1, max_size=30).map(
    np.array
)


def curve(second, first):
    labels = np.r_[np.ones(len(second)), np.zeros(len(first))]
    alarms, hits, _ = roc_curve(labels, np.r_[second, first], drop_intermediate=False)
    return alarms, 1 - hits


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.05, 0.3]))
def test_missed_is_the_roc_curves(second, first, false_alarms):
    alarms, misses = curve(second, first)
    expected = misses[alarms <= false_alarms + 1e-9].min()
    assert missed(second, first, false_alarms) == pytest.approx(expected)


@given(SCORES, SCORES)
def test_equal_error_rate_is_where_the_curve_meets_the_diagonal(second, first):
    alarms, misses = curve(second, first)
    along = np.linspace(0, 1, 20001)
    steps = np.linspace(0, 1, len(alarms))
    a, m = np.interp(along, steps, alarms), np.interp(along, steps, misses)
    expected = m[np.abs(a - m).argmin()]
    assert equal_error_rate(second, first) == pytest.approx(expected, abs=2e-3)


@given(SCORES, SCORES)
def test_calibration_error_is_a_plain_loops(second, first):
    share = 1 / (1 + np.exp(-np.r_[second, first]))
    truth = np.r_[np.ones(len(second)), np.zeros(len(first))]
    total = 0.0
    for low in range(15):
        inside = (share >= low / 15) & (share < (low + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(share[inside].mean() - truth[inside].mean())
    assert calibration_error(second, first) == pytest.approx(total)


def test_measures_take_batches_of_draws():
    generator = np.random.default_rng(0)
    second, first = generator.normal(1, 1, (5, 12)), generator.normal(0, 1, (5, 9))
    for measure in (equal_error_rate, calibration_error, lambda a, b: missed(a, b, 0.2)):
        one_by_one = [measure(a, b) for a, b in zip(second, first, strict=True)]
        np.testing.assert_allclose(measure(second, first), one_by_one)


def test_the_audit_tells_them(audited):
    labels = np.array(audited.table["label"]) == "8"
    margins = np.where(labels, 1, -1) * audited.table["margin"]
    numbers = {one["name"]: one for one in audited.numbers()}
    expected = missed(margins[labels], margins[~labels], 0.05)
    assert numbers["miss_at_5"]["mean"] == pytest.approx(expected)
    number = numbers["equal_error_rate"]
    assert number["mean"] == pytest.approx(equal_error_rate(margins[labels], margins[~labels]))
    assert number["low"] <= number["mean"] <= number["high"]
    assert "equal error rate is" in audited.findings["performance"]["says"]
