"""An image that was given to the page, and what the model makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsal.data.images import image_of_bytes
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.explaining.overlays import Pixels, reduced
from diffsal.explaining.records import NOT_FINITE, Draft, class_names, draft
from diffsal.explaining.regions import find_regions
from diffsal.maps.contrast import Choice, class_count
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer
from diffsal.serving.pictures import layers_over, seen_box
from diffsal.system.devices import running


@dataclass(frozen=True, eq=False)
class Served:
    """A model that answers, the same for all who ask; nothing of it is ever changed.

    Attributes:
        model: in evaluation mode, on the device.
        layer: where maps are taken.
        preprocessing: from an image's pixels to the model's input.
        device: where the model runs.
        classes: one name per class; ``None``: ``class 0`` and so on.
    """

    model: nn.Module
    layer: TargetLayer
    preprocessing: Preprocessing
    device: torch.device
    classes: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """What is kept of an image that somebody gave.

    Attributes:
        name: of the file.
        image: uint8 (H, W, 3), of its own size or reduced.
        size: its own, (H, W).
        tensor: (C, h, w), the model's input, on the CPU.
        notes: sentences on the image itself.
    """

    name: str
    image: Pixels
    size: tuple[int, int]
    tensor: Tensor
    notes: list[str]


def read_picture(served: Served, content: bytes, name: str) -> Picture:
    """A picture from a file's content; nothing is written to disk.

    Raises:
        DiffsalError: see :func:`diffsal.data.images.read_image`.
    """
    pixels, notes = image_of_bytes(content, name)
    size = (pixels.shape[0], pixels.shape[1])
    return Picture(name, reduced(pixels), size, served.preprocessing(pixels), notes)


def maps_of(
    served: Served,
    tensors: Sequence[Tensor],
    true: Choice = None,
    false: Choice = None,
    model: nn.Module | None = None,
    layer: TargetLayer | None = None,
) -> SalienceMaps:
    """Maps of some inputs, on the CPU.

    Args:
        served: whose model, layer and device are taken where none are named.
        tensors: (C, H, W) each.
        true: see :func:`diffsal.maps.contrast.contrast`.
        false: see there.
        model: another one, as a shifted copy.
        layer: of that model.

    Raises:
        DiffsalError: the model does not run on such inputs, cannot be contrasted so, or gives what
            is not finite.
    """
    size = (tensors[0].shape[1], tensors[0].shape[2])
    inputs = on_device(served, tensors)
    with running(served.device, size, len(tensors)):
        maps = explain(
            model or served.model, inputs, true, false, target_layers=layer or served.layer
        ).to("cpu")
    if not all(bool(one.isfinite().all()) for one in (maps.logits, maps.true, maps.false)):
        raise DiffsalError(NOT_FINITE)
    return maps


def on_device(served: Served, tensors: Sequence[Tensor]) -> Tensor:
    """(B, C, H, W): inputs where the model is, and of its dtype."""
    return torch.stack(list(tensors)).to(served.device, next(served.model.parameters()).dtype)


def drafted(served: Served, picture: Picture, maps: SalienceMaps) -> Draft:
    """What `diffsal explain` tells of one image."""
    names = class_names(served.classes, class_count(maps.logits))
    return draft(
        Path(picture.name),
        "",
        picture.image,
        picture.size,
        maps,
        names,
        served.preprocessing,
        picture.notes,
    )


def explained(
    served: Served, picture: Picture, true: Choice = None, false: Choice = None
) -> dict[str, Any]:
    """Everything that the page shows of one image, as plain JSON types.

    Returns:
        The image's record as ``docs/files.md`` documents it, and ``classes``; ``cells``, each map
        (h, w) in logits per cell; ``region_of`` (h, w), which of the regions a cell is of, from 1
        on, or 0; ``seen``, see :func:`diffsal.serving.pictures.seen_box`; ``layers``, see
        :func:`diffsal.serving.pictures.layers_over`.

    Raises:
        DiffsalError: see :func:`maps_of`.
    """
    maps = maps_of(served, [picture.tensor], true, false)
    made = drafted(served, picture, maps)
    return made.record | {
        "classes": class_names(served.classes, class_count(maps.logits)),
        "one_output": maps.logits.shape[1] == 1,
        "cells": {name: made.arrays[name].tolist() for name in ("true", "false", "difference")},
        "region_of": region_of_cells(maps.difference[0], len(made.record["regions"])),
        "seen": seen_box(served.preprocessing, picture.size),
        "layers": layers_over(made.explanation),
    }


def region_of_cells(difference: Tensor, count: int) -> list[list[int]]:
    """The number of each cell's region, from 1 on, the weightiest first; 0 outside the first ones.

    Args:
        difference: (h, w) logits.
        count: how many regions are told of.

    Example:
        >>> region_of_cells(torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.0, -2.0]]), 2)
        [[1, 1, 0], [0, 0, 2]]
    """
    numbers = torch.zeros(difference.shape, dtype=torch.int64)
    for number, region in enumerate(find_regions(difference)[:count], start=1):
        numbers[torch.from_numpy(region.cells)] = number
    cells: list[list[int]] = numbers.tolist()
    return cells
