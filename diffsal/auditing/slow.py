"""Tests that cost many passes of the model, each on a sample of the images.

A test takes images in one seeded order, as many of each class, in rounds, until the 95 % intervals
of the means that it gives are narrow enough, see :mod:`diffsal.auditing.sampling`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from diffsal.auditing.batches import Batch, label_maps, read_batches
from diffsal.auditing.rows import MAPS, OCCLUSIONS, Measured, plain
from diffsal.auditing.sampling import balanced_order, half_width, in_rounds
from diffsal.auditing.settings import Occluders, Settings
from diffsal.auditing.stability import sensitivity_columns
from diffsal.data.index import Sample
from diffsal.faithfulness.input_level import receptive_share, smoothgrad, smoothgrad_agreement
from diffsal.faithfulness.perturbation import (
    insertion_deletion,
    occlusion_drops,
    occlusion_faithfulness,
    road,
)
from diffsal.faithfulness.sanity import cascading_randomization
from diffsal.faithfulness.transplants import transplant_drops
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import in_copy
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.processes import in_turns

CURVE_STEPS = 10  # of insertion and deletion, whose mean areas 80 would change by 0.003
_FINEST = 8  # cells to occlude along each axis: more would cost their square in forward passes
_REMOVED = (25, 50, 75)  # per cent of the pixels, by ROAD, whose imputation is the dearest step
_DRAWS = 4  # of SmoothGrad, whose ranks of cells hardly change with more
_DONORS = 4  # images of other classes, of which each cell gets one's pixels

Found: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Columns (B,) and curves (B, steps)."""


@dataclass(frozen=True)
class SlowTest:
    """A test, and when it has seen enough.

    Attributes:
        name: as ``audit.json`` calls it.
        measures: of each map, whose means are to be narrow; their columns end in the map's name.
        measure: from images and their maps to columns and curves.
        others: columns whose means are to be narrow, too.
        by_class: columns whose mean within each class is to be narrow, too.
    """

    name: str
    measures: Sequence[str]
    measure: Callable[[Batch, SalienceMaps], Found]
    others: Sequence[str] = ()
    by_class: Sequence[str] = ()

    def half_width(self, measured: Measured) -> float:
        """The widest of its intervals, to either side."""
        names = [f"{measure}_{kind}" for measure in self.measures for kind in MAPS]
        numbers = [measured.number(name, "", "") for name in (*names, *self.others)]
        for name in self.by_class:
            numbers += measured.by_class(name, "", "").values()
        return max(map(half_width, numbers))


def measure_slowly(measured: Measured, loaded: LoadedModel, settings: Settings) -> None:
    """Add the slow tests' columns and curves, each of as many images as it takes."""
    order = balanced_order([sample.label for sample in measured.samples], settings.seed)
    for test in _tests(measured, loaded, settings):

        def measure(positions: Sequence[int], test: SlowTest = test) -> float:
            _measure(test, measured, loaded, settings, positions)
            return test.half_width(measured)

        images, width = in_rounds(order, measure, settings.precision)
        measured.sampling.append(
            {
                "test": test.name,
                "images": images,
                "half_width": width if math.isfinite(width) else None,
                "narrow": width <= settings.precision,
            }
        )


def measure_likewise(
    other: Measured, measured: Measured, loaded: LoadedModel, settings: Settings
) -> None:
    """Add to a reference what occlusion, curves and gradients say of the model's own samples."""
    for test in _tests(other, loaded, settings):
        if test.name not in (*OCCLUSIONS.values(), "input-level", "insertion-deletion"):
            continue
        known = {
            row["path"] for row in measured.rows if f"{test.measures[0]}_{next(iter(MAPS))}" in row
        }
        taken = [place for place, row in enumerate(other.rows) if row["path"] in known]
        _measure(test, other, loaded, settings, taken)


def _measure(
    test: SlowTest,
    measured: Measured,
    loaded: LoadedModel,
    settings: Settings,
    positions: Sequence[int],
) -> None:
    samples = [measured.samples[position] for position in positions]
    own: list[tuple[list[Sample], Found]] = []
    for batch in read_batches(samples, loaded, settings, test.name, [], settings.share):
        found = test.measure(batch, label_maps(loaded, batch))
        columns, curves = ({name: one.cpu() for name, one in part.items()} for part in found)
        own.append((batch.samples, (columns, curves)))
    for of, (columns, curves) in in_turns(own, settings.share[1], test.name):
        measured.add_columns(of, columns)
        for name, curve in curves.items():
            measured.curves.setdefault(name, []).extend(curve.double().numpy())


def _tests(measured: Measured, loaded: LoadedModel, settings: Settings) -> list[SlowTest]:
    """Occlusion by each occluder, each to its own precision, then the others."""
    donors = _donors(measured, settings) if "transplant" in settings.occluders else None
    model = loaded.model
    return [
        *(
            SlowTest(
                OCCLUSIONS[one],
                [OCCLUSIONS[one]],
                partial(_occlusion, model, settings, one, donors),
                by_class=["occlusion_difference"] if one == "mean" else [],
            )
            for one in dict.fromkeys(("mean", *settings.occluders))
            if one != "transplant" or donors is not None
        ),
        SlowTest(
            "input-level",
            ["smoothgrad"],
            partial(_gradients, loaded, settings),
            others=["receptive_share"],
        ),
        SlowTest(
            "insertion-deletion", ["insertion", "deletion"], partial(_curves, model, settings)
        ),
        SlowTest(
            "sensitivity",
            [],
            lambda batch, _: (sensitivity_columns(loaded, settings, batch), {}),
            others=["sensitivity"],
        ),
        SlowTest("ROAD", ["road"], partial(_road, model, settings)),
        SlowTest("randomisation", ["randomised"], partial(_randomised, measured, loaded, settings)),
    ]


def occlusion_grid(cells: Sequence[int]) -> list[int]:
    """What is occluded in turn: the cells of the maps, or blocks of them where there are many.

    Example:
        >>> occlusion_grid((4, 14))
        [4, 8]
    """
    return [min(size, _FINEST) for size in cells]


def _occlusion(
    model: nn.Module,
    settings: Settings,
    occluder: Occluders,
    donors: dict[int, Tensor] | None,
    batch: Batch,
    maps: SalienceMaps,
) -> Found:
    """Rank correlation with what the margin loses where cells take what is the occluder's."""
    likewise: dict[str, Any] = {
        "grid": occlusion_grid(maps.true.shape[1:]),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    images, classes = batch.inputs, (maps.true_class, maps.false_class)
    if occluder == "transplant":
        assert donors is not None
        own = torch.stack([donors[label] for label in batch.labels.tolist()]).to(images)
        drops = transplant_drops(model, images, own, *classes, **likewise)
    else:
        drops = occlusion_drops(model, images, *classes, occluder=occluder, **likewise)
    measure = OCCLUSIONS[occluder]
    return {
        f"{measure}_{kind}": occlusion_faithfulness(getattr(maps, kind), drops) for kind in MAPS
    }, {}


def _donors(measured: Measured, settings: Settings) -> dict[int, Tensor] | None:
    """Images (D, C, H, W) of other classes, for each class; ``None`` where there is one class."""
    labels = np.array([sample.label for sample in measured.samples])
    chosen = {}
    for label in set(labels.tolist()):
        others = np.flatnonzero(labels != label)
        if len(others) == 0:
            return None
        spaced = np.linspace(0, len(others) - 1, _DONORS).round().astype(int)
        samples: list[Sample] = [measured.samples[position] for position in others[spaced]]
        images = settings.source.items(samples, settings.preprocessing)
        chosen[label] = torch.stack([images[position][0] for position in range(_DONORS)])
    return chosen


def _gradients(loaded: LoadedModel, settings: Settings, batch: Batch, maps: SalienceMaps) -> Found:
    model, images, classes = loaded.model, batch.inputs, (maps.true_class, maps.false_class)
    seen = smoothgrad(
        model,
        images,
        *classes,
        grid=maps.true.shape[1:],
        draws=_DRAWS,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    columns = {
        f"smoothgrad_{kind}": smoothgrad_agreement(getattr(maps, kind), seen) for kind in MAPS
    }
    columns["receptive_share"] = receptive_share(
        model, images, *classes, target_layers=loaded.target_layer, seed=settings.seed
    )
    return columns, {}


def _curves(model: nn.Module, settings: Settings, batch: Batch, maps: SalienceMaps) -> Found:
    columns: dict[str, Tensor] = {}
    curves: dict[str, Tensor] = {}
    for kind in MAPS:
        both = insertion_deletion(
            model,
            batch.inputs,
            getattr(maps, kind),
            maps.true_class,
            steps=CURVE_STEPS,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        curves |= {f"insertion_{kind}": both.insertion, f"deletion_{kind}": both.deletion}
        columns |= {
            f"insertion_{kind}": both.insertion_area,
            f"deletion_{kind}": both.deletion_area,
        }
    columns["blank_share"] = both.deletion[:, -1] / both.deletion[:, 0]
    return columns, curves


def _road(model: nn.Module, settings: Settings, batch: Batch, maps: SalienceMaps) -> Found:
    return {
        f"road_{kind}": road(
            model,
            batch.inputs,
            getattr(maps, kind),
            maps.true_class,
            percentiles=_REMOVED,
            seed=settings.seed,
        )
        for kind in MAPS
    }, {}


def _randomised(
    measured: Measured,
    loaded: LoadedModel,
    settings: Settings,
    batch: Batch,
    maps: SalienceMaps,
) -> Found:
    def both(model: nn.Module, inputs: Tensor) -> Tensor:
        """The true and the difference map (2B, h, w) of any copy of the model."""
        layer = in_copy(model, loaded.target_layer)
        again = explain(model, inputs, maps.true_class, maps.false_class, target_layers=layer)
        return torch.cat([again.true, again.difference])

    cascade = cascading_randomization(loaded.model, batch.inputs, both, seed=settings.seed)
    measured.randomised_layers = cascade.layers
    courses = {
        f"randomised_{kind}": course
        for kind, course in zip(MAPS, cascade.correlation.chunk(2), strict=True)
    }
    return {name: course[:, -1] for name, course in courses.items()}, courses


def mean_curves(measured: Measured) -> dict[str, Any]:
    """Means over images, and their standard errors, along insertion and deletion."""
    drawn: dict[str, Any] = {"share": np.linspace(0, 1, CURVE_STEPS + 1).tolist()}
    for name, own in measured.curves.items():
        curves = np.array(own)
        curves = curves[~np.isnan(curves).any(1)]
        if len(curves) and not name.startswith("randomised"):
            error = curves.std(0) / math.sqrt(len(curves))
            drawn[name] = {"mean": curves.mean(0).tolist(), "error": error.tolist()}
    return drawn


def mean_courses(measured: Measured) -> dict[str, Any]:
    """How alike maps stay while the model's layers are made random, by stage."""
    courses = {kind: np.array(measured.curves[f"randomised_{kind}"]) for kind in MAPS}
    return {
        "layers": list(measured.randomised_layers),
        "images": len(courses["true"]),
        **{
            kind: plain(torch.from_numpy(course).nanmean(0).tolist())
            for kind, course in courses.items()
        },
    }
