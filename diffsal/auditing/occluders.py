"""Whether what occlusion finds depends on what takes the place of the pixels."""

from diffsal.auditing.rows import OCCLUSIONS, Measured, Number
from diffsal.auditing.wording import brief, sign

_CALLED = {
    "mean": "mean colour",
    "blur": "blur",
    "noise": "noise",
    "transplant": "pixels of another class",
}
_UNIT = "rank correlation"


def occluders_in_words(measured: Measured) -> tuple[str, list[Number]]:
    """What the difference map is worth by each occluder, and how far that depends on it.

    Returns:
        Sentences that begin with a space, empty where the mean colour alone was tried; and the
        numbers of the other occluders, of both maps, and of the two that differ most.

    Example:
        >>> names = {"occlusion_difference": 0.1, "occlusion_blur_difference": 0.3}
        >>> rows = [{name: mean + n / 100 for name, mean in names.items()} for n in range(9)]
        >>> says, numbers = occluders_in_words(Measured(rows=rows))
        >>> says.partition(":")[0], numbers[-1]["name"]
        (' By occluder', 'occlusion_blur_difference - occlusion_difference')
    """
    found = {
        occluder: measured.per_map(measure, f", occluded by {_CALLED[occluder]}", _UNIT)
        for occluder, measure in OCCLUSIONS.items()
    }
    known = {
        occluder: maps["difference"] for occluder, maps in found.items() if maps["difference"]["n"]
    }
    if len(known) < 2:
        return "", []
    low, *_, high = sorted(known, key=lambda occluder: float(known[occluder]["mean"]))
    apart = measured.number(
        f"{OCCLUSIONS[high]}_difference - {OCCLUSIONS[low]}_difference",
        f"Difference map, {_CALLED[high]} − {_CALLED[low]}",
        _UNIT,
    )
    told = ", ".join(f"{brief(number)} {_CALLED[occluder]}" for occluder, number in known.items())
    if len({sign(number) for number in known.values()}) > 1:
        depends = "What is found depends on the occluder"
    elif sign(apart):
        depends = "How much is found depends on the occluder"
    else:
        depends = "That it depends on the occluder was not found"
    numbers = [
        number for occluder in known if occluder != "mean" for number in found[occluder].values()
    ]
    return (
        f" By occluder: {told}. {depends}: {_CALLED[high]} against {_CALLED[low]}, image by image, "
        f"{brief(apart)}."
    ), [*numbers, apart]
