"""Numbers to words: intervals, signs and shares as an auditor reads them."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from diffsal.auditing.rows import Number
from diffsal.maps.numbers import NEGLIGIBLE

Finding: TypeAlias = dict[str, Any]
"""``id``, ``title``, ``says``, ``limits`` and ``numbers``."""
NOT_TAKEN = "all maps are constant"
"""Why a number of the slow methods is missing."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def make_finding(
    identity: str, title: str, says: str, limits: str, numbers: list[Number]
) -> Finding:
    """What was found, in one plain sentence, and one on its limits."""
    return {"id": identity, "title": title, "says": says, "limits": limits, "numbers": numbers}


def written(value: float | None) -> str:
    """Three decimals, or a power of ten where these would say nothing; 0 for what is negligible.

    Example:
        >>> written(-0.5), written(2.4e-7), written(None)
        ('−0.500', '2.4·10⁻⁷', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if abs(value) < NEGLIGIBLE:
        value = 0.0
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        text = f"{value + 0.0:.3f}"  # no -0
    elif 1e-4 <= abs(value) < 1e-3:
        text = f"{value:.4f}"
    else:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")


def tell(number: Number) -> str:
    """A number, its interval and on how many images.

    Example:
        >>> tell({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 9})
        '0.500 (95 % interval 0.250 to 0.750, n = 9)'
    """
    if number["mean"] is None:
        return "undefined on every image"
    if number["low"] is None:
        return f"{written(number['mean'])} (no interval, n = {number['n']})"
    return (
        f"{written(number['mean'])} (95 % interval {written(number['low'])} to "
        f"{written(number['high'])}, n = {number['n']})"
    )


def brief(number: Number) -> str:
    """A number beside one that has been told in full.

    Example:
        >>> brief({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 9})
        '0.500 (0.250 to 0.750)'
    """
    if number["low"] is None:
        return written(number["mean"])
    return f"{written(number['mean'])} ({written(number['low'])} to {written(number['high'])})"


def sign(number: Number) -> int:
    """1 or -1 where the interval lies on one side of 0, else 0.

    Example:
        >>> sign({"low": 0.1, "high": 0.3}), sign({"low": -0.1, "high": 0.3})
        (1, 0)
    """
    if number["low"] is None:
        return 0
    return int(number["low"] > 0) - int(number["high"] < 0)


def images_in_words(count: int) -> str:
    """How many images, in singular or plural.

    Example:
        >>> images_in_words(1), images_in_words(2)
        ('1 image', '2 images')
    """
    return f"{count} image{'s' * (count != 1)}"


def percent(share: float) -> str:
    """A share in percent, with one decimal where it says something.

    Example:
        >>> percent(0.25), percent(0.1234), percent(0.0001)
        ('25 %', '12.3 %', 'Under 0.1 %')
    """
    if 0 < share < 0.001:
        return "Under 0.1 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def moved(before: Number, after: Number) -> str:
    """What the stress test did with the class maps, by their distances to the frame.

    Example:
        >>> moved({"mean": 0.3}, {"mean": 0.1}), moved({"mean": 0.3}, {"mean": 0.2})
        ('made to show', 'moved towards')
    """
    if after["mean"] <= before["mean"] / 2:
        return "made to show"
    return "moved towards" if after["mean"] < before["mean"] else "brought no nearer to"


def classes_in_words(numbers: Mapping[str, Number]) -> str:
    """A number within each class, by its name.

    Example:
        >>> classes_in_words({"ill": {"mean": 0.5, "low": 0.25, "high": 0.75}})
        'ill 0.500 (0.250 to 0.750)'
    """
    return ", ".join(f"{name} {brief(number)}" for name, number in numbers.items())


def composites_in_words(skill: Number, marked: Number) -> str:
    """What the composite test found: of random regions, and of those that the maps mark.

    Example:
        >>> good = {"mean": 0.5, "low": 0.4, "high": 0.6}
        >>> bad = {"mean": -1, "low": -2, "high": -0.5}
        >>> composites_in_words(good, good).partition(":")[0]
        'The decision is made where the difference maps say, as far as this test can tell'
        >>> composites_in_words(bad, good).partition(":")[0]
        'It was not found that the decision is made where the difference maps say'
    """
    foretold = (
        "when part of one image is put into another, the maps foretell how the decision changes"
    )
    signs = {sign(skill), sign(marked)}
    if signs == {1}:
        return (
            "The decision is made where the difference maps say, as far as this test can tell: "
            f"{foretold} better than a guess that takes every place to count alike."
        )
    if 1 in signs:
        kind = "random parts but not for those that they mark"
        if sign(marked) == 1:
            kind = "the parts that they mark but not for random ones"
        return (
            "It was not found that the decision is made where the difference maps say: "
            f"{foretold} for {kind}."
        )
    worse = "worse than" if -1 in signs else "no better than"
    return (
        "It was not found that the decision is made where the difference maps say: "
        f"{foretold} {worse} a guess that takes every place to count alike."
    )
