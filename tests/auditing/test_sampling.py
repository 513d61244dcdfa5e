"""When a dear test has seen enough images."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffsal.auditing.rows import described
from diffsal.auditing.sampling import balanced_order, half_width, in_rounds
from diffsal.faithfulness.statistics import interval


@pytest.fixture(autouse=True)
def small_rounds():
    """Rounds as they are."""


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9))
def test_every_beginning_of_the_order_has_as_many_of_each_class_as_there_are(labels, seed):
    order = balanced_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    for taken in range(len(order)):
        drawn = [labels[position] for position in order[:taken]]
        open_classes = {one for one in labels if drawn.count(one) < labels.count(one)}
        counts = [drawn.count(one) for one in open_classes]
        assert not counts or max(counts) - min(counts) <= 1


def test_the_order_is_the_seeds():
    labels = [0, 1] * 30
    assert balanced_order(labels, 1) == balanced_order(labels, 1) != balanced_order(labels, 2)


@pytest.mark.parametrize("precision", [0.01, 0.2, 0.3, 0.4, 1.0])
def test_the_rule_is_that_of_a_loop(precision):
    values = np.random.default_rng(3).normal(size=90)
    taken = []

    def measure(positions):
        taken.extend(positions)
        return half_width(described("", "", "", interval(values[taken])))

    images, width = in_rounds(balanced_order([0] * 90, 0), measure, precision)

    count = 16
    while True:
        sample = values[balanced_order([0] * 90, 0)[:count]]
        bounds = stats.bootstrap((sample,), np.mean, random_state=np.random.default_rng(0))
        low, high = bounds.confidence_interval
        reached = (high - low) / 2
        if reached <= precision or count == 90:
            break
        wanted = count * (reached / precision) ** 2
        count = math.ceil(min(max(wanted, 1.1 * count), 2 * count, 90))
    assert images == count == len(taken)
    assert width == pytest.approx(reached)


@settings(deadline=None)
@given(st.integers(0, 300), st.lists(st.floats(0, 1), min_size=40, max_size=40), st.floats(0, 1))
def test_it_never_stops_before_all_is_narrow_or_taken(count, widths, precision):
    rounds, given_ = [], iter(widths)
    images, width = in_rounds(
        range(count), lambda more: rounds.append(list(more)) or next(given_), precision
    )
    assert [one for more in rounds for one in more] == list(range(images))
    assert all(one > precision for one in widths[: max(0, len(rounds) - 1)])
    assert images == count or (width <= precision and images >= 16)
