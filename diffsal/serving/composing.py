"""Cells of one image pasted onto another: what the map foretells of it, and what the model says."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsal.data.sources import as_shown
from diffsal.errors import DiffsalError
from diffsal.explaining.records import class_names
from diffsal.faithfulness.composites import Composites, compare, composite_margins
from diffsal.faithfulness.pasting import Plan, pasted
from diffsal.maps.contrast import NO_CLASS, Choice, class_count
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.serving.explained import Picture, Served, maps_of, on_device
from diffsal.serving.pictures import SMALL, as_uri, for_screen
from diffsal.system.devices import running


class Rectangle(NamedTuple):
    """Cells of a map: rows from ``top`` up to, without, ``bottom``, columns alike."""

    top: int
    left: int
    bottom: int
    right: int


def region_of(rectangle: Rectangle, grid: tuple[int, int]) -> Tensor:
    """(h, w) bool: the cells of a rectangle.

    Raises:
        DiffsalError: no cells, all of them, or cells that are not on the grid.

    Example:
        >>> region_of(Rectangle(0, 1, 1, 3), (2, 3)).int()
        tensor([[0, 1, 1],
                [0, 0, 0]], dtype=torch.int32)
    """
    top, left, bottom, right = rectangle
    height, width = grid
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise DiffsalError(
            f"the rectangle does not lie on the map's {height} × {width} cells: choose another"
        )
    region = torch.zeros(grid, dtype=torch.bool)
    region[top:bottom, left:right] = True
    if region.all():
        raise DiffsalError("the rectangle is the whole image: leave out some cells")
    return region


def compose(
    served: Served, maps: SalienceMaps, tensors: tuple[Tensor, Tensor], rectangle: Rectangle
) -> tuple[Composites, Tensor]:
    """Paste a rectangle of the second input onto the first.

    Args:
        served: the model.
        maps: of both inputs, in this order and of the same two classes, on the CPU.
        tensors: (C, H, W) each.
        rectangle: of cells, at the same place in both.

    Returns:
        The one composite with its margins in logits, and its pixels (C, H, W) on the CPU.

    Raises:
        DiffsalError: classes that are not the same two, or no classes; see :func:`region_of`.
    """
    true, false = (set(one.tolist()) for one in (maps.true_class, maps.false_class))
    if len(true) > 1 or len(false) > 1 or NO_CLASS in true | false:
        raise DiffsalError(
            "a composite needs the same two classes in both images: name one to hold against"
        )
    grid = (maps.difference.shape[1], maps.difference.shape[2])
    plan = Plan(
        torch.tensor([0]), torch.tensor([1]), region_of(rectangle, grid)[None], seams="sharp"
    )
    inputs = on_device(served, tensors)
    with running(served.device, inputs.shape[2:], 1):
        actual = composite_margins(served.model, inputs, plan, true.pop(), false.pop())
    found = compare(plan, maps.difference, maps.margin, actual)
    return found, pasted(inputs, plan)[0].cpu()


def composed(
    served: Served,
    receiver: Picture,
    donor: Picture,
    rectangle: Rectangle,
    true: Choice = None,
    false: Choice = None,
) -> dict[str, Any]:
    """What the page shows of a composite, as plain JSON types.

    Args:
        served: the model.
        receiver: what is pasted onto; it settles the two classes where they are not named.
        donor: what is pasted.
        rectangle: of cells.
        true: see :func:`diffsal.maps.contrast.contrast`.
        false: see there.

    Returns:
        ``picture`` of the composite; margins in logits: ``receiver`` and ``donor`` as they are,
        ``predicted`` by the maps, ``uniform`` by the share of the area alone, ``actual``;
        ``share`` of the cells, ``true_name``, ``false_name``.

    Raises:
        DiffsalError: see :func:`compose`.
    """
    own = maps_of(served, [receiver.tensor], true, false)
    classes = int(own.true_class), int(own.false_class)
    if NO_CLASS in classes:
        raise DiffsalError(
            "a composite needs the same two classes in both images: name one to hold against"
        )
    tensors = (receiver.tensor, donor.tensor)
    maps = maps_of(served, tensors, *classes)
    found, pixels = compose(served, maps, tensors, rectangle)
    names = class_names(served.classes, class_count(maps.logits))
    return {
        "picture": as_uri(for_screen(as_shown(pixels, served.preprocessing), SMALL)),
        "receiver": float(maps.margin[0]),
        "donor": float(maps.margin[1]),
        "predicted": float(found.predicted),
        "uniform": float(found.uniform),
        "actual": float(found.actual),
        "share": float(found.share),
        "true_name": names[classes[0]],
        "false_name": names[classes[1]],
    }
