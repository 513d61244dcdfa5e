"""The main numbers within each class, subset and group: an average can hide two opposites."""

from collections import Counter
from dataclasses import replace
from typing import Any

from diffsal.auditing.rows import Measured

_NUMBERS = (  # columns, as they are called, with their units
    ("correct", "Accuracy", "share"),
    ("common_mode_share", "Common-mode share", "share"),
    ("occlusion_difference", "Occlusion, difference map", "rank correlation"),
    ("smoothgrad_difference", "SmoothGrad, difference map", "rank correlation"),
    ("frame_difference", "In the frame, difference map", "share"),
    ("energy_difference", "Inside human maps, difference map", "share"),
)
_FEWEST = 5  # images of a part, below which a mean says nothing
_MOST = 20  # parts of a kind, the largest


def find_parts(measured: Measured) -> list[dict[str, Any]]:
    """Parts of five images or more, at most twenty of a kind, with their numbers.

    Args:
        measured: at least one image; the index tells subsets and groups.

    Returns:
        For each part ``by`` (``class``, ``subset`` or ``group``), ``name``, ``images``, and
        ``numbers`` that are defined for any image.

    Example:
        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> samples = [Sample(Path(str(n)), 0, subset="ab"[n % 2]) for n in range(12)]
        >>> rows = [{"label": "ill", "correct": float(n % 2)} for n in range(12)]
        >>> found = find_parts(Measured(rows=rows, samples=samples))
        >>> [(one["by"], one["name"], one["images"], one["numbers"][0]["mean"]) for one in found]
        [('class', 'ill', 12, 0.5), ('subset', 'a', 6, 0.0), ('subset', 'b', 6, 1.0)]
    """
    pairs = list(zip(measured.rows, measured.samples, strict=True))
    known = [one for one in _NUMBERS if measured.number(*one)["n"]]
    found = []
    for by, names in {
        "class": [row["label"] for row, _ in pairs],
        "subset": [sample.subset for _, sample in pairs],
        "group": [sample.group for _, sample in pairs],
    }.items():
        sizes = Counter(name for name in names if name)
        for name in sorted(dict(sizes.most_common(_MOST))):
            if sizes[name] < _FEWEST:
                continue
            rows = [row for row, own in zip(measured.rows, names, strict=True) if own == name]
            part = replace(measured, rows=rows)
            numbers = [part.number(*one) for one in known]
            found.append({"by": by, "name": name, "images": len(rows), "numbers": numbers})
    return found
