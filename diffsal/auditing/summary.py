"""The audit in a few sentences, alone and beside a reference model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from diffsal.auditing.rows import Measured, Number, described
from diffsal.auditing.wording import Finding, images_in_words, moved, percent, sign, tell, written
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
    numbers = {number["name"]: number for finding in findings for number in finding["numbers"]}
    return [
        _audited(numbers, measured, index, split),
        _common_mode(numbers, measured),
        *_caveats(measured),
        *_occlusion(numbers),
        _stress_test(numbers, measured),
        "No number here, and no set of them, proves that a heatmap shows what decides: each tells "
        "what was looked for and whether it was found.",
    ]


def _audited(numbers: _Numbers, measured: Measured, index: Index, split: str) -> str:
    where = "the test split" if split == "test" else "the index"
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


def _occlusion(numbers: _Numbers) -> list[str]:
    difference, true = (numbers[f"occlusion_{kind}"] for kind in ("difference", "true"))
    if difference["mean"] is None:
        return []
    relations = {
        1: "lowers the margin",
        0: "was not found to move the margin",
        -1: "raises the margin, against what they say",
    }
    return [
        f"Occluding what its difference maps mark {relations[sign(difference)]} (rank "
        f"correlation {written(difference['mean'])}); occluding what its class maps mark "
        f"{relations[sign(true)]} ({written(true['mean'])})."
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


def compare(measured: Measured, other: Measured) -> dict[str, Any]:
    """Two models on the images that both could be measured on.

    Args:
        measured: the model's.
        other: the reference's, of the same samples.

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
            {
                "model": mine.number(*column),
                "reference": yours.number(*column),
                "difference": described(
                    *column,
                    interval(mine.column(column[0]) - yours.column(column[0]), measured.seed),
                ),
            }
            for column in _COMPARED
        ],
    }
