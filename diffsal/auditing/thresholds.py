"""Thresholds that users set on an audit's numbers, for machines that run it; no verdict of ours."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from diffsal.auditing.wording import written
from diffsal.errors import DiffsalError, some_of

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FORM = re.compile(r"\s*([\w ]+(?:-[\w ]+)?)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Threshold:
    """What counts as failed, such as ``composite_skill < 0.1``.

    Attributes:
        name: of a number of the audit, as ``audit.json`` has it.
        relation: ``<``, ``<=``, ``>`` or ``>=``.
        value: in the number's unit.
    """

    name: str
    relation: str
    value: float

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.value:g}"

    def is_failed_by(self, mean: float | None) -> bool:
        """Whether the mean fails; one that is undefined does.

        Example:
            >>> below = parse_threshold("composite_skill < 0.1")
            >>> below.is_failed_by(0.05), below.is_failed_by(0.1), below.is_failed_by(None)
            (True, False, True)
        """
        return mean is None or _RELATIONS[self.relation](mean, self.value)


def parse_threshold(text: str) -> Threshold:
    """Read ``NAME < NUMBER``; ``<=``, ``>`` and ``>=`` as well.

    Raises:
        DiffsalError: another form.

    Example:
        >>> str(parse_threshold("auroc<=0.9"))
        'auroc <= 0.9'
    """
    found = _FORM.fullmatch(text)
    try:
        value = float(found[3]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise DiffsalError(f"{text!r} is no threshold: write one as 'composite_skill < 0.1'")
    return Threshold(found[1].strip(), found[2], value)


def failures(thresholds: Sequence[Threshold], audit: Mapping[str, Any]) -> dict[Threshold, str]:
    """The thresholds that an audit fails, and what is said of each.

    Args:
        thresholds: of the means over all images.
        audit: the content of ``audit.json``.

    Raises:
        DiffsalError: a name that no number of the audit has.
    """
    means = {
        number["name"]: number["mean"]
        for finding in audit["findings"]
        for number in finding["numbers"]
        if "class" not in number
    }
    for one in thresholds:
        if one.name not in means:
            raise DiffsalError(
                f"the audit has no number {one.name!r}; it has {some_of(sorted(means))}: all are "
                "in audit.json"
            )
    return {
        one: f"{one.name} is {written(means[one.name])}, and {one} was to fail"
        for one in thresholds
        if one.is_failed_by(means[one.name])
    }


def junit(thresholds: Sequence[Threshold], failed: Mapping[Threshold, str]) -> str:
    """A JUnit file, one test case for each threshold, as CI servers read it.

    Example:
        >>> below = parse_threshold("auroc < 0.9")
        >>> print(junit([below], {}))  # doctest: +ELLIPSIS
        <?xml version='1.0' encoding='utf-8'?>
        <testsuite name="diffsal audit" tests="1" failures="0">...
    """
    suite = ElementTree.Element(
        "testsuite", name="diffsal audit", tests=str(len(thresholds)), failures=str(len(failed))
    )
    for one in thresholds:
        case = ElementTree.SubElement(
            suite, "testcase", classname="diffsal.audit", name=f"not {one}"
        )
        if one in failed:
            ElementTree.SubElement(case, "failure", message=failed[one])
    ElementTree.indent(suite)
    text: bytes = ElementTree.tostring(suite, "utf-8", xml_declaration=True)
    return text.decode()
