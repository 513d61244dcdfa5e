"""Means, spreads and intervals against other computations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsal.protocol.statistics import (
    Estimate,
    holm,
    mean_over_seeds,
    mean_over_subsets,
    paired_difference,
)

# The paper's Tables 3 and 4 (arXiv, Piland, Sweet, Czajka): means by subset, in its order.
PAPER = {
    "iris": {
        "baseline": (0.685, 0.706, 0.730, 0.718, 0.887, 0.858, 0.919),
        "difference": (0.662, 0.682, 0.710, 0.698, 0.880, 0.848, 0.912),
        "per-class": (0.641, 0.649, 0.693, 0.675, 0.862, 0.838, 0.904),
        "contrast": (0.691, 0.712, 0.735, 0.724, 0.889, 0.861, 0.920),
    },
    "face": {
        "baseline": (0.376, 0.576, 0.637, 0.713, 0.602, 0.710),
        "difference": (0.348, 0.555, 0.710, 0.804, 0.693, 0.797),
        "per-class": (0.351, 0.576, 0.704, 0.801, 0.678, 0.796),
        "contrast": (0.452, 0.557, 0.624, 0.715, 0.599, 0.707),
    },
}
TABLE_2 = {
    "iris": {
        "baseline": (0.786, 0.091),
        "difference": (0.770, 0.097),
        "per-class": (0.752, 0.103),
        "contrast": (0.790, 0.089),
    },
    "face": {
        "baseline": (0.602, 0.029),
        "difference": (0.651, 0.041),
        "per-class": (0.651, 0.023),
        "contrast": (0.609, 0.029),
    },
}


@pytest.mark.parametrize(("task", "method"), [(t, m) for t in PAPER for m in PAPER[t]])
def test_the_papers_subsets_give_its_table_2(task, method):
    found = mean_over_subsets(PAPER[task][method])
    mean, std = TABLE_2[task][method]
    # The paper rounds the subsets' means before and the result after.
    assert abs(found.value - mean) <= 0.001
    if task == "iris":
        assert abs(found.std - std) <= 0.001
    else:  # what it prints for faces is no spread over subsets
        assert found.std > 3 * std


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_never_lowers(p_values):
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert max(adjusted) <= 1
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert adjusted[int(np.argmin(p_values))] == min(1, len(p_values) * min(p_values))


def test_holm_of_a_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_what_has_no_spread_has_none():
    assert mean_over_seeds([]) is None
    assert mean_over_seeds([0.5]) == Estimate(0.5, None, count=1)
    assert paired_difference({0: 0.5}, {0: 0.25}) == Estimate(0.25, count=1)
    assert paired_difference({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25}) == Estimate(0.25, count=2)
    assert paired_difference({0: 0.5}, {1: 0.25}) is None


def test_differences_use_the_seeds_that_both_have():
    found = paired_difference({0: 0.9, 1: 0.8, 2: 0.1}, {0: 0.5, 1: 0.6, 7: 0.0})
    assert found.count == 2
    assert found.value == pytest.approx(0.3)
