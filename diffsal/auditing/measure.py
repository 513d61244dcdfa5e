"""Every image measured once with each method."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffsal.auditing.batches import Batch, label_maps, read_batches
from diffsal.auditing.clusters import decision_maps
from diffsal.auditing.rows import MAPS, Measured, plain
from diffsal.auditing.settings import Settings
from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Index, Sample
from diffsal.errors import DiffsalError
from diffsal.explaining.records import NOT_FINITE, class_names, failure
from diffsal.faithfulness.input_level import receptive_share, smoothgrad, smoothgrad_agreement
from diffsal.faithfulness.localisation import (
    energy_inside,
    frame_mass,
    intersection_over_union,
    marked_share,
    pointing_game,
)
from diffsal.faithfulness.perturbation import (
    Occluder,
    insertion_deletion,
    occlusion_drops,
    occlusion_faithfulness,
    road,
)
from diffsal.faithfulness.sanity import cascading_randomization
from diffsal.faithfulness.statistics import rank_correlation
from diffsal.faithfulness.transplants import transplant_drops
from diffsal.maps.contrast import class_count, predicted_class
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import in_copy
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.devices import running

OCCLUDER: Occluder = "mean"
_FINEST = 8  # cells to occlude along each axis: more would cost their square in forward passes
CURVE_STEPS = 20  # of insertion and deletion
DRAWS = 4  # of SmoothGrad, whose ranks of cells hardly change with more
_DONORS = 4  # images of other classes, of which each cell gets one's pixels


def measure_samples(
    samples: Sequence[Sample], index: Index, loaded: LoadedModel, settings: Settings, title: str
) -> Measured:
    """Every number that is taken of every image, in one pass."""
    loaded.model.to(settings.device)
    measured = Measured(settings.seed)
    for batch in read_batches(samples, loaded, settings, title, measured.failed):
        with running(settings.device, settings.preprocessing.size, settings.batch_size):
            if not measured.names:
                outputs = explain(loaded.model, batch.inputs[:1], target_layers=loaded.target_layer)
                measured.cells = (outputs.true.shape[1], outputs.true.shape[2])
                measured.squash = outputs.squash
                measured.names = class_names(index.classes, class_count(outputs.logits))
            maps = label_maps(loaded, batch)
            numbers, curves = _measures(maps, batch, loaded, settings, measured.frame_width)
        _append(measured, batch, maps, numbers, curves)
    if not measured.rows:
        first = measured.failed[0]
        raise DiffsalError(f"{first['path']}: {first['error']} (so with every image)")
    return measured


def _measures(
    maps: SalienceMaps,
    batch: Batch,
    loaded: LoadedModel,
    settings: Settings,
    frame_width: int | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Columns (B,), and curves (B, steps + 1)."""
    model, layer = loaded.model, loaded.target_layer
    inputs, human, true = batch.inputs, batch.human, maps.true_class
    perturb: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed}
    grid = occlusion_grid(maps.true.shape[1:])
    drops = occlusion_drops(
        model, inputs, true, maps.false_class, grid=grid, occluder=OCCLUDER, **perturb
    )
    curves: dict[str, Tensor] = {}
    columns = {
        "margin": maps.margin,
        "residual": maps.residual,
        "unexplained": (maps.residual - _bias_difference(model, maps)).abs(),
        "common_mode_share": maps.common_mode_share,
        "true_difference": rank_correlation(maps.true, maps.difference),
        "true_false": rank_correlation(maps.true, maps.false),
        "marked": marked_share(human),
        "receptive_share": receptive_share(
            model, inputs, true, maps.false_class, target_layers=layer, seed=settings.seed
        ),
    }
    seen = smoothgrad(
        model, inputs, true, maps.false_class, grid=maps.true.shape[1:], draws=DRAWS, **perturb
    )
    for kind in MAPS:
        map_ = getattr(maps, kind)
        both = insertion_deletion(model, inputs, map_, true, steps=CURVE_STEPS, **perturb)
        curves |= {f"insertion_{kind}": both.insertion, f"deletion_{kind}": both.deletion}
        columns |= {
            f"occlusion_{kind}": occlusion_faithfulness(map_, drops),
            f"smoothgrad_{kind}": smoothgrad_agreement(map_, seen),
            f"insertion_{kind}": both.insertion_area,
            f"deletion_{kind}": both.deletion_area,
            f"pointing_{kind}": pointing_game(map_, human),
            f"energy_{kind}": energy_inside(map_, human),
            f"iou_{kind}": intersection_over_union(map_, human),
        }
        if frame_width is not None:
            columns[f"frame_{kind}"] = frame_mass(map_, frame_width)
    columns["blank_share"] = both.deletion[:, -1] / both.deletion[:, 0]
    return columns, curves


def _append(
    measured: Measured,
    batch: Batch,
    maps: SalienceMaps,
    numbers: dict[str, Tensor],
    curves: dict[str, Tensor],
) -> None:
    finite = (maps.true + maps.false).isfinite().flatten(1).all(1) & maps.logits.isfinite().all(1)
    logits = maps.logits.cpu()
    share = maps.probabilities.cpu()
    predicted = predicted_class(logits)
    evidence = decision_maps(maps, occlusion_grid(maps.true.shape[1:]))
    columns = {name: values.double().cpu() for name, values in numbers.items()}
    drawn = {name: curve.float().cpu().numpy() for name, curve in curves.items()}
    for row, sample in enumerate(batch.samples):
        if not finite[row]:
            measured.failed.append(failure(sample.path, NOT_FINITE))
            continue
        measured.samples.append(sample)
        measured.logits.append(logits[row])
        measured.evidence.append(evidence[row])
        measured.curves.append({name: curve[row] for name, curve in drawn.items()})
        measured.rows.append(
            {
                "path": str(sample.path),
                "label": measured.names[sample.label],
                "predicted": measured.names[int(predicted[row])],
                "correct": float(predicted[row] == sample.label),
                "probability": float(share[row, sample.label]),
                **{name: float(values[row]) for name, values in columns.items()},
            }
        )


def _bias_difference(model: nn.Module, maps: SalienceMaps) -> Tensor:
    """(B,): what the last layer's biases add to the margin; 0 where there is no such layer."""
    outputs = maps.logits.shape[1]
    last = [
        module.bias
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == outputs
    ]
    if not last or last[-1] is None:
        return torch.zeros_like(maps.margin)
    bias = last[-1].detach().to(maps.margin)
    if outputs == 1:
        return torch.where(maps.true_class == 1, bias, -bias)
    return bias[maps.true_class] - bias[maps.false_class]


def occlusion_grid(cells: Sequence[int]) -> list[int]:
    """What is occluded in turn: the cells of the maps, or blocks of them where there are many.

    Example:
        >>> occlusion_grid((4, 14))
        [4, 8]
    """
    return [min(size, _FINEST) for size in cells]


def measure_subset(
    measured: Measured, loaded: LoadedModel, settings: Settings
) -> dict[str, Any] | None:
    """Add ROAD's, transplants' and randomisation's columns; how alike maps stay, by stage."""
    count = min(settings.subset, len(measured.rows))
    if count == 0:
        return None
    spaced = np.linspace(0, len(measured.rows) - 1, count).round().astype(int)
    samples = [measured.samples[position] for position in spaced]
    model, seed = loaded.model, settings.seed
    layers: tuple[str, ...] = ()
    courses: list[Tensor] = []
    donors = _donors(measured, settings)
    for batch in read_batches(samples, loaded, settings, "ROAD, randomisation", []):
        maps = label_maps(loaded, batch)
        inputs, true = batch.inputs, maps.true_class
        columns = {
            f"road_{kind}": road(model, inputs, getattr(maps, kind), true, seed=seed)
            for kind in MAPS
        }
        if donors is not None:
            columns |= _transplanted(maps, batch, model, donors, settings)
        cascade = cascading_randomization(model, inputs, _explainer(maps, loaded), seed=seed)
        layers = cascade.layers
        by_kind = torch.stack(cascade.correlation.cpu().double().chunk(2))  # (2, B, stages)
        courses.append(by_kind)
        for kind, course in zip(MAPS, by_kind, strict=True):
            columns[f"randomised_{kind}"] = course[:, -1]
        measured.add_columns(batch.samples, columns)
    mean = torch.cat(courses, dim=1).nanmean(1)
    return {
        "layers": list(layers),
        "images": count,
        **{kind: plain(course.tolist()) for kind, course in zip(MAPS, mean, strict=True)},
    }


def _donors(measured: Measured, settings: Settings) -> dict[int, Tensor] | None:
    """Images (D, C, H, W) of other classes, for each class; ``None`` where there is one class."""
    labels = np.array([sample.label for sample in measured.samples])
    chosen = {}
    for label in set(labels.tolist()):
        others = np.flatnonzero(labels != label)
        if len(others) == 0:
            return None
        spaced = np.linspace(0, len(others) - 1, _DONORS).round().astype(int)
        samples = [measured.samples[position] for position in others[spaced]]
        images = ImageDataset(samples, settings.preprocessing)
        chosen[label] = torch.stack([images[position][0] for position in range(_DONORS)])
    return chosen


def _transplanted(
    maps: SalienceMaps,
    batch: Batch,
    model: nn.Module,
    donors: dict[int, Tensor],
    settings: Settings,
) -> dict[str, Tensor]:
    """Rank correlation with what the margin loses where windows take another class's pixels."""
    drops = transplant_drops(
        model,
        batch.inputs,
        torch.stack([donors[label] for label in batch.labels.tolist()]).to(batch.inputs),
        maps.true_class,
        maps.false_class,
        grid=occlusion_grid(maps.true.shape[1:]),
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return {
        f"transplant_{kind}": occlusion_faithfulness(getattr(maps, kind), drops) for kind in MAPS
    }


def _explainer(maps: SalienceMaps, loaded: LoadedModel) -> Callable[[nn.Module, Tensor], Tensor]:
    """Makes the true and the difference map (2B, h, w) of any copy of the model."""

    def both(model: nn.Module, inputs: Tensor) -> Tensor:
        layer = in_copy(model, loaded.target_layer)
        again = explain(model, inputs, maps.true_class, maps.false_class, target_layers=layer)
        return torch.cat([again.true, again.difference])

    return both


def mean_curves(measured: Measured) -> dict[str, Any]:
    """Means over images, and their standard errors, along insertion and deletion."""
    drawn: dict[str, Any] = {"share": np.linspace(0, 1, CURVE_STEPS + 1).tolist()}
    for name in measured.curves[0]:
        curves = np.array([image[name] for image in measured.curves], np.float64)
        curves = curves[~np.isnan(curves).any(1)]
        if len(curves):
            error = curves.std(0) / math.sqrt(len(curves))
            drawn[name] = {"mean": curves.mean(0).tolist(), "error": error.tolist()}
    return drawn
