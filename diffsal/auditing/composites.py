"""The composite test within an audit: is the decision made where the difference map says?"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from diffsal.auditing.batches import read_batches
from diffsal.auditing.rows import Measured, Number, described, plain
from diffsal.auditing.sampling import balanced_order
from diffsal.auditing.settings import Settings
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import as_shown
from diffsal.errors import DiffsalError
from diffsal.faithfulness.composites import (
    Composites,
    compare,
    composite_margins,
    in_logits,
    skill_interval,
)
from diffsal.faithfulness.pasting import pasted, plan_composites
from diffsal.faithfulness.perturbation import cells_of_pixels
from diffsal.faithfulness.statistics import Interval
from diffsal.maps.contrast import class_count
from diffsal.maps.salience import explain
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.processes import ApartError, in_turns
from diffsal.system.progress import stage

KINDS: dict[str, dict[str, Any]] = {
    "rectangles": {},
    "marked": {"regions": "marked"},
    "feathered": {"seams": "feathered"},
    "same": {"donors": "same"},
}
"""What is pasted, as arguments of :func:`plan_composites`; what is left out is as in the first."""
_MOST = 100  # images, as many of each class: beyond these intervals narrow slowly
PER_IMAGE = 3  # composites of each kind
_PICTURED = (25, 50, 75)  # percentiles of the prediction's error


@dataclass(frozen=True)
class CompositeTest:
    """What came of the composite test, over images of two classes.

    Attributes:
        samples: the images.
        labels: (B,) int64, 0 or 1.
        found: composites by kind, see :data:`KINDS`; margins are of class 1 against class 0.
        class_map: of the first kind, predicted by the class maps, scaled to fit the margins.
        pictures: of single composites: positions among the samples, numbers and pixels.
        names: of the classes.
        seed: of the intervals.
    """

    samples: list[Sample]
    labels: Tensor
    found: dict[str, Composites]
    class_map: Composites
    pictures: list[dict[str, Any]]
    names: list[str]
    seed: int

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Of each kind's skill; findings, comparison and files tell them."""
        return {kind: skill_interval(one, seed=self.seed) for kind, one in self.found.items()}

    @cached_property
    def numbers(self) -> list[Number]:
        """Skills with their intervals: by kind, by the receivers' class, of the class map."""
        first = self.found["rectangles"]
        of_class = self.labels[first.receiver]

        def interval(part: Composites) -> Interval:
            return skill_interval(part, seed=self.seed)

        parts = {
            "composite_skill": ("Difference map, composites", self.intervals["rectangles"]),
            "composite_skill_marked": (
                "Difference map, composites of what it marks",
                self.intervals["marked"],
            ),
            "composite_skill_feathered": (
                "Difference map, composites with soft seams",
                self.intervals["feathered"],
            ),
            "composite_skill_true": ("Class map, composites", interval(self.class_map)),
            **{
                f"composite_skill_of_{label}": (
                    f"Difference map, composites in images of {self.names[label]}",
                    interval(first[of_class == label]),
                )
                for label in (0, 1)
            },
        }
        return [
            described(name, label, "skill", found, chance=0.0)
            for name, (label, found) in parts.items()
        ]

    def facts(self) -> dict[str, Any]:
        """What ``audit.json`` keeps: per kind, and the composites that are shown."""
        return {
            "images": len(self.samples),
            "kinds": {
                kind: {
                    "composites": len(one),
                    **_plain(self.intervals[kind]),
                    "slope": plain([one.slope])[0],
                    "correlation": plain([one.correlation])[0],
                }
                for kind, one in self.found.items()
            },
            "shown": [
                {name: value for name, value in picture.items() if name != "pixels"}
                for picture in self.pictures
            ],
        }


def composite_test(
    measured: Measured, loaded: LoadedModel, settings: Settings
) -> CompositeTest | str:
    """Run the composite test on at most 100 images, half of each class; or why it cannot be run."""
    if class_count(torch.stack(measured.logits)) != 2:
        return "it sets one class against one other, and the model tells more than two apart"
    try:
        read = _read(_drawn(measured, settings.seed), loaded, settings)
        found = {kind: _run(kind, read, loaded.model, settings) for kind in KINDS}
    except ApartError:
        raise
    except DiffsalError as error:
        return str(error)
    first = found["rectangles"]
    class_map = compare(
        first, in_logits(read.own, read.margin, read.labels), read.margin, first.actual
    )
    for column, guess in (("composite_error", first.predicted), ("alike_error", first.uniform)):
        _add_errors(measured, read.samples, first, column, guess)
    pictures = [_picture(first, row, read, settings.preprocessing) for row in _shown(first)]
    return CompositeTest(
        read.samples, read.labels, found, class_map, pictures, measured.names, measured.seed
    )


def _drawn(measured: Measured, seed: int) -> list[Sample]:
    """Images of both classes, the first of the order that slow tests take, in the index's."""
    order = balanced_order([sample.label for sample in measured.samples], seed)
    return [measured.samples[position] for position in sorted(order[:_MOST])]


@dataclass(frozen=True)
class _Images:
    """Inputs (B, C, H, W), on the device; labels (B,), maps (B, h, w), margins (B,), on the CPU.

    ``difference`` and ``margin`` are of class 1 against class 0, ``own`` is the label's class map.
    """

    samples: list[Sample]
    inputs: Tensor
    labels: Tensor
    difference: Tensor
    margin: Tensor
    own: Tensor


def _read(samples: list[Sample], loaded: LoadedModel, settings: Settings) -> _Images:
    kept: list[Sample] = []
    parts: list[tuple[Tensor, ...]] = []
    for batch in read_batches(samples, loaded, settings, "composites", []):
        maps = explain(
            loaded.model, batch.inputs, true=1, false=0, target_layers=loaded.target_layer
        )
        own = torch.where((batch.labels == 1)[:, None, None], maps.true, maps.false)
        of_maps = (one.cpu() for one in (batch.labels, maps.difference, maps.margin, own))
        kept += batch.samples
        parts.append((batch.inputs, *of_maps))
    if not kept:
        raise DiffsalError("its images could not be read again")
    return _Images(kept, *map(torch.cat, zip(*parts, strict=True)))


def _run(kind: str, read: _Images, model: nn.Module, settings: Settings) -> Composites:
    """Plan, paste, run and compare; the margins are known to be the model's."""
    plan = plan_composites(
        read.difference, read.labels, per_image=PER_IMAGE, seed=settings.seed, **KINDS[kind]
    )
    with stage(f"composites, {kind}", len(read.samples)) as advance:
        rank, processes = settings.share
        # The first process's: of other maps, by rounding, other cells may be marked.
        (plan,) = in_turns([plan] if rank == 0 else [], processes, f"composites, {kind}: plan")
        step = settings.batch_size
        own = [
            composite_margins(model, read.inputs, plan[start : start + step], batch_size=step)
            for start in range(rank * step, len(plan), processes * step)
        ]
        actual = torch.cat(in_turns(own, processes, f"composites, {kind}"))
        advance(len(read.samples))
    return compare(plan, read.difference, read.margin, actual)


def _add_errors(
    measured: Measured, samples: list[Sample], found: Composites, column: str, guess: Tensor
) -> None:
    """Each receiver's mean squared error, in logits², as a column of its row."""
    sums = torch.zeros(len(samples), dtype=torch.float64)
    sums.index_add_(0, found.receiver, (found.actual - guess).square())
    measured.add_columns(samples, {column: sums / PER_IMAGE})


def _shown(found: Composites) -> list[int]:
    """Composites at three percentiles of the error: better, middling and worse ones."""
    order = (found.actual - found.predicted).abs().argsort(stable=True)
    return [int(order[round(share / 100 * (len(order) - 1))]) for share in _PICTURED]


def _picture(
    found: Composites, row: int, read: _Images, preprocessing: Preprocessing
) -> dict[str, Any]:
    one = found[row : row + 1]
    receiver, donor = int(one.receiver), int(one.donor)
    views = torch.cat([read.inputs[[receiver, donor]], pasted(read.inputs, one)])
    inside = one.region[0].flatten()[cells_of_pixels(views.cpu(), one.region.shape[1:])]
    pixels = [_with_border(as_shown(view, preprocessing), inside) for view in views]
    return {
        "receiver": str(read.samples[receiver].path),
        "donor": str(read.samples[donor].path),
        "region": one.region[0].int().tolist(),
        "before": float(one.before),
        "donor_margin": float(read.margin[donor]),
        "predicted": float(one.predicted),
        "alike": float(one.uniform),
        "actual": float(one.actual),
        "pixels": pixels,
    }


def _with_border(pixels: NDArray[np.uint8], inside: Tensor) -> NDArray[np.uint8]:
    """A line around what is inside (H, W), light within dark, legible on any ground."""
    reach = max(1, min(pixels.shape[:2]) // 112)
    drawn: NDArray[np.uint8] = pixels.copy()
    for width_, colour in ((2 * reach, 0), (reach, 255)):
        drawn[(inside & ~_eroded(inside, width_)).numpy()] = colour
    return drawn


def _eroded(inside: Tensor, reach: int) -> Tensor:
    """Pixels whose whole neighbourhood is inside; beyond the image's border all counts as such."""
    outside = (~inside).float()[None, None]
    grown = F.max_pool2d(outside, 2 * reach + 1, 1, reach)
    return grown[0, 0] == 0


def _plain(found: Interval) -> dict[str, float | None]:
    mean, low, high = plain([found.mean, found.low, found.high])
    return {"skill": mean, "low": low, "high": high}
