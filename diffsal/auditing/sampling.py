"""How many images a dear test is measured on: as many as make its means narrow enough."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np

from diffsal.auditing.rows import Number

FEWEST = 16
"""Images of the first round: of fewer, an interval says little about itself."""
_LEAST, _MOST = 1.1, 2.0  # growth of the sample by a round: few looks, and few images too many


def balanced_order(labels: Sequence[int], seed: int) -> list[int]:
    """All positions: classes take turns, each with its own images at random.

    Args:
        labels: of the images; a class that runs out leaves its turns to the others.
        seed: of the order, of which every test takes the beginning.

    Example:
        >>> order = balanced_order([0, 0, 0, 0, 1, 1], seed=0)
        >>> sorted(order), [position > 3 for position in order]
        ([0, 1, 2, 3, 4, 5], [False, True, False, True, False, False])
    """
    generator, known = np.random.default_rng(seed), np.asarray(labels)
    queues = [
        generator.permutation(np.flatnonzero(known == label)).tolist() for label in np.unique(known)
    ]
    return [one for turn in zip_longest(*queues) for one in turn if one is not None]


def in_rounds(
    order: Sequence[int], measure: Callable[[Sequence[int]], float], precision: float
) -> tuple[int, float]:
    """Measure more of the order, a round at a time, until what is known is narrow, or all is.

    Args:
        order: from :func:`balanced_order`.
        measure: called with the next round's positions, :data:`FEWEST` and then as many as would
            do if intervals narrowed with the root of the count (a tenth more at least, twice as
            many at most); tells how wide the intervals of all that is known by now are.
        precision: when they are narrow.

    Returns:
        How many positions were measured, and the last width; infinite for an empty order.

    Example:
        >>> rounds = []
        >>> in_rounds(range(99), lambda more: rounds.append(len(more)) or 1 / len(rounds), 0.4)
        (50, 0.3333333333333333)
        >>> rounds
        [16, 16, 18]
    """
    done, width = 0, math.inf
    while done < len(order) and width > precision:
        growth = min(max((width / max(precision, 1e-9)) ** 2, _LEAST), _MOST)
        upto = min(len(order), max(FEWEST, math.ceil(done * growth)))
        width = measure(order[done:upto])
        done = upto
    return done, width


def half_width(number: Number) -> float:
    """Of a mean's 95 % interval, in its own unit; infinite for a single value.

    Values that are all equal leave no doubt that more of them would lift: 0, as for no values.

    Example:
        >>> half_width({"low": 0.5, "high": 0.75, "n": 9}), half_width({"low": None, "n": 9})
        (0.125, 0.0)
    """
    if number["low"] is None:
        return math.inf if number["n"] == 1 else 0.0
    return float(number["high"] - number["low"]) / 2
