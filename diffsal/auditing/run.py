"""Audit one model: can its heatmaps be believed? Numbers, intervals, and what they do not show.

:func:`audit` measures every image once with each method and keeps a row of numbers per image, no
pictures. From the rows come the findings, see :mod:`diffsal.findings`, and the files that
``docs/audit.md`` documents.
"""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from diffsal import __version__
from diffsal.contrast import class_count, predicted_class, probabilities
from diffsal.data import ImageDataset, Index, Sample
from diffsal.devices import running
from diffsal.errors import DiffsalError
from diffsal.explanations import Outputs, class_names, explain_images
from diffsal.explanations import Settings as ExplanationSettings
from diffsal.faithfulness import (
    Occluder,
    cascading_randomization,
    energy_inside,
    frame_mass,
    insertion_deletion,
    intersection_over_union,
    marked_share,
    occlusion_drops,
    occlusion_faithfulness,
    pointing_game,
    rank_correlation,
    road,
)
from diffsal.files import replacing, write_json
from diffsal.findings import COLUMNS, MAPS, Measured, Row, compare, find, plain, summarize
from diffsal.fooling import head_shift, target_distance, target_map
from diffsal.images import Preprocessing
from diffsal.models import LoadedModel, check_class_order
from diffsal.report import picture, render_report
from diffsal.salience import SalienceMaps, explain
from diffsal.target_layers import get_target_layer

__all__ = ["Settings", "audit"]

FORMAT = "diffsal-audit"
FORMAT_VERSION = 1
_REFERENCE_ROWS = "per-image-reference.csv"
# In the order in which they are written:
FILES = ("per-image.csv", _REFERENCE_ROWS, "audit.json", "report.html")

_OCCLUDER: Occluder = "mean"
_FINEST = 8  # cells to occlude along each axis: more would cost their square in forward passes
_STEPS = 20  # of insertion and deletion
_SHOWN = 3  # images of each kind in the gallery
_FITTED = 256  # images at most from which the stress test is built


@dataclass(frozen=True)
class Settings:
    """How a model is audited.

    Attributes:
        preprocessing: from an image's pixels to the model's input.
        device: where the model runs.
        limit: at most this many images, drawn at random by ``seed``; ``None``: all.
        subset: images, evenly spaced, for the slow methods: ROAD and randomisation. 0 leaves them
            out.
        batch_size: images, perturbed ones included, in one forward pass.
        seed: of the draws of images, of the bootstrap, and of whatever else is random.
    """

    preprocessing: Preprocessing
    device: torch.device
    limit: int | None = None
    subset: int = 8
    batch_size: int = 64
    seed: int = 0


def audit(
    index: Index,
    loaded: LoadedModel,
    folder: Path,
    settings: Settings,
    reference: LoadedModel | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Audit a model and write ``per-image.csv``, ``audit.json`` and ``report.html``.

    The test split is audited if the index has one, else all of its images. Labels are taken as
    true. An image that cannot be read does not stop the rest. The files are written when everything
    is known, the report last; each appears whole or not at all.

    Args:
        index: read with the model's class names where these are known; else its own are taken to
            be in the order of the outputs.
        loaded: the model; it is moved to the settings' device.
        folder: made where it is not there.
        settings: see there.
        reference: a second model, measured on the same images and set beside the first.
        overwrite: replace files that are there already; an earlier audit's rows of a reference go
            where there is none now.

    Returns:
        The content of ``audit.json``.

    Raises:
        DiffsalError: no images, none that can be read, class names that do not fit a model's
            outputs or their order, a model that does not run on the images, files that are there
            already.
    """
    _check_free(folder, overwrite)
    for model in (loaded, reference):
        if model is not None:
            check_class_order(model, index.classes, index.source)
    samples, split = _chosen(index, settings)
    measured = _measure(samples, index, loaded, settings, "audit")
    with running(settings.device, settings.preprocessing.size, settings.batch_size):
        randomisation = _measure_subset(measured, loaded, settings)
        fooled, obstacle = _stress(index, split, measured, loaded, settings)
    comparison, other = None, None
    if reference is not None:
        other = _measure(samples, index, reference, _own_input(settings, reference), "reference")
        comparison = {"model": _identity(reference)} | compare(measured, other)
    findings, left_out = find(measured, obstacle)
    gallery = _gallery(measured)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "diffsal_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": _identity(loaded),
        "data": _data_facts(index, split, measured),
        "settings": _settings_facts(settings, measured),
        "summary": summarize(findings, measured, index, split),
        "findings": findings,
        "left_out": left_out,
        "reference": comparison,
        "curves": _curves(measured),
        "randomisation": randomisation,
        "gallery": [
            {**group, "images": [measured.rows[image]["path"] for image in group["images"]]}
            for group in gallery
        ],
        "failed": measured.failed,
    }
    with TemporaryDirectory() as scratch:
        shown = _shown(gallery, measured, loaded, fooled, settings, Path(scratch))
    page = render_report(document, {name: measured.column(name) for name in COLUMNS}, *shown)

    _write_rows(folder / "per-image.csv", measured.rows)
    if other is not None:
        _write_rows(folder / _REFERENCE_ROWS, other.rows)
    elif overwrite:
        (folder / _REFERENCE_ROWS).unlink(missing_ok=True)
    write_json(folder / "audit.json", document)
    with replacing(folder / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    return document


# ------------------------------------------------------------------------------- what is audited


def _check_free(folder: Path, overwrite: bool) -> None:
    there = [folder / name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise DiffsalError(
            f"{there[0]} is there already: pass --overwrite, or name another folder with --out"
        )


def _chosen(index: Index, settings: Settings) -> tuple[list[Sample], str]:
    """The samples to audit, in the index's order, and the split that they are of."""
    samples, split = list(index.split("test")), "test"
    if not samples:
        samples, split = list(index.samples), "all"
    if not samples:
        raise DiffsalError(f"{index.source}: the index holds no images; list some")
    return _draw(samples, settings.limit, settings.seed), split


def _draw(samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    if count is None or count >= len(samples):
        return samples
    drawn = np.random.default_rng(seed).choice(len(samples), count, replace=False)
    return [samples[position] for position in np.sort(drawn)]


def _own_input(settings: Settings, loaded: LoadedModel) -> Settings:
    """The settings with the preprocessing that a model's file names, if it names one."""
    return replace(settings, preprocessing=loaded.preprocessing or settings.preprocessing)


# ---------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class _Batch:
    """Images on the device: inputs (B, 3, H, W), labels (B,), human maps (B, H, W)."""

    inputs: Tensor
    labels: Tensor
    human: Tensor
    samples: list[Sample]


def _batches(
    samples: Sequence[Sample],
    loaded: LoadedModel,
    settings: Settings,
    title: str,
    failed: list[dict[str, str]],
) -> Iterator[_Batch]:
    """Batches of what can be read; what cannot goes to ``failed``."""
    dataset = ImageDataset(samples, settings.preprocessing)
    dtype = next(loaded.model.parameters()).dtype
    step = max(1, settings.batch_size // 8)  # each is perturbed into a hundred: progress is seen
    with tqdm(total=len(samples), desc=title, unit="image", disable=None) as progress:
        for start in range(0, len(samples), step):
            items = []
            for position in range(start, min(start + step, len(samples))):
                try:
                    items.append(dataset[position])
                except DiffsalError as error:
                    failed.append(_failure(samples[position], error))
            if items:
                images, labels, human, positions = zip(*items, strict=True)
                yield _Batch(
                    torch.stack(images).to(settings.device, dtype),
                    torch.tensor(labels, device=settings.device),
                    torch.stack(human).to(settings.device),
                    [samples[position] for position in positions],
                )
            progress.update(min(step, len(samples) - start))


def _failure(sample: Sample, error: object) -> dict[str, str]:
    return {"path": str(sample.path), "error": str(error).removeprefix(f"{sample.path}: ")}


def _measure(
    samples: Sequence[Sample], index: Index, loaded: LoadedModel, settings: Settings, title: str
) -> Measured:
    """Every number that is taken of every image, in one pass."""
    loaded.model.to(settings.device)
    measured = Measured(settings.seed)
    for batch in _batches(samples, loaded, settings, title, measured.failed):
        with running(settings.device, settings.preprocessing.size, settings.batch_size):
            if not measured.names:
                outputs = explain(loaded.model, batch.inputs[:1], target_layers=loaded.target_layer)
                measured.cells = (outputs.true.shape[1], outputs.true.shape[2])
                measured.names = class_names(index.classes, class_count(outputs.logits))
            maps = _maps(loaded, batch)
            numbers, curves = _measures(maps, batch, loaded.model, settings, measured.frame_width)
        _append(measured, batch, maps, numbers, curves)
    if not measured.rows:
        first = measured.failed[0]
        raise DiffsalError(f"{first['path']}: {first['error']} (so with every image)")
    return measured


def _maps(loaded: LoadedModel, batch: _Batch, false: Tensor | None = None) -> SalienceMaps:
    """Of the labels, against the strongest other classes or ``false`` (B,)."""
    return explain(
        loaded.model, batch.inputs, batch.labels, false, target_layers=loaded.target_layer
    )


def _measures(
    maps: SalienceMaps,
    batch: _Batch,
    model: nn.Module,
    settings: Settings,
    frame_width: int | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Columns (B,), and curves (B, steps + 1)."""
    perturb: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed}
    drops = occlusion_drops(
        model,
        batch.inputs,
        maps.true_class,
        maps.false_class,
        grid=_occlusion_grid(maps.true.shape[1:]),
        occluder=_OCCLUDER,
        **perturb,
    )
    human = batch.human
    curves: dict[str, Tensor] = {}
    columns = {
        "margin": maps.margin,
        "residual": maps.residual,
        "unexplained": (maps.residual - _bias_difference(model, maps)).abs(),
        "common_mode_share": maps.common_mode_share,
        "true_difference": rank_correlation(maps.true, maps.difference),
        "true_false": rank_correlation(maps.true, maps.false),
        "marked": marked_share(human),
    }
    for kind in MAPS:
        map_ = getattr(maps, kind)
        both = insertion_deletion(
            model, batch.inputs, map_, maps.true_class, steps=_STEPS, **perturb
        )
        curves |= {f"insertion_{kind}": both.insertion, f"deletion_{kind}": both.deletion}
        columns |= {
            f"occlusion_{kind}": occlusion_faithfulness(map_, drops),
            f"insertion_{kind}": both.insertion_area,
            f"deletion_{kind}": both.deletion_area,
            f"pointing_{kind}": pointing_game(map_, human),
            f"energy_{kind}": energy_inside(map_, human),
            f"iou_{kind}": intersection_over_union(map_, human),
        }
        if frame_width is not None:
            columns[f"frame_{kind}"] = frame_mass(map_, frame_width)
    return columns, curves


def _append(
    measured: Measured,
    batch: _Batch,
    maps: SalienceMaps,
    numbers: dict[str, Tensor],
    curves: dict[str, Tensor],
) -> None:
    finite = (maps.true + maps.false).isfinite().flatten(1).all(1) & maps.logits.isfinite().all(1)
    logits = maps.logits.cpu()
    share = probabilities(logits.double())
    predicted = predicted_class(logits)
    columns = {name: values.double().cpu() for name, values in numbers.items()}
    drawn = {name: curve.float().cpu().numpy() for name, curve in curves.items()}
    for row, sample in enumerate(batch.samples):
        if not finite[row]:
            measured.failed.append(
                _failure(sample, "the model's logits or maps are not finite: check its weights")
            )
            continue
        measured.samples.append(sample)
        measured.logits.append(logits[row])
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


def _occlusion_grid(cells: Sequence[int]) -> list[int]:
    return [min(size, _FINEST) for size in cells]


def _measure_subset(
    measured: Measured, loaded: LoadedModel, settings: Settings
) -> dict[str, Any] | None:
    """Add the columns of ROAD and randomisation; return how alike the maps stay, by stage."""
    count = min(settings.subset, len(measured.rows))
    if count == 0:
        return None
    spaced = np.linspace(0, len(measured.rows) - 1, count).round().astype(int)
    samples = [measured.samples[position] for position in spaced]
    layers: tuple[str, ...] = ()
    courses: list[Tensor] = []
    for batch in _batches(samples, loaded, settings, "ROAD, randomisation", []):
        maps = _maps(loaded, batch)
        columns = {
            f"road_{kind}": road(
                loaded.model,
                batch.inputs,
                getattr(maps, kind),
                maps.true_class,
                seed=settings.seed,
            )
            for kind in MAPS
        }
        cascade = cascading_randomization(
            loaded.model, batch.inputs, _explainer(maps, loaded), seed=settings.seed
        )
        layers = cascade.layers
        by_kind = torch.stack(cascade.correlation.cpu().double().chunk(2))  # (2, B, stages)
        courses.append(by_kind)
        for kind, course in zip(MAPS, by_kind, strict=True):
            columns[f"randomised_{kind}"] = course[:, -1]
        _add(measured, batch, columns)
    mean = torch.cat(courses, dim=1).nanmean(1)
    return {
        "layers": list(layers),
        "images": count,
        **{kind: plain(course.tolist()) for kind, course in zip(MAPS, mean, strict=True)},
    }


def _explainer(maps: SalienceMaps, loaded: LoadedModel) -> Callable[[nn.Module, Tensor], Tensor]:
    """Makes the true and the difference map (2B, h, w) of any copy of the model."""

    def both(model: nn.Module, inputs: Tensor) -> Tensor:
        layer = get_target_layer(model, loaded.target_layer.name)
        again = explain(model, inputs, maps.true_class, maps.false_class, target_layers=layer)
        return torch.cat([again.true, again.difference])

    return both


def _stress(
    index: Index, split: str, measured: Measured, loaded: LoadedModel, settings: Settings
) -> tuple[LoadedModel | None, str]:
    """Apply the head shift to a copy, and add what it did to rows that it was not made from.

    Returns:
        The fooled copy; or ``None``, and why there is none.
    """
    shown = measured.samples
    fitting = list(index.split("train")) if split == "test" else []
    if not fitting:
        fitting = _draw(shown, len(shown) // 2, settings.seed)
        used = {sample.path for sample in fitting}
        shown = [sample for sample in shown if sample.path not in used]
    fitting = _draw(fitting, _FITTED, settings.seed)
    batches = _batches(fitting, loaded, settings, "stress test: fitting", [])
    try:
        target = target_map("edges", measured.cells)
        shifted = head_shift(
            loaded.model,
            (batch.inputs for batch in batches),
            target,
            target_layer=loaded.target_layer,
        )
    except DiffsalError as error:
        return None, str(error)
    layer = get_target_layer(shifted.model, loaded.target_layer.name)
    fooled = replace(loaded, model=shifted.model, target_layer=layer)
    for batch in _batches(shown, loaded, settings, "stress test", []):
        before = _maps(loaded, batch)
        after = _maps(fooled, batch, before.false_class)
        _add(measured, batch, _effects(before, after, target.to(before.true)))
    return fooled, ""


def _add(measured: Measured, batch: _Batch, columns: dict[str, Tensor]) -> None:
    """Add numbers (B,) to the rows of a batch's images."""
    rows = {row["path"]: row for row in measured.rows}
    for image, sample in enumerate(batch.samples):
        rows[str(sample.path)] |= {k: float(values[image]) for k, values in columns.items()}


def _effects(before: SalienceMaps, after: SalienceMaps, target: Tensor) -> dict[str, Tensor]:
    """(B,) each: what became of maps and decisions."""
    was, now = (probabilities(maps.logits.double()) for maps in (before, after))
    moved = (after.difference - before.difference).flatten(1).norm(dim=1)
    return {
        "target_before": target_distance(before.true, target),
        "target_after": target_distance(after.true, target),
        "share_after": after.common_mode_share,
        "probability_change": (now - was).abs().amax(1),
        "difference_change": moved / before.difference.flatten(1).norm(dim=1),
        "prediction_changed": (now.argmax(1) != was.argmax(1)).double(),
    }


def _curves(measured: Measured) -> dict[str, Any]:
    """Means over images, and their standard errors, along insertion and deletion."""
    drawn: dict[str, Any] = {"share": np.linspace(0, 1, _STEPS + 1).tolist()}
    for name in measured.curves[0]:
        curves = np.array([image[name] for image in measured.curves], np.float64)
        curves = curves[~np.isnan(curves).any(1)]
        if len(curves):
            error = curves.std(0) / math.sqrt(len(curves))
            drawn[name] = {"mean": curves.mean(0).tolist(), "error": error.tolist()}
    return drawn


# --------------------------------------------------------------------------------------- gallery


def _gallery(measured: Measured) -> list[dict[str, Any]]:
    """Which images are shown, and why: positions among the rows."""
    right = measured.column("correct") == 1
    share = measured.column("common_mode_share")
    faithful = measured.column("occlusion_difference")
    margin = measured.column("margin")
    middling = sum(
        np.abs(stats.rankdata(values) / len(values) - 0.5)
        for values in (np.nan_to_num(share), np.nan_to_num(faithful), margin)
    )
    groups = (
        (
            "typical",
            "Typical",
            "right, and near the middle in common-mode share, faithfulness and margin",
            np.where(right, middling, math.nan),
        ),
        ("common-mode", "Most common-mode", "the highest common-mode shares", -share),
        (
            "unfaithful",
            "Least faithful",
            "the difference map's lowest rank correlations with occlusion",
            faithful,
        ),
        (
            "wrong",
            "Wrongly classified",
            "by the largest margins",
            np.where(right, math.nan, margin),
        ),
    )
    return [
        {"id": identity, "title": title, "why": why, "images": _lowest(order)}
        for identity, title, why, order in groups
    ]


def _lowest(order: NDArray[np.float64]) -> list[int]:
    known = int((~np.isnan(order)).sum())
    return [int(image) for image in np.argsort(order, kind="stable")[: min(known, _SHOWN)]]


def _shown(
    gallery: list[dict[str, Any]],
    measured: Measured,
    loaded: LoadedModel,
    fooled: LoadedModel | None,
    settings: Settings,
    scratch: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pictures of the gallery, and of the stress test before and after."""

    def draw(model: LoadedModel, positions: Sequence[int]) -> list[dict[str, Any]]:
        return [
            measured.rows[position]
            | _pictures(measured.samples[position], model, settings, scratch)
            for position in positions
        ]

    groups = [{**group, "images": draw(loaded, group["images"])} for group in gallery]
    if fooled is None:
        return groups, []
    known = np.flatnonzero(~np.isnan(measured.column("target_after")))
    positions = known[np.linspace(0, len(known) - 1, _SHOWN).round().astype(int)].tolist()
    pairs = zip(draw(loaded, positions), draw(fooled, positions), strict=True)
    return groups, [{"before": before, "after": after} for before, after in pairs]


def _pictures(
    sample: Sample, loaded: LoadedModel, settings: Settings, scratch: Path
) -> dict[str, str]:
    """The image and its maps as data URIs, by the pipeline of `diffsal explain`."""
    manifest = explain_images(
        [sample.path],
        loaded=loaded,
        folder=scratch,
        settings=ExplanationSettings(
            preprocessing=settings.preprocessing,
            device=settings.device,
            true=str(sample.label),
            outputs=Outputs(figure=False, overlays=True),
        ),
        overwrite=True,
    )
    names = manifest["images"][0]["files"]
    panels = ("true", "false", "difference", "evidence")
    paths = dict(zip(panels, (scratch / name for name in names), strict=True))
    return {"input": picture(sample.path)} | {panel: picture(path) for panel, path in paths.items()}


# ----------------------------------------------------------------------------------------- files


def _identity(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "path": str(loaded.path),
        "sha256": loaded.sha256,
        "architecture": loaded.architecture,
        "arguments": loaded.arguments,
        "target_layer": loaded.target_layer.name,
    }


def _data_facts(index: Index, split: str, measured: Measured) -> dict[str, Any]:
    return {
        "index": str(index.source),
        "split": split,
        "available": len(index.split("test") or index.samples),
        "audited": len(measured.rows),
        "failed": len(measured.failed),
        "classes": {
            name: sum(row["label"] == name for row in measured.rows) for name in measured.names
        },
        "with_human_maps": int((~np.isnan(measured.column("marked"))).sum()),
    }


def _settings_facts(settings: Settings, measured: Measured) -> dict[str, Any]:
    return {
        **asdict(settings),
        "preprocessing": settings.preprocessing.to_dict(),
        "device": str(settings.device),
        "outputs": measured.outputs,
        "cells": list(measured.cells),
        "occluder": _OCCLUDER,
        "occlusion_grid": _occlusion_grid(measured.cells),
        "curve_steps": _STEPS,
        "frame_width": measured.frame_width,
    }


def _write_rows(path: Path, rows: list[Row]) -> None:
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "label", "predicted", *COLUMNS], restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v != v else v for k, v in row.items()})  # NaN is not itself
