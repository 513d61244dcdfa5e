"""What an audit's rows of numbers show, and what they do not, in words.

A finding is a few numbers with 95 % intervals, one plain sentence, and one on its limits.

The words stay within the evidence. There is no overall verdict: a low common-mode share does not
make a map faithful, and a faithful map does not make a model right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from diffsal.contrast import class_count
from diffsal.data import Index, Sample
from diffsal.errors import DiffsalError
from diffsal.faithfulness import Interval, edge_frame, interval
from diffsal.report import written
from diffsal.train import auroc

__all__ = [
    "COLUMNS",
    "MAPS",
    "Finding",
    "Measured",
    "Number",
    "Row",
    "compare",
    "find",
    "plain",
    "summarize",
]

Row: TypeAlias = dict[str, Any]
"""An image's path, label, prediction and numbers; a line of ``per-image.csv``."""
Number: TypeAlias = dict[str, Any]
"""A mean over images with its interval, as ``docs/audit.md`` documents it."""
Finding: TypeAlias = dict[str, Any]
"""``id``, ``title``, ``says``, ``limits`` and ``numbers``."""

MAPS = {"true": "Class map", "difference": "Difference map"}
"""The maps under audit, by the ending of their columns."""

COLUMNS = (
    "correct",
    "probability",
    "margin",
    "residual",
    "unexplained",
    "common_mode_share",
    "true_difference",
    "true_false",
    *(
        f"{measure}_{kind}"
        for measure in (
            *("occlusion", "insertion", "deletion", "frame", "pointing", "energy", "iou"),
            *("road", "randomised"),
        )
        for kind in MAPS
    ),
    "marked",
    "target_before",
    "target_after",
    "share_after",
    "probability_change",
    "difference_change",
    "prediction_changed",
)
"""Numbers of an image in ``per-image.csv``, after its path, label and prediction."""

_NOT_TAKEN = "no images were set aside for the slow methods, or all maps are constant"


@dataclass
class Measured:
    """What one pass over the data leaves: small rows, no images.

    Attributes:
        seed: of the bootstrap.
        rows: a row per image, in the order of the index.
        samples: their samples.
        logits: theirs, (K,) each.
        curves: theirs of insertion and deletion, (steps + 1,) each, by column.
        failed: ``path`` and ``error`` of images that could not be measured.
        cells: (h, w) of the maps.
        names: of the model's classes.
    """

    seed: int = 0
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    curves: list[dict[str, NDArray[np.float32]]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    cells: tuple[int, int] = (0, 0)
    names: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> int:
        """K, the number of the model's logits."""
        return len(self.logits[0])

    @property
    def frame_width(self) -> int | None:
        """Cells, on each side, of the edge frame; ``None``: maps too small to have a middle."""
        smallest = min(self.cells)
        return max(1, smallest // 7) if smallest > 2 else None

    def column(self, name: str) -> NDArray[np.float64]:
        """(N,), NaN where an image has no such number; ``a - b`` is taken image by image."""
        first, _, second = name.partition(" - ")
        values = np.array([row.get(first, math.nan) for row in self.rows], np.float64)
        return values - self.column(second) if second else values

    def number(self, name: str, label: str, unit: str, chance: float | None = None) -> Number:
        """The mean of a column, with its interval."""
        return _described(name, label, unit, interval(self.column(name), self.seed), chance)


def find(measured: Measured, obstacle: str) -> tuple[list[Finding], list[dict[str, str]]]:
    """The findings, in the order of the report, and what could not be found and why.

    Args:
        measured: at least one image.
        obstacle: why the stress test could not be applied; empty where it was.
    """
    left_out: dict[str, str] = {}
    findings = [
        _common_mode(measured),
        _agreement(measured),
        _occlusion(measured),
        _location(measured, left_out),
        _perturbation(measured, left_out),
        _sanity(measured, left_out),
        _performance(measured, left_out),
        _stress_test(measured, obstacle, left_out),
    ]
    return findings, [{"what": what, "why": why} for what, why in left_out.items()]


# ------------------------------------------------------------------------------------ each finding


def _common_mode(measured: Measured) -> Finding:
    title = "How much of the class map the decision cannot see"
    share = measured.number("common_mode_share", "Common-mode share of the class map", "share")
    gap = measured.number(
        "unexplained", "Margin that maps and biases do not add up to, in logits", "logits"
    )
    if measured.outputs == 1:
        return _finding(
            "common-mode",
            title,
            "Does not apply: the model has one output, so that the maps of its two classes are "
            "each other's negative and have nothing in common, by construction.",
            "That nothing is common does not make the map faithful.",
            [gap],
        )
    says = f"The common-mode share of the class map is {_told(share)}: so much of its variation "
    if share["mean"] is None:
        says = "Undefined: the maps of both classes are constant on every image."
    elif measured.outputs > 2:
        says += (
            "the label's map shares with that of its strongest rival. The choice between these two "
            "does not depend on it to first order; the choice against a third class can."
        )
    elif _adds_up(measured):
        says += (
            "is in the maps of both classes alike. Softmax sees the difference of the two logits "
            "alone, so that this part had no influence on any decision."
        )
    else:
        says += (
            "is in the maps of both classes alike. To first order it has no influence on the "
            f"decision; on this model first order leaves {_told(gap)} logits of the margin "
            "unexplained."
        )
    return _finding(
        "common-mode",
        title,
        says,
        "A low share does not make a map faithful: a model can be trained to move the difference "
        "itself, which this share does not notice. Read it with the findings on perturbation.",
        [share, gap],
    )


def _adds_up(measured: Measured) -> bool:
    """Whether maps and biases are the margin, as with a pooled linear head."""
    gap, margin = (np.abs(measured.column(name)).max() for name in ("unexplained", "margin"))
    return bool(gap <= 1e-3 * margin)


def _agreement(measured: Measured) -> Finding:
    agreement = measured.number(
        "true_difference", "Class map with difference map", "rank correlation"
    )
    says = "Undefined: one of the two maps is constant on every image."
    if agreement["mean"] is not None:
        low = int((measured.column("true_difference") < 0.5).sum())
        says = (
            "The class map orders the image's cells as the difference map does to a rank "
            f"correlation of {_told(agreement)}; on {low} of {agreement['n']} images it is below "
            "0.5. At 1 the two would tell the same."
        )
    return _finding(
        "agreement",
        "Whether class map and difference map tell the same",
        says,
        "Agreement does not make either map right. Where they disagree, it is the difference that "
        "the decision between the two classes depends on.",
        [agreement],
    )


def _occlusion(measured: Measured) -> Finding:
    maps = _of_maps(measured, "occlusion", "", "rank correlation")
    paired = _paired(measured, "occlusion", "", "rank correlation")
    relation = {
        1: "The more the difference map marks a cell, the more occluding it lowers the margin",
        0: "No relation was found between what the difference map marks and what moves the margin",
        -1: "Occluding what the difference map marks raises the margin, against what it claims",
    }[_sign(maps["difference"])]
    which = {
        1: "the difference map is the more faithful of the two",
        0: "no difference between the two was found",
        -1: "the class map is the more faithful of the two",
    }[_sign(paired)]
    says = "Undefined: maps, or margins under occlusion, are constant on every image."
    if maps["difference"]["mean"] is not None:
        says = (
            f"{relation}: rank correlation {_told(maps['difference'])}; for the class map, "
            f"{_short(maps['true'])}. Image by image, {which}: {_short(paired)}."
        )
    return _finding(
        "occlusion",
        "Whether occluding what a map marks moves the decision",
        says,
        "Occluded images are unlike those that the model knows, and cells are occluded one by one: "
        "what matters only together goes unseen. A map can be faithful and the model still wrong.",
        [*maps.values(), paired],
    )


def _location(measured: Measured, left_out: dict[str, str]) -> Finding:
    numbers: list[Number] = []
    told: list[str] = []
    if measured.frame_width is not None:
        chance = float(edge_frame(measured.cells, measured.frame_width).mean())
        frame = _of_maps(measured, "frame", ", in the frame", "share", chance)
        numbers += frame.values()
        if frame["difference"]["mean"] is not None:
            told.append(
                f"The edge frame holds a share of {_told(frame['difference'])} of the difference "
                f"map and {_short(frame['true'])} of the class map; of a map that knows nothing it "
                f"would hold {written(chance)}."
            )
    else:
        left_out["share of the maps in the edge frame"] = "the maps are too small to have a middle"
    marked = measured.number("marked", "Image, marked by people", "share")
    if marked["n"]:
        inside = _of_maps(measured, "energy", ", inside human maps", "share", marked["mean"])
        numbers += inside.values()
        numbers += _of_maps(measured, "pointing", ", pointing game", "share").values()
        numbers += _of_maps(measured, "iou", ", overlap (IoU)", "share").values()
        numbers.append(marked)
        if inside["difference"]["mean"] is not None:
            told.append(
                f"What people marked, {written(marked['mean'])} of the image, holds "
                f"{_told(inside['difference'])} of the difference map and "
                f"{_short(inside['true'])} of the class map."
            )
    else:
        left_out["localisation against human maps"] = "the index names no human maps"
    return _finding(
        "location",
        "Where the maps lie",
        " ".join(told) or "Undefined: the maps are constant, or too small to have a middle.",
        "Where a map lies does not tell whether it is true: a model may decide rightly by what "
        "people did not mark, and a map drawn on what they marked need not be what decides.",
        numbers,
    )


def _perturbation(measured: Measured, left_out: dict[str, str]) -> Finding:
    insertion, deletion = (
        _of_maps(measured, measure, f", {measure}", "area") for measure in ("insertion", "deletion")
    )
    numbers = [*insertion.values(), *deletion.values()]
    numbers += [
        _paired(measured, measure, f", {measure}", "area") for measure in ("insertion", "deletion")
    ]
    says = "Undefined: the maps are constant on every image."
    if insertion["difference"]["mean"] is not None:
        says = (
            "Rebuilt in the order of the difference map, an image wins back the label's "
            f"probability over an area of {_told(insertion['difference'])}, where high is good; "
            f"taken apart in that order it keeps {_short(deletion['difference'])}, where low is "
            f"good. For the class map the areas are {_short(insertion['true'])} and "
            f"{_short(deletion['true'])}."
        )
    scores = _of_maps(measured, "road", ", ROAD", "probability difference")
    if scores["difference"]["n"]:
        numbers += scores.values()
        says += (
            f" ROAD, on {_images(scores['difference']['n'])} as it is slow, gives "
            f"{_short(scores['difference'])} for the difference map and {_short(scores['true'])} "
            "for the class map: above 0, removing what is marked hurts more than removing what is "
            "not."
        )
    else:
        left_out["ROAD"] = _NOT_TAKEN
    return _finding(
        "insertion-deletion",
        "What the decision makes of images rebuilt and taken apart along a map",
        says,
        "The areas depend on what stands in for missing pixels and on how confident the model is. "
        "They compare maps of one model, not models, and say nothing about single cells.",
        numbers,
    )


def _sanity(measured: Measured, left_out: dict[str, str]) -> Finding:
    sensitivity = measured.number(
        "true_false", "Label's map with the other class's", "rank correlation"
    )
    numbers = [sensitivity]
    if measured.outputs == 1:
        says = (
            "With one output the two classes' maps are each other's negative, so that sensitivity "
            "to the class is no finding."
        )
    elif sensitivity["mean"] is not None:
        says = (
            "The label's class map and that of the class set against it agree to a rank "
            f"correlation of {_told(sensitivity)}: near 1, the class map would have looked the "
            "same for the other answer."
        )
    else:
        says = "Sensitivity to the class is undefined: the maps are constant on every image."
    survived = _of_maps(measured, "randomised", ", all layers random", "rank correlation")
    if survived["difference"]["n"]:
        numbers += survived.values()
        says += (
            " With every layer of the model replaced by random numbers, the difference map agrees "
            f"with the model's own to {_told(survived['difference'])}, the class map to "
            f"{_short(survived['true'])}: near 1 a map would not show what the model has learned."
        )
    else:
        left_out["cascading randomisation"] = _NOT_TAKEN
    return _finding(
        "sanity",
        "Whether the maps depend on the class and on what the model has learned",
        says,
        "To depend on class and weights is necessary, not sufficient: a map that changes with them "
        "may still mark what does not decide.",
        numbers,
    )


def _performance(measured: Measured, left_out: dict[str, str]) -> Finding:
    numbers = [measured.number("correct", "Accuracy", "share")]
    says = f"The share of images on which the model is right is {_told(numbers[0])}"
    try:
        numbers.insert(0, _auroc(measured))
        says += f"; the area under its ROC curve is {_short(numbers[0])}"
    except DiffsalError:
        left_out["area under the ROC curve"] = "the images audited are not of all classes"
    return _finding(
        "performance",
        "How well the model tells the classes apart",
        says + ".",
        "High performance on these images says nothing about others, nor for what reason the model "
        "is right; and no map makes up for low performance.",
        numbers,
    )


def _auroc(measured: Measured) -> Number:
    """By scikit-learn; its interval, for two classes, from images drawn anew within each class."""
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
    return _described("auroc", "Area under the ROC curve", "area", found, chance=0.5)


def _rank_area(
    positive: NDArray[np.float64], negative: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    """The area under the ROC curve from ranks, along the last axis (Mann and Whitney)."""
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=-1), axis=-1)
    count, others = positive.shape[-1], negative.shape[-1]
    above = ranks[..., :count].sum(-1) - count * (count + 1) / 2
    return np.asarray(above / (count * others))


def _stress_test(measured: Measured, obstacle: str, left_out: dict[str, str]) -> Finding:
    title = "Stress test: what this model's class maps could be made to show"
    if obstacle:
        left_out["the stress test"] = obstacle
        return _finding(
            "stress-test",
            title,
            f"Could not be applied: {obstacle}.",
            "That this one attack does not apply does not mean that the maps cannot be forged; "
            "training can do so with any model.",
            [],
        )
    before, after, share, *_ = numbers = [
        measured.number(*column)
        for column in (
            ("target_before", "Class map to the frame, before", "mean squared distance"),
            ("target_after", "Class map to the frame, after", "mean squared distance"),
            ("share_after", "Common-mode share, after", "share"),
            ("probability_change", "Largest change of a probability", "probability"),
            ("difference_change", "Relative change of the difference map", "ratio"),
        )
    ]
    largest = float(np.nanmax(measured.column("probability_change")))
    effect = {
        "made to show": "has its class maps show",
        "moved towards": "moves its class maps towards",
        "brought no nearer to": "brings its class maps no nearer to",
    }[_moved(before, after)]
    says = (
        f"One vector, added to every row of a copy's last layer, {effect} a frame along the "
        f"edges: their mean squared distance to it goes from {_short(before)} to "
        f"{_short(after)} on {after['n']} images that the vector was not made from. "
        f"{_flips(measured) or 'None'} of their predictions changed, and no probability by more "
        f"than {written(largest)}. The copy's common-mode share is {_short(share)}, which an audit "
        "of it would report."
    )
    return _finding(
        "stress-test",
        title,
        says,
        "It does not show that anyone did this to the model, and the difference map, which stays, "
        "is not thereby proven true. It shows that no test of predictions could notice.",
        numbers,
    )


def _moved(before: Number, after: Number) -> str:
    if after["mean"] <= before["mean"] / 2:
        return "made to show"
    return "moved towards" if after["mean"] < before["mean"] else "brought no nearer to"


def _flips(measured: Measured) -> int:
    return int(np.nansum(measured.column("prediction_changed")))


# ------------------------------------------------------------------------ what is drawn from them


def summarize(findings: list[Finding], measured: Measured, index: Index, split: str) -> list[str]:
    """What a reader in a hurry should know, in the findings' own numbers.

    Args:
        findings: of :func:`find`.
        measured: what they are from.
        index: where the images are from.
        split: ``test`` or ``all``, the part of the index that was audited.
    """
    numbers = {number["name"]: number for finding in findings for number in finding["numbers"]}

    def mean(name: str) -> str:
        return written(numbers[name]["mean"])

    where = "the test split" if split == "test" else "the index"
    told = f"Audited: {_images(len(measured.rows))} of {where}. The model is right on "
    told += f"{_percent(numbers['correct']['mean'])} of them"
    told += f", with an area under the ROC curve of {mean('auroc')}." if "auroc" in numbers else "."
    if split == "all" and index.split("train"):
        told += " Images for training are among them, on which numbers tend to look better."
    if measured.failed:
        told += f" {len(measured.failed)} more could not be measured."
    summary = [told]
    if measured.outputs == 1:
        summary.append("Its two class maps have nothing in common, as it has one output only.")
    elif numbers["common_mode_share"]["mean"] is None:
        summary.append("Its class maps are constant: they show nothing.")
    else:
        exact = measured.outputs == 2 and _adds_up(measured)
        summary.append(
            f"{_percent(numbers['common_mode_share']['mean'])} of the variation of its class maps "
            f"is common to both classes: {'' if exact else 'to first order, '}no decision between "
            "the two depends on it."
        )
    relations = {
        1: "lowers the margin",
        0: "was not found to move the margin",
        -1: "raises the margin, against what they say",
    }
    difference, true = (numbers[f"occlusion_{kind}"] for kind in ("difference", "true"))
    if difference["mean"] is not None:
        summary.append(
            f"Occluding what its difference maps mark {relations[_sign(difference)]} (rank "
            f"correlation {mean('occlusion_difference')}); occluding what its class maps mark "
            f"{relations[_sign(true)]} ({mean('occlusion_true')})."
        )
    if "target_after" in numbers:
        flips = _flips(measured)
        shown = _moved(numbers["target_before"], numbers["target_after"])
        summary.append(
            f"In a stress test a copy's class maps were {shown} a frame along the edges "
            f"(squared distance {mean('target_before')} before, {mean('target_after')} after) with "
            f"{flips or 'no'} prediction{'s' * (flips > 1)} changed."
        )
    else:
        summary.append("The stress test could not be applied to this model.")
    summary.append(
        "No number here, and no set of them, proves that a heatmap shows what decides: each tells "
        "what was looked for and whether it was found."
    )
    return summary


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
    agreement = _described(
        "agreement", "Predictions alike", "share", interval(alike, measured.seed)
    )
    columns = (
        ("correct", "Accuracy", "share"),
        ("common_mode_share", "Common-mode share of the class map", "share"),
        ("true_difference", "Class map with difference map", "rank correlation"),
        ("occlusion_true", "Class map, occlusion", "rank correlation"),
        ("occlusion_difference", "Difference map, occlusion", "rank correlation"),
        ("frame_true", "Class map, in the frame", "share"),
        ("frame_difference", "Difference map, in the frame", "share"),
    )
    return {
        "says": f"Both models predict the same class on a share of {_told(agreement)} of the "
        "images. Below, each number of the model beside the reference's, and their difference "
        "image by image.",
        "limits": "A difference tells that the two are not alike, not which of them is right; the "
        "reference is measured with the same methods, and they fail alike.",
        "agreement": agreement,
        "numbers": [
            {
                "model": mine.number(*column),
                "reference": yours.number(*column),
                "difference": _described(
                    *column,
                    interval(mine.column(column[0]) - yours.column(column[0]), measured.seed),
                ),
            }
            for column in columns
        ],
    }


# ------------------------------------------------------------------------------ numbers and words


def _of_maps(
    measured: Measured, measure: str, what: str, unit: str, chance: float | None = None
) -> dict[str, Number]:
    return {
        kind: measured.number(f"{measure}_{kind}", label + what, unit, chance)
        for kind, label in MAPS.items()
    }


def _paired(measured: Measured, measure: str, what: str, unit: str) -> Number:
    name = f"{measure}_difference - {measure}_true"
    return measured.number(name, f"Difference map − class map{what}", unit)


def _described(
    name: str, label: str, unit: str, found: Interval, chance: float | None = None
) -> Number:
    mean, low, high = plain([found.mean, found.low, found.high])
    return {
        "name": name,
        "label": label,
        "unit": unit,
        "chance": chance,
        "mean": mean,
        "low": low,
        "high": high,
        "n": found.count,
    }


def plain(values: Sequence[float]) -> list[float | None]:
    """NaN, which JSON does not have, as None."""
    return [None if math.isnan(value) else value for value in values]


def _finding(identity: str, title: str, says: str, limits: str, numbers: list[Number]) -> Finding:
    return {"id": identity, "title": title, "says": says, "limits": limits, "numbers": numbers}


def _told(number: Number) -> str:
    """A number, its interval and on how many images."""
    if number["mean"] is None:
        return "undefined on every image"
    if number["low"] is None:
        return f"{written(number['mean'])} (no interval, n = {number['n']})"
    return (
        f"{written(number['mean'])} (95 % interval {written(number['low'])} to "
        f"{written(number['high'])}, n = {number['n']})"
    )


def _short(number: Number) -> str:
    """A number beside one that has been told in full."""
    if number["low"] is None:
        return written(number["mean"])
    return f"{written(number['mean'])} ({written(number['low'])} to {written(number['high'])})"


def _sign(number: Number) -> int:
    """1 or -1 where the interval lies on one side of 0, else 0."""
    if number["low"] is None:
        return 0
    return int(number["low"] > 0) - int(number["high"] < 0)


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "Under 0.1 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
