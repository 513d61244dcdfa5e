"""The audit's numbers: a row for each image, and what is told of a column."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffsal.data.index import Sample
from diffsal.faithfulness.statistics import Interval, interval

Row: TypeAlias = dict[str, Any]
"""An image's path, label, prediction and numbers; a line of ``per-image.csv``."""
Number: TypeAlias = dict[str, Any]
"""A mean over images with its interval, as ``docs/audit.md`` documents it."""
MAPS = {"true": "Class map", "difference": "Difference map"}
"""The maps under audit, by the ending of their columns."""

OCCLUSIONS = {
    "mean": "occlusion",
    "blur": "occlusion_blur",
    "noise": "occlusion_noise",
    "transplant": "transplant",
}
"""What occlusion by each occluder is called in columns."""
MEASURES_OF_MAPS = (
    *("occlusion", "smoothgrad", "insertion", "deletion", "frame", "pointing", "energy", "iou"),
    *("occlusion_blur", "occlusion_noise", "transplant", "road", "randomised", "reestimated"),
)
"""What is measured of each map under audit; a column is ``occlusion_true``, say."""
COLUMNS = (
    "correct",
    "probability",
    "margin",
    "residual",
    "unexplained",
    "common_mode_share",
    "true_difference",
    "true_false",
    *(f"{measure}_{kind}" for measure in MEASURES_OF_MAPS for kind in MAPS),
    "marked",
    "blank_share",
    "receptive_share",
    "composite_error",
    "alike_error",
    "cluster",
    "sensitivity",
    "sensitivity_counted",
    "reestimated_change",
    "reestimated_margin",
    "target_before",
    "target_after",
    "share_after",
    "probability_change",
    "difference_change",
    "prediction_changed",
)
"""Numbers of an image in ``per-image.csv``, after its path, label and prediction."""


@dataclass
class Measured:
    """What one pass over the data leaves: small rows, no images.

    Attributes:
        seed: of the bootstrap.
        rows: a row per image, in the order of the index.
        samples: their samples.
        logits: theirs, (K,) each.
        evidence: theirs, (h, w) each, see :func:`diffsal.auditing.clusters.decision_maps`.
        curves: by name, of insertion, deletion and randomisation, (steps,) of each image that has
            them.
        randomised_layers: after which randomisation's curves look at the maps, from the top.
        sampling: by slow test, on how many images it was measured and how narrow that made it.
        failed: ``path`` and ``error`` of images that could not be measured.
        cells: (h, w) of the maps.
        names: of the model's classes.
        squash: what the model made of its logits; ``None``: nothing.

    Example:
        >>> measured = Measured(rows=[{"frame_true": 0.2}, {"frame_true": 0.4}, {}], cells=(7, 7))
        >>> measured.column("frame_true")
        array([0.2, 0.4, nan])
        >>> number = measured.number("frame_true", "Class map, in the frame", "share")
        >>> round(number["mean"], 3), number["n"], measured.frame_width
        (0.3, 2, 1)
    """

    seed: int = 0
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    evidence: list[Tensor] = field(default_factory=list)
    curves: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    randomised_layers: tuple[str, ...] = ()
    sampling: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    cells: tuple[int, int] = (0, 0)
    names: list[str] = field(default_factory=list)
    squash: str | None = None

    @property
    def outputs(self) -> int:
        """K, the number of the model's logits."""
        return len(self.logits[0])

    @property
    def frame_width(self) -> int | None:
        """Cells, on each side, of the edge frame; ``None``: maps too small to have a middle."""
        smallest = min(self.cells)
        return max(1, smallest // 7) if smallest > 2 else None

    @property
    def adds_up(self) -> bool:
        """Whether maps and biases are the margin, as with a pooled linear head."""
        gap, margin = (np.abs(self.column(name)).max() for name in ("unexplained", "margin"))
        return bool(gap <= 1e-3 * margin)

    def by_class(self, name: str, label: str, unit: str) -> dict[str, Number]:
        """The mean of a column within each class that has images, by its name."""
        found = {}
        for one in self.names:
            rows = [row for row in self.rows if row["label"] == one]
            if rows:
                number = replace(self, rows=rows).number(name, f"{label}, {one}", unit)
                found[one] = number | {"class": one}
        return found

    @property
    def flips(self) -> int:
        """How many predictions the stress test changed."""
        return int(np.nansum(self.column("prediction_changed")))

    def column(self, name: str) -> NDArray[np.float64]:
        """(N,), NaN where an image has no such number; ``a - b`` is taken image by image."""
        first, _, second = name.partition(" - ")
        values = np.array([row.get(first, math.nan) for row in self.rows], np.float64)
        return values - self.column(second) if second else values

    def number(self, name: str, label: str, unit: str, chance: float | None = None) -> Number:
        """The mean of a column, with its interval."""
        return described(name, label, unit, interval(self.column(name), self.seed), chance)

    def per_map(
        self, measure: str, what: str, unit: str, chance: float | None = None
    ) -> dict[str, Number]:
        """The mean of a measure of each map under audit; ``what`` is said after the map's name."""
        return {
            kind: self.number(f"{measure}_{kind}", label + what, unit, chance)
            for kind, label in MAPS.items()
        }

    def paired(self, measure: str, what: str, unit: str) -> Number:
        """The mean over images of the difference map's measure less the class map's."""
        name = f"{measure}_difference - {measure}_true"
        return self.number(name, f"Difference map − class map{what}", unit)

    def add_columns(self, samples: Sequence[Sample], columns: Mapping[str, Tensor]) -> None:
        """Add numbers (B,) to the rows of the samples' images."""
        rows = {row["path"]: row for row in self.rows}
        for image, sample in enumerate(samples):
            rows[str(sample.path)] |= {k: float(values[image]) for k, values in columns.items()}


def described(
    name: str, label: str, unit: str, found: Interval, chance: float | None = None
) -> Number:
    """A number as the files tell it, of a mean and its interval.

    Example:
        >>> described("correct", "Accuracy", "share", Interval(0.75, math.nan, math.nan, 4))["low"]
        >>> described("correct", "Accuracy", "share", Interval(0.75, 0.5, 1.0, 4))["low"]
        0.5
    """
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
    """NaN, which JSON does not have, as None.

    Example:
        >>> plain([0.5, math.nan])
        [0.5, None]
    """
    return [None if math.isnan(value) else value for value in values]
