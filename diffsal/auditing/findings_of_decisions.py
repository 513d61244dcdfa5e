"""Findings about decisions: how good they are, and what they leave open."""

from dataclasses import replace

import numpy as np
import torch

from diffsal.auditing.operating import area_under_curve, operating_points
from diffsal.auditing.rows import Measured, Number
from diffsal.auditing.stability import Reestimated
from diffsal.auditing.wording import Finding, brief, make_finding, moved, tell, written
from diffsal.errors import DiffsalError
from diffsal.maps.contrast import class_count


def find_performance(measured: Measured, left_out: dict[str, str]) -> Finding:
    """How well the classes are told apart."""
    numbers = [measured.number("correct", "Accuracy", "share")]
    says = f"The share of images on which the model is right is {tell(numbers[0])}"
    try:
        numbers.insert(0, area_under_curve(measured))
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


def find_stress_test(measured: Measured, obstacle: str, left_out: dict[str, str]) -> Finding:
    """What a copy with the same predictions could be made to show."""
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


def find_batch_norm(
    measured: Measured, found: Reestimated | str, left_out: dict[str, str]
) -> Finding:
    """What becomes of maps and decisions if batch norms take their statistics from these images."""
    title = "Whether maps and decisions hang on batch-norm statistics of the training set"
    limits = (
        "Statistics of few images are noisy, and those of images with another mix of classes "
        "differ: a change need not mean that anything is wrong with either. That little changes "
        "says that these images are like those of the training, not that the maps are right."
    )
    if isinstance(found, str):
        left_out["re-estimated batch norm"] = found
        return make_finding("batch-norm", title, f"Could not be tried: {found}.", limits, [])
    maps = measured.per_map("reestimated", ", statistics re-estimated", "rank correlation")
    change = measured.number(
        "reestimated_change", "Relative change of the difference map, re-estimated", "ratio"
    )
    turned = int(np.sum(measured.column("margin") * measured.column("reestimated_margin") < 0))
    numbers = [*maps.values(), change]
    norms = f"{found.layers} batch norm{'s' * (found.layers != 1)}"
    says = (
        f"In a copy, the statistics of {norms} were taken from the "
        f"{len(measured.rows)} audited images instead of the training set. The difference map "
        f"orders the cells as before to a rank correlation of {tell(maps['difference'])}, the "
        f"class map {brief(maps['true'])}; the difference map changes by a share of "
        f"{brief(change)} of its size, and {turned or 'no'} margin{'s' * (turned != 1)} "
        f"change{'s' * (turned == 1)} sign."
    )
    try:
        before, after = area_under_curve(measured), _area_of_copy(measured, found)
        numbers.insert(0, after)
        says += (
            f" The area under the ROC curve goes from {written(before['mean'])} to {brief(after)}."
        )
    except DiffsalError:
        pass  # said where performance is
    return make_finding("batch-norm", title, says, limits, numbers)


def _area_of_copy(measured: Measured, found: Reestimated) -> Number:
    rows = [row | {"margin": row["reestimated_margin"]} for row in measured.rows]
    area = area_under_curve(replace(measured, rows=rows, logits=list(found.logits)))
    label = "Area under the ROC curve, statistics re-estimated"
    return area | {"name": "auroc_reestimated", "label": label}
