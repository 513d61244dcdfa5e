"""Findings about the maps themselves: what they share, where they lie, what they depend on."""

from diffsal.auditing.clusters import Kinds
from diffsal.auditing.rows import Measured, Number
from diffsal.auditing.wording import (
    NOT_TAKEN,
    Finding,
    brief,
    images_in_words,
    make_finding,
    tell,
    written,
)
from diffsal.faithfulness.localisation import edge_frame


def find_common_mode(measured: Measured) -> Finding:
    """How much of the class maps the decision cannot see."""
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


def find_agreement(measured: Measured) -> Finding:
    """Whether class map and difference map order the cells alike."""
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


def find_location(measured: Measured, left_out: dict[str, str]) -> Finding:
    """Where the maps lie: in the frame, inside what people marked."""
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


def find_sanity(measured: Measured, left_out: dict[str, str]) -> Finding:
    """Whether the maps depend on the class and on the weights."""
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
        left_out["cascading randomisation"] = NOT_TAKEN
    return make_finding(
        "sanity",
        "Whether the maps depend on the class and on what the model has learned",
        says,
        "To depend on class and weights is necessary, not sufficient: a map that changes with them "
        "may still mark what does not decide.",
        numbers,
    )


def find_clusters(kinds: Kinds | str, left_out: dict[str, str]) -> Finding:
    """Which kinds of evidence the images fall into, if they do."""
    title = "Which kinds of evidence there are"
    limits = (
        "Kinds are of where evidence lies, not of what it is there, and the ends of a gradual "
        "change can look like two kinds. A kind of its own, or one with more errors, is a reason "
        "to look at its images, not a proof of a shortcut; a shortcut that all images share makes "
        "no kind."
    )
    if isinstance(kinds, str):
        left_out["kinds of evidence"] = kinds
        return make_finding("clusters", title, f"Not looked for: {kinds}.", limits, [])
    number, found = kinds.silhouette, kinds.each
    measured_by = (
        f"silhouette {written(number['mean'])}, and up to {written(number['chance'])} in draws of "
        "maps of one kind"
    )
    if not found:
        says = (
            "No distinct kinds: clusters always come out, even of noise, and the best do not hold "
            f"together better than clusters by chance, or hardly at all ({measured_by})."
        )
        return make_finding("clusters", title, says, limits, [number])
    each = "; ".join(
        f"kind {place}, {images_in_words(one['images'])}, is wrong on a share of "
        f"{brief(one['error'])}"
        for place, one in enumerate(found, start=1)
    )
    says = (
        f"The difference maps, turned towards the decision, are of {len(found)} kinds that hold "
        f"together better than by chance ({measured_by}): {each}."
    )
    return make_finding("clusters", title, says, limits, [number])
