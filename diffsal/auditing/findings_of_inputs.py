"""Findings from what the model makes of changed images, and of their pixels."""

import numpy as np

from diffsal.auditing.composites import CompositeTest
from diffsal.auditing.occluders import occluders_in_words
from diffsal.auditing.rows import MAPS, Measured
from diffsal.auditing.stability import LEVELS, STEADY
from diffsal.auditing.wording import (
    NOT_TAKEN,
    Finding,
    brief,
    classes_in_words,
    composites_in_words,
    images_in_words,
    make_finding,
    percent,
    sign,
    tell,
)


def find_composites(
    measured: Measured, test: CompositeTest | str, left_out: dict[str, str]
) -> Finding:
    """Whether composites of images are decided as the maps foretell."""
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


def find_occlusion(measured: Measured, left_out: dict[str, str]) -> Finding:
    """Whether occluding what a map marks moves the decision."""
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


def find_input_level(measured: Measured) -> Finding:
    """Whether the map marks the pixels that the margin is sensitive to."""
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


def find_perturbation(measured: Measured, left_out: dict[str, str]) -> Finding:
    """Insertion, deletion and ROAD."""
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
        left_out["ROAD"] = NOT_TAKEN
    return make_finding(
        "insertion-deletion",
        "What the decision makes of images rebuilt and taken apart along a map",
        says,
        "The areas depend on what stands in for missing pixels and on how confident the model is. "
        "They compare maps of one model, not models, and say nothing about single cells.",
        numbers,
    )


def find_sensitivity(measured: Measured) -> Finding:
    """Whether the difference map holds still where the decision does."""
    largest = measured.number(
        "sensitivity", "Largest change of the difference map (Max-Sensitivity)", "ratio"
    )
    counted = measured.number("sensitivity_counted", "Changes that leave the margin", "share")
    numbers = [largest, counted]
    if largest["mean"] is None:
        says = "Undefined: the map is zero, or no small change leaves the margin, on every image."
    else:
        says = (
            f"Where every pixel changes at random by at most {LEVELS} of 255 levels and the margin "
            f"by at most {percent(STEADY)}, the difference map changes by up to a share of "
            f"{tell(largest)} of its size. Of the changes tried, a share of {brief(counted)} leave "
            "the margin so and count."
        )
    return make_finding(
        "sensitivity",
        "Whether the difference map holds still where the decision does",
        says,
        "Random changes are not the worst: whoever looks for one that moves the map finds larger "
        "ones. A map that holds still need not be right: one that ignores the image never moves.",
        numbers,
    )
