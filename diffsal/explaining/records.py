"""What is told of an image and of its model, before any file is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.explaining.figures import Explanation
from diffsal.explaining.overlays import drawn_size
from diffsal.explaining.regions import Region, find_regions, on_image
from diffsal.maps.caveats import caveats, is_coarse
from diffsal.maps.contrast import NO_CLASS, predicted_class
from diffsal.maps.salience_maps import SalienceMaps, normalize

if TYPE_CHECKING:  # which takes seconds to import, in every process that draws
    from diffsal.models.checkpoints import LoadedModel

Record: TypeAlias = dict[str, Any]
"""An image's entry in ``manifest.json``, as ``docs/files.md`` documents it."""

NOT_FINITE = "the model's logits or maps are not finite: check its weights"
"""The error of an image of which nothing can be shown."""

_MAPS = ("true", "false", "difference")
_REGIONS = 5  # that are told of: the weightiest


@dataclass(frozen=True)
class Draft:
    """An explained image, before its files are written.

    Attributes:
        path: of the image.
        stem: what the names of its files begin with.
        record: its entry in the manifest, without ``files``.
        explanation: what its pictures show.
        arrays: the content of ``<stem>.npz``, without what `maps_at_image_size` gives.
        size: of the image, (H, W).
        preprocessing: what made the model's input of the image.
    """

    path: Path
    stem: str
    record: Record
    explanation: Explanation
    arrays: dict[str, NDArray[Any]]
    size: tuple[int, int]
    preprocessing: Preprocessing


def draft(
    path: Path,
    stem: str,
    image: NDArray[np.uint8],
    size: tuple[int, int],
    maps: SalienceMaps,
    names: Sequence[str],
    preprocessing: Preprocessing,
    notes: Sequence[str] = (),
) -> Draft:
    """What is told of one image.

    Args:
        path: of the image.
        stem: what the names of its files begin with.
        image: (H, W, 3), in its own size or reduced.
        size: its own, (H, W).
        maps: a batch of one, on the CPU.
        names: one per class.
        preprocessing: what made the model's input of the image.
        notes: sentences on the image itself, told before those on its maps.
    """
    raw = torch.cat([getattr(maps, name) for name in _MAPS])
    drawn = preprocessing.place(raw, drawn_size(*size), is_coarse(maps.true.shape))
    regions = find_regions(maps.difference[0])[:_REGIONS]
    inside = [on_image(region, preprocessing, drawn_size(*size)) for region in regions]
    told: Record = {"path": str(path)} | _decision(maps, names)
    told["regions"] = [
        _region(region, pixels, size) for region, pixels in zip(regions, inside, strict=True)
    ]
    told["caveats"] = [*notes, *told["caveats"]]
    record = {name: None if value != value else value for name, value in told.items()}  # NaN
    explanation = replace(
        _explanation(path.name, image, drawn, maps, told),
        size=size,
        regions=[
            (pixels, region.logits, region.of)
            for region, pixels in zip(regions, inside, strict=True)
        ],
    )
    arrays = dict(zip(_MAPS, raw.numpy(), strict=True))
    for name in ("logits", "true_class", "false_class"):
        arrays[name] = getattr(maps, name)[0].numpy()
    return Draft(path, stem, record, explanation, arrays, size, preprocessing)


def _region(region: Region, inside: NDArray[np.bool_], size: tuple[int, int]) -> Record:
    """What the manifest tells of a region; ``inside`` is of the image at its size or reduced."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    box = None
    if len(rows):
        scales = size[0] / inside.shape[0], size[1] / inside.shape[1]
        top, bottom = (round(end * scales[0]) for end in (rows[0], rows[-1] + 1))
        left, right = (round(end * scales[1]) for end in (columns[0], columns[-1] + 1))
        box = [left, top, right - left, bottom - top]
    return {
        "logits": region.logits,
        "of": region.of,
        "cells": region.count,
        "area": float(inside.mean()),
        "box": box,
    }


def _decision(maps: SalienceMaps, names: Sequence[str]) -> Record:
    """What the model makes of the image, in numbers and names."""
    true, false = int(maps.true_class), int(maps.false_class)
    predicted = int(predicted_class(maps.logits))
    difference = maps.difference.double()
    return {
        "logits": maps.logits[0].tolist(),
        "probabilities": maps.probabilities[0].tolist(),
        "predicted_class": predicted,
        "predicted_name": names[predicted],
        "true_class": true,
        "true_name": names[true],
        "true_from": maps.true_from,
        "false_class": None if false == NO_CLASS else false,
        "false_name": "the rest" if false == NO_CLASS else names[false],
        "margin": float(maps.margin),
        "evidence_for": float(difference.clamp(min=0).sum()),
        "evidence_against": float(difference.clamp(max=0).sum()),
        "residual": float(maps.residual),
        "common_mode_share": float(maps.common_mode_share),
        "outputs_are": maps.squash or "logits",
        "caveats": caveats(maps)[0],
    }


def _explanation(
    title: str, image: NDArray[np.uint8], placed: Tensor, maps: SalienceMaps, told: Record
) -> Explanation:
    share, false = told["probabilities"], told["false_class"]
    true_probability = share[told["true_class"]]
    shown = {field.name for field in fields(Explanation)} - {"regions"}
    return Explanation(
        title=title,
        image=image,
        **dict(zip(_MAPS, placed.numpy(), strict=True)),
        cells=(maps.true.shape[1], maps.true.shape[2]),
        true_probability=true_probability,
        false_probability=1 - true_probability if false is None else share[false],
        predicted_probability=share[told["predicted_class"]],
        outputs=maps.logits.shape[1],
        **{name: value for name, value in told.items() if name in shown},
    )


def maps_at_image_size(made: Draft) -> dict[str, NDArray[Any]]:
    """``true_normalized`` and so on: (H, W) of the image, in [0, 1], NaN where nothing was seen."""
    return {
        f"{name}_normalized": _normalize_seen(
            made.preprocessing.place(torch.from_numpy(made.arrays[name]), made.size)
        ).numpy()
        for name in _MAPS
    }


def _normalize_seen(placed: Tensor) -> Tensor:
    """Normalise what the model saw; the rest stays NaN."""
    seen = ~placed.isnan()
    normalized = torch.full_like(placed, torch.nan)
    if seen.any():  # nothing is, where the map is not finite
        normalized[seen] = normalize(placed[seen][None])[0]
    return normalized


def failure(path: Path, error: object) -> Record:
    """The record of an image that nothing else can be told of.

    Example:
        >>> failure(Path("a.png"), "a.png: no such file")
        {'path': 'a.png', 'error': 'no such file'}
    """
    return {"path": str(path), "error": str(error).removeprefix(f"{path}: ")}


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """Which model it was, as the files of explanations and audits tell it."""
    return {
        "path": str(loaded.path),
        "sha256": loaded.sha256,
        "architecture": loaded.architecture,
        "arguments": loaded.arguments,
        "target_layer": str(loaded.target_layer),
    }


def class_names(classes: Sequence[str] | None, count: int) -> list[str]:
    """One name per class.

    Raises:
        DiffsalError: the number of names is not ``count``.

    Example:
        >>> class_names(None, 2)
        ['class 0', 'class 1']
    """
    if classes is None:
        return [f"class {index}" for index in range(count)]
    if len(classes) != count:
        raise DiffsalError(
            f"{len(classes)} class names for a model of {count} classes: pass one for each with "
            "--classes, in the order of the outputs"
        )
    return list(classes)
