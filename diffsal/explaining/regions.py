"""Where the evidence is gathered: connected regions of a difference map, in logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.overlays import Pixels

SHARE = 0.5
"""Of the largest evidence: what reaches it belongs to a region."""


@dataclass(frozen=True, eq=False)
class Region:
    """Connected cells, corners included, of evidence of one sign.

    Attributes:
        cells: bool (h, w), of the map's grid.
        logits: the sum of its cells, positive for the class, negative against it.
        of: the sum of all cells of that sign, in logits.
    """

    cells: NDArray[np.bool_]
    logits: float
    of: float

    @property
    def count(self) -> int:
        """How many cells."""
        return int(self.cells.sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height, in cells."""
        left, top, width, height = cv2.boundingRect(self.cells.astype(np.uint8))
        return left, top, width, height


def find_regions(difference: Tensor, share: float = SHARE) -> list[Region]:
    """Regions of a difference map whose cells reach a share of its largest evidence.

    Cells are taken as they are, without interpolation, so that what regions hold adds up.

    Args:
        difference: (h, w), in logits per cell.
        share: of the largest absolute value, in (0, 1].

    Returns:
        The weightiest first; none of a map that is constant or not finite.

    Example:
        >>> found = find_regions(torch.tensor([[3.0, 2.0, 0.0], [0.0, 0.0, -2.0]]))
        >>> [(region.logits, region.of, region.box) for region in found]
        [(5.0, 5.0, (0, 0, 2, 1)), (-2.0, -2.0, (2, 1, 1, 1))]
    """
    values = difference.detach().double().cpu().numpy()
    if not np.isfinite(values).all() or values.min() == values.max():
        return []
    least = share * np.abs(values).max()
    found = []
    for side in (values, -values):
        count, labels = cv2.connectedComponents((side >= least).astype(np.uint8), connectivity=8)
        whole = values[side > 0].sum()
        for number in range(1, count):
            cells = labels == number
            found.append(Region(cells, float(values[cells].sum()), float(whole)))
    return sorted(found, key=lambda region: -abs(region.logits))


def on_image(
    region: Region, preprocessing: Preprocessing, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """The pixels (H, W) of an image of this size that lie in a region's cells.

    Example:
        >>> region = find_regions(torch.eye(2)[:1])[0]
        >>> on_image(region, Preprocessing(size=(8, 8)), (1, 4)).tolist()
        [[True, True, False, False]]
    """
    placed = preprocessing.place(torch.from_numpy(region.cells).float(), size, as_cells=True)
    inside: NDArray[np.bool_] = placed.numpy() > 0.5  # what was cut off is NaN, and in none
    return inside


def outlined(image: Pixels, regions: Sequence[NDArray[np.bool_]]) -> Pixels:
    """An image (H, W, 3) with numbered outlines, light within dark, legible on any ground.

    Args:
        image: is left as it is.
        regions: (h, w) each, of any size of the image's shape.

    Example:
        >>> inside = np.zeros((4, 4), bool)
        >>> inside[1:3, 1:3] = True
        >>> drawn = outlined(np.full((40, 40, 3), 128, np.uint8), [inside])
        >>> sorted(set(drawn.flatten().tolist()) & {0, 128, 255})
        [0, 128, 255]
    """
    drawn: Pixels = np.ascontiguousarray(image).copy()
    height, width = drawn.shape[:2]
    for number, inside in enumerate(regions, start=1):
        mask = cv2.resize(inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        lines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        if not lines:
            continue
        top = int(mask.any(1).argmax())
        left = int(mask[top].argmax())
        for colour, thick in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.drawContours(drawn, lines, -1, colour, thick)
            cv2.putText(
                drawn,
                str(number),
                (min(left + 4, max(0, width - 12)), min(top + 16, height - 3)),
                cv2.FONT_HERSHEY_SIMPLEX,
                0.45,
                colour,
                thick,
                cv2.LINE_AA,
            )
    return drawn
