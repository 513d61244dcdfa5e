"""Means, spreads and tests, against textbooks and the paper's own numbers."""

import itertools

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
    told_by_low,
)

TASKS = ("iris", "face")
METHODS = ("baseline", "difference", "per-class", "contrast")


@pytest.mark.parametrize(("task", "method"), list(itertools.product(TASKS, METHODS)))
def test_the_papers_subsets_give_its_table_2(task, method, paper, table_2):
    found = mean_over_subsets(paper[task][method])
    mean, std = table_2[task][method]
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


def test_told_by_low_counts_pairs():
    """As the share of pairs in which the control is higher; of equals, half."""
    assert told_by_low([0.0, 1.0], [2.0, 3.0, 4.0]) == 1
    assert told_by_low([5.0], [2.0, 3.0]) == 0
    assert told_by_low([1.0, 2.0], [2.0, 3.0]) == 3.5 / 4
