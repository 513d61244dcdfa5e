"""What an audit's rows of numbers show, and what they do not, in words.

A finding is a few numbers with 95 % intervals, one plain sentence, and one on its limits.

The words stay within the evidence. There is no overall verdict: a low common-mode share does not
make a map faithful, and a faithful map does not make a model right."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from diffsal.auditing.composites import CompositeTest
from diffsal.auditing.occluders import occluders_in_words
from diffsal.auditing.operating import operating_points
from diffsal.auditing.rows import MAPS, Measured, Number, described
from diffsal.auditing.wording import (
    Finding,
    brief,
    classes_in_words,
    composites_in_words,
    images_in_words,
    make_finding,
    moved,
    sign,
    tell,
    written,
)
from diffsal.errors import DiffsalError
from diffsal.faithfulness.localisation import edge_frame
from diffsal.faithfulness.statistics import Interval
from diffsal.maps.contrast import class_count
from diffsal.training.loop import auroc

_NOT_TAKEN = "all maps are constant"


def find(
    measured: Measured, composites: CompositeTest | str, obstacle: str
) -> tuple[list[Finding], list[dict[str, str]]]:
    """The findings, in the order of the report, and what could not be found and why.

    Args:
        measured: at least one image.
        composites: the composite test; or why it could not be run.
        obstacle: why the stress test could not be applied; empty where it was.
    """
    left_out: dict[str, str] = {}
    findings = [
        _composites(measured, composites, left_out),
        _common_mode(measured),
        _agreement(measured),
        _occlusion(measured, left_out),
        _input_level(measured),
        _location(measured, left_out),
        _perturbation(measured, left_out),
        _sanity(measured, left_out),
        _performance(measured, left_out),
        _stress_test(measured, obstacle, left_out),
    ]
    return findings, [{"what": what, "why": why} for what, why in left_out.items()]


def _composites(measured: Measured, test: CompositeTest | str, left_out: dict[str, str]) -> Finding:
    title = "Whether the decision is made where the difference map says"
    limits = (
        "Pasted images have seams, and networks look beyond a cell's edges: both lower the skill "
        "of honest models too, so compare it with a model trained as long without a target for its "
        "maps. A low skill does not tell that anyone meant it; a high one does not make the model "
        "right, and who trains a model to pass this test may succeed."
    )
    if isinstance(test, str):
        left_out["the composite test"] = test
        return make_finding("composites", title, f"Could not be run: {test}.", limits, [])
    numbers = test.numbers
    skill, marked, soft, of_class_map, *by_class = numbers
    if skill["mean"] is None:
        says = "Undefined: composites do not change the margin, or the maps are constant."
        return make_finding("composites", title, says, limits, numbers)
    classes = " and ".join(
        f"{brief(number)} in images of {name}"
        for name, number in zip(measured.names, by_class, strict=False)
    )
    says = (
        f"{composites_in_words(skill, marked)} A region of one image was pasted into an image of "
        "the other class, and the maps of both foretold the model's margin. Composite skill, 1 "
        "where they are exact and 0 where they are no better than a guess that takes every place "
        f"to count alike: {tell(skill)} for random rectangles, {brief(marked)} for what the map "
        f"marks, {brief(soft)} with soft seams; {classes}. For the class map, scaled to fit, "
        f"{brief(of_class_map)}."
    )
    return make_finding("composites", title, says, limits, numbers)


def _common_mode(measured: Measured) -> Finding:
    share = measured.number("common_mode_share", "Common-mode share of the class map", "share")
    gap = measured.number(
        "unexplained", "Margin that maps and biases do not add up to, in logits", "logits"
    )
    numbers = [share, gap]
    says = f"The common-mode share of the class map is {tell(share)}: so much of its variation "
    limits = (
        "A low share does not make a map faithful: a model can be trained to move the difference "
        "itself, which this share does not notice. Read it with the findings on perturbation."
    )
    if measured.outputs == 1:
        numbers = [gap]
        says = (
            "Does not apply: the model has one output, so that the maps of its two classes are "
            "each other's negative and have nothing in common, by construction."
        )
        limits = "That nothing is common does not make the map faithful."
    elif share["mean"] is None:
        says = "Undefined: the maps of both classes are constant on every image."
    elif measured.outputs > 2:
        says += (
            "the label's map shares with that of its strongest rival. The choice between these two "
            "does not depend on it to first order; the choice against a third class can."
        )
    elif measured.adds_up:
        says += (
            "is in the maps of both classes alike. Softmax sees the difference of the two logits "
            "alone, so that this part had no influence on any decision."
        )
    else:
        says += (
            "is in the maps of both classes alike. To first order it has no influence on the "
            f"decision; on this model first order leaves {tell(gap)} logits of the margin "
            "unexplained."
        )
    title = "How much of the class map the decision cannot see"
    return make_finding("common-mode", title, says, limits, numbers)


def _agreement(measured: Measured) -> Finding:
    agreement = measured.number(
        "true_difference", "Class map with difference map", "rank correlation"
    )
    says = "Undefined: one of the two maps is constant on every image."
    if agreement["mean"] is not None:
        low = int((measured.column("true_difference") < 0.5).sum())
        says = (
            "The class map orders the image's cells as the difference map does to a rank "
            f"correlation of {tell(agreement)}; on {low} of {agreement['n']} images it is below "
            "0.5. At 1 the two would tell the same."
        )
    return make_finding(
        "agreement",
        "Whether class map and difference map tell the same",
        says,
        "Agreement does not make either map right. Where they disagree, it is the difference that "
        "the decision between the two classes depends on.",
        [agreement],
    )


def _occlusion(measured: Measured, left_out: dict[str, str]) -> Finding:
    maps = measured.per_map("occlusion", "", "rank correlation")
    paired = measured.paired("occlusion", "", "rank correlation")
    by_class = measured.by_class("occlusion_difference", MAPS["difference"], "rank correlation")
    relation = {
        1: "The more the difference map marks a cell, the more occluding it lowers the margin",
        0: "No relation was found between what the difference map marks and what moves the margin",
        -1: "Occluding what the difference map marks raises the margin, against what it claims",
    }[sign(maps["difference"])]
    which = {
        1: "the difference map is the more faithful of the two",
        0: "no difference between the two was found",
        -1: "the class map is the more faithful of the two",
    }[sign(paired)]
    says = "Undefined: maps, or margins under occlusion, are constant on every image."
    if maps["difference"]["mean"] is not None:
        says = (
            f"{relation}: rank correlation {tell(maps['difference'])}; for the class map, "
            f"{brief(maps['true'])}. Image by image, {which}: {brief(paired)}. By class, for the "
            f"difference map: {classes_in_words(by_class)}."
        )
    occluders, by_occluder = occluders_in_words(measured)
    if not measured.number("transplant_difference", "", "")["n"]:
        left_out["transplants"] = (
            "they were not asked for, or there is one class, or maps are constant"
        )
    return make_finding(
        "occlusion",
        "Whether occluding what a map marks moves the decision",
        says + occluders,
        "Occluded images are unlike those that the model knows, and cells are occluded one by one: "
        "what matters only together goes unseen. A map can be faithful and the model still wrong.",
        [*maps.values(), paired, *by_class.values(), *by_occluder],
    )


def _input_level(measured: Measured) -> Finding:
    maps = measured.per_map("smoothgrad", ", SmoothGrad", "rank correlation")
    share = measured.number("receptive_share", "Evidence that sees its own place", "share")
    says = "Undefined: maps, or gradients at the pixels, are constant on every image."
    if maps["difference"]["mean"] is not None:
        relation = {
            1: "The difference map marks, for or against, the cells whose pixels move the margin",
            0: "No relation was found between what the difference map marks and the pixels that "
            "move the margin",
            -1: "The difference map marks cells whose pixels move the margin least",
        }[sign(maps["difference"])]
        says = (
            f"{relation}: rank correlation with SmoothGrad {tell(maps['difference'])}; for "
            f"the class map, {brief(maps['true'])}. Of what a cell's evidence is sensitive to, a "
            f"share of {brief(share)} lies under that cell and its neighbours."
        )
    return make_finding(
        "input-level",
        "Whether the map marks the pixels that the margin is sensitive to",
        says,
        "Sensitivity is not importance: a stroke that decides may be one that small changes do not "
        "move. Networks see far, so that a low share is common among honest models.",
        [*maps.values(), share],
    )


def _location(measured: Measured, left_out: dict[str, str]) -> Finding:
    numbers: list[Number] = []
    told: list[str] = []
    if measured.frame_width is not None:
        chance = float(edge_frame(measured.cells, measured.frame_width).mean())
        frame = measured.per_map("frame", ", in the frame", "share", chance)
        numbers += frame.values()
        if frame["difference"]["mean"] is not None:
            told.append(
                f"The edge frame holds a share of {tell(frame['difference'])} of the difference "
                f"map and {brief(frame['true'])} of the class map; of a map that knows nothing it "
                f"would hold {written(chance)}."
            )
    else:
        left_out["share of the maps in the edge frame"] = "the maps are too small to have a middle"
    marked = measured.number("marked", "Image, marked by people", "share")
    if marked["n"]:
        inside = measured.per_map("energy", ", inside human maps", "share", marked["mean"])
        numbers += inside.values()
        numbers += measured.per_map("pointing", ", pointing game", "share").values()
        numbers += measured.per_map("iou", ", overlap (IoU)", "share").values()
        numbers.append(marked)
        if inside["difference"]["mean"] is not None:
            told.append(
                f"What people marked, {written(marked['mean'])} of the image, holds "
                f"{tell(inside['difference'])} of the difference map and "
                f"{brief(inside['true'])} of the class map."
            )
    else:
        left_out["localisation against human maps"] = "the index names no human maps"
    return make_finding(
        "location",
        "Where the maps lie",
        " ".join(told) or "Undefined: the maps are constant, or too small to have a middle.",
        "Where a map lies does not tell whether it is true: a model may decide rightly by what "
        "people did not mark, and a map drawn on what they marked need not be what decides.",
        numbers,
    )


def _perturbation(measured: Measured, left_out: dict[str, str]) -> Finding:
    insertion, deletion = (
        measured.per_map(measure, f", {measure}", "area") for measure in ("insertion", "deletion")
    )
    numbers = [*insertion.values(), *deletion.values()]
    numbers += [
        measured.paired(measure, f", {measure}", "area") for measure in ("insertion", "deletion")
    ]
    says = "Undefined: the maps are constant on every image."
    if insertion["difference"]["mean"] is not None:
        says = (
            "Rebuilt in the order of the difference map, an image wins back the label's "
            f"probability over an area of {tell(insertion['difference'])}, where high is good; "
            f"taken apart in that order it keeps {brief(deletion['difference'])}, where low is "
            f"good. For the class map the areas are {brief(insertion['true'])} and "
            f"{brief(deletion['true'])}."
        )
        blank = measured.column("blank_share")
        if void := int((blank >= 0.5).sum()):
            says += (
                f" On {images_in_words(void)} of {(~np.isnan(blank)).sum()} the areas are void: "
                "there a blank keeps half of the label's probability or more."
            )
    scores = measured.per_map("road", ", ROAD", "probability difference")
    if scores["difference"]["n"]:
        numbers += scores.values()
        says += (
            f" ROAD, on {images_in_words(scores['difference']['n'])}, gives "
            f"{brief(scores['difference'])} for the difference map and {brief(scores['true'])} "
            "for the class map: above 0, removing what is marked hurts more than removing what is "
            "not."
        )
    else:
        left_out["ROAD"] = _NOT_TAKEN
    return make_finding(
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
            f"correlation of {tell(sensitivity)}: near 1, the class map would have looked the "
            "same for the other answer."
        )
    else:
        says = "Sensitivity to the class is undefined: the maps are constant on every image."
    survived = measured.per_map("randomised", ", all layers random", "rank correlation")
    if survived["difference"]["n"]:
        numbers += survived.values()
        says += (
            " With every layer of the model replaced by random numbers, the difference map agrees "
            f"with the model's own to {tell(survived['difference'])}, the class map to "
            f"{brief(survived['true'])}: near 1 a map would not show what the model has learned."
        )
    else:
        left_out["cascading randomisation"] = _NOT_TAKEN
    return make_finding(
        "sanity",
        "Whether the maps depend on the class and on what the model has learned",
        says,
        "To depend on class and weights is necessary, not sufficient: a map that changes with them "
        "may still mark what does not decide.",
        numbers,
    )


def _performance(measured: Measured, left_out: dict[str, str]) -> Finding:
    numbers = [measured.number("correct", "Accuracy", "share")]
    says = f"The share of images on which the model is right is {tell(numbers[0])}"
    try:
        numbers.insert(0, _auroc(measured))
        says += f"; the area under its ROC curve is {brief(numbers[0])}"
        if class_count(torch.stack(measured.logits)) == 2:
            at_1, at_5, equal, calibration = points = operating_points(measured)
            numbers += points
            says += (
                f". Where 1 % of {measured.names[0]} are taken for {measured.names[1]}, a share of "
                f"{brief(at_1)} of {measured.names[1]} is missed, at 5 % of {brief(at_5)}; the "
                f"equal error rate is {brief(equal)}, and probabilities are off by "
                f"{brief(calibration)}"
            )
    except DiffsalError:
        left_out["area under the ROC curve"] = "the images audited are not of all classes"
    return make_finding(
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
    return described("auroc", "Area under the ROC curve", "area", found, chance=0.5)


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
        return make_finding(
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
    }[moved(before, after)]
    says = (
        f"One vector, added to every row of a copy's last layer, {effect} a frame along the "
        f"edges: their mean squared distance to it goes from {brief(before)} to "
        f"{brief(after)} on {after['n']} images that the vector was not made from. "
        f"{measured.flips or 'None'} of their predictions changed, and no probability by "
        f"more than {written(largest)}. The copy's common-mode share is {brief(share)}, which an "
        "audit of it would report."
    )
    return make_finding(
        "stress-test",
        title,
        says,
        "It does not show that anyone did this to the model, and the difference map, which stays, "
        "is not thereby proven true. It shows that no test of predictions could notice.",
        numbers,
    )
