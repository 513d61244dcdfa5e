"""The audit in a few sentences, alone and beside a reference model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from diffsal.auditing.composites import CompositeTest
from diffsal.auditing.rows import Measured, Number, described
from diffsal.auditing.wording import (
    Finding,
    classes_in_words,
    composites_in_words,
    images_in_words,
    moved,
    percent,
    sign,
    tell,
    written,
)
from diffsal.data.index import Index
from diffsal.faithfulness.statistics import interval
from diffsal.maps.caveats import explains_little, is_coarse

_COMPARED = (  # columns, as they are called, with their units
    ("correct", "Accuracy", "share"),
    ("common_mode_share", "Common-mode share of the class map", "share"),
    ("true_difference", "Class map with difference map", "rank correlation"),
    ("occlusion_true", "Class map, occlusion", "rank correlation"),
    ("occlusion_difference", "Difference map, occlusion", "rank correlation"),
    ("frame_true", "Class map, in the frame", "share"),
    ("frame_difference", "Difference map, in the frame", "share"),
)
_Numbers: TypeAlias = Mapping[str, Number]  # by name


def summarize(findings: list[Finding], measured: Measured, index: Index, split: str) -> list[str]:
    """What a reader in a hurry should know, in the findings' own numbers.

    Args:
        findings: of :func:`find`.
        measured: what they are from.
        index: where the images are from.
        split: ``test`` or ``all``, the part of the index that was audited.
    """
    numbers = {
        number["name"]: number
        for finding in findings
        for number in finding["numbers"]
        if "class" not in number
    }
    return [
        _composites(numbers),
        _audited(numbers, measured, index, split),
        _common_mode(numbers, measured),
        *_caveats(measured),
        *_occlusion(numbers, measured),
        _stress_test(numbers, measured),
        "No number here, and no set of them, proves that a heatmap shows what decides: each tells "
        "what was looked for and whether it was found.",
    ]


def _composites(numbers: _Numbers) -> str:
    if "composite_skill" not in numbers:
        return "Whether the decision is made where the maps say could not be tested by composites."
    skill, marked = (numbers[f"composite_skill{kind}"] for kind in ("", "_marked"))
    if skill["mean"] is None:
        return "Composites of two images do not change its decisions: where they are made is open."
    return (
        f"{composites_in_words(skill, marked)} Composite skill {written(skill['mean'])} for random "
        f"parts, {written(marked['mean'])} for marked ones; 1 is exact, 0 is that guess."
    )


def _audited(numbers: _Numbers, measured: Measured, index: Index, split: str) -> str:
    where = "the test split" if split == "test" else "the data"
    told = f"Audited: {images_in_words(len(measured.rows))} of {where}. The model is right on "
    told += f"{percent(numbers['correct']['mean'])} of them"
    if "auroc" in numbers:
        told += f", with an area under the ROC curve of {written(numbers['auroc']['mean'])}"
    told += "."
    if split == "all" and index.split("train"):
        told += " Images for training are among them, on which numbers tend to look better."
    if measured.failed:
        told += f" {len(measured.failed)} more could not be measured."
    return told


def _common_mode(numbers: _Numbers, measured: Measured) -> str:
    if measured.outputs == 1:
        return "Its two class maps have nothing in common, as it has one output only."
    share = numbers["common_mode_share"]["mean"]
    if share is None:
        return "Its class maps are constant: they show nothing."
    exact = measured.outputs == 2 and measured.adds_up
    return (
        f"{percent(share)} of the variation of its class maps is common to both classes: "
        f"{'' if exact else 'to first order, '}no decision between the two depends on it."
    )


def _caveats(measured: Measured) -> list[str]:
    said = []
    little = sum(explains_little(row["margin"], row["residual"]) for row in measured.rows)
    if little:
        said.append(
            f"On {images_in_words(little)} the maps explain little: half the margin or more is not "
            "on them."
        )
    if measured.rows and is_coarse(measured.cells):
        cells = " × ".join(map(str, measured.cells))
        said.append(f"With {cells} cells the maps tell regions, not places.")
    if measured.squash:
        said.append(f"The model ends in a {measured.squash}: maps are of the logits before it.")
    return said


def _occlusion(numbers: _Numbers, measured: Measured) -> list[str]:
    difference, true = (numbers[f"occlusion_{kind}"] for kind in ("difference", "true"))
    if difference["mean"] is None:
        return []
    relations = {
        1: "lowers the margin",
        0: "was not found to move the margin",
        -1: "raises the margin, against what they say",
    }
    by_class = measured.by_class("occlusion_difference", "", "rank correlation")
    differs = len({sign(number) for number in by_class.values()}) > 1
    apart = f" Classes differ: {classes_in_words(by_class)}." if differs else ""
    return [
        f"Occluding what its difference maps mark {relations[sign(difference)]} (rank "
        f"correlation {written(difference['mean'])}); occluding what its class maps mark "
        f"{relations[sign(true)]} ({written(true['mean'])}).{apart}"
    ]


def _stress_test(numbers: _Numbers, measured: Measured) -> str:
    if "target_after" not in numbers:
        return "The stress test could not be applied to this model."
    before, after = numbers["target_before"], numbers["target_after"]
    flips = measured.flips
    return (
        f"In a stress test a copy's class maps were {moved(before, after)} a frame along the edges "
        f"(squared distance {written(before['mean'])} before, {written(after['mean'])} after) with "
        f"{flips or 'no'} prediction{'s' * (flips > 1)} changed."
    )


def compare(
    measured: Measured, other: Measured, tests: Sequence[CompositeTest | str] = ()
) -> dict[str, Any]:
    """Two models on the images that both could be measured on.

    Args:
        measured: the model's.
        other: the reference's, of the same samples.
        tests: the composite test of both; or why it could not be run.

    Returns:
        ``reference`` of ``audit.json``, without the reference's identity.
    """
    shared = {row["path"] for row in measured.rows} & {row["path"] for row in other.rows}
    mine, yours = (
        replace(one, rows=[row for row in one.rows if row["path"] in shared])
        for one in (measured, other)
    )
    alike = [
        float(a["predicted"] == b["predicted"]) for a, b in zip(mine.rows, yours.rows, strict=True)
    ]
    agreement = described("agreement", "Predictions alike", "share", interval(alike, measured.seed))
    return {
        "says": f"Both models predict the same class on a share of {tell(agreement)} of the "
        "images. Below, each number of the model beside the reference's, and their difference "
        "image by image.",
        "limits": "A difference tells that the two are not alike, not which of them is right; the "
        "reference is measured with the same methods, and they fail alike.",
        "agreement": agreement,
        "numbers": [
            *_skills(tests),
            *(
                {
                    "model": mine.number(*column),
                    "reference": yours.number(*column),
                    "difference": described(
                        *column,
                        interval(mine.column(column[0]) - yours.column(column[0]), measured.seed),
                    ),
                }
                for column in _COMPARED
            ),
        ],
    }


def _skills(tests: Sequence[CompositeTest | str]) -> list[dict[str, Number]]:
    """Composite skills of both, and their difference, which has no interval."""
    pair = [test.numbers[:2] for test in tests if isinstance(test, CompositeTest)]
    if len(pair) < 2:
        return []
    return [
        {"model": mine, "reference": yours, "difference": mine | _less(mine, yours)}
        for mine, yours in zip(*pair, strict=True)
    ]


def _less(mine: Number, yours: Number) -> Number:
    known = mine["mean"] is not None and yours["mean"] is not None
    return {
        "mean": mine["mean"] - yours["mean"] if known else None,
        "low": None,
        "high": None,
        "n": min(mine["n"], yours["n"]),
    }
