"""What a fooled map is to show, and how far it got."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsal.data.images import read_map
from diffsal.errors import DiffsalError
from diffsal.faithfulness.localisation import edge_frame
from diffsal.maps.salience_maps import normalize

Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def target_map(
    target: str | Path | Tensor, size: tuple[int, int], width: int | None = None
) -> Tensor:
    """What a fooled map is to show, on the grid of the model's maps.

    Args:
        target: ``"edges"``, a frame along the edges (the paper's); ``"corner"``, the top left one,
            a third of each side; ``"middle"``, a block as large in the centre, to the cell; the
            path of an image, bright where the map is to be high; or a map (H, W). Zero padding
            makes the edges easy to show: what it cannot help with is the middle.
        size: (h, w), cells.
        width: of the frame, in cells; ``None``: a seventh of the shorter side, as in Heo et al.,
            but at least one.

    Returns:
        (h, w) float32 in [0, 1]; an image or a map is averaged over each cell, and normalised.

    Raises:
        DiffsalError: an image that cannot be read or is constant on the grid; a width without a
            frame, or one that does not fit.

    Example:
        >>> target_map("edges", (4, 4)).int()
        tensor([[1, 1, 1, 1],
                [1, 0, 0, 1],
                [1, 0, 0, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    if isinstance(target, str) and target == "edges":
        return edge_frame(size, max(1, min(size) // 7) if width is None else width)
    if width is not None:
        raise DiffsalError(f"the target {target} has no width: leave it out, or choose edges")
    if isinstance(target, str) and target == "corner":
        pixels = torch.zeros(size)
        pixels[: -(-size[0] // 3), : -(-size[1] // 3)] = 1
    elif isinstance(target, str) and target == "middle":
        pixels = torch.zeros(size)
        # Equal margins above and below, so that the block's centre is the map's.
        top, left = (min((cells + 1) // 3, (cells - 1) // 2) for cells in size)
        pixels[top : size[0] - top, left : size[1] - left] = 1
    else:
        if not isinstance(target, Tensor):
            target = torch.from_numpy(read_map(Path(target)))
        pixels = F.adaptive_avg_pool2d(target[None].float(), size)[0]
    pixels = normalize(pixels[None])[0]
    if not pixels.any():
        raise DiffsalError(
            f"the target is constant on a map of {size[0]} × {size[1]} cells: choose an image "
            "whose parts differ"
        )
    return pixels


def target_distance(maps: Tensor, target: Tensor) -> Tensor:
    """(B,): mean squared distance of each normalised map (B, h, w) to a target (h, w) in [0, 1].

    Example:
        >>> target_distance(torch.tensor([[[0.0, 5.0]]]), torch.tensor([[1.0, 0.0]]))
        tensor([1.])
    """
    return (normalize(maps) - target).square().flatten(1).mean(1)


def top_cells(maps: Tensor, reference: Tensor) -> Tensor:
    """(B,): the normalised maps' mean over the cells where a reference was highest.

    These are a tenth of the cells, at least one (Heo et al.: the top l // 10 of l).

    Args:
        maps: (B, h, w), of any unit.
        reference: as many, usually the honest model's.

    Example:
        >>> maps = torch.tensor([[[0.0, 1.0, 4.0]]])
        >>> top_cells(maps, reference=maps), top_cells(-maps, reference=maps)
        (tensor([1.]), tensor([0.]))
    """
    cells = reference.flatten(1)
    highest = cells.topk(max(1, cells.shape[1] // 10)).indices
    return normalize(maps).flatten(1).gather(1, highest).mean(1)


def centroid_shift(maps: Tensor, reference: Tensor) -> Tensor:
    """(B,): how far the normalised maps' centroids lie from a reference's (Heo et al.).

    The distances along both axes are added, in shares of the sides. A constant map has its
    centroid in the centre. Arguments as for :func:`top_cells`.

    Example:
        >>> centroid_shift(torch.tensor([[[9.0, 0.0]]]), torch.tensor([[[0.0, 9.0]]]))
        tensor([0.5000])
    """
    return (_centroid(maps) - _centroid(reference)).abs().sum(1)


def _centroid(maps: Tensor) -> Tensor:
    """(B, 2), from 0 to 1 along each axis."""
    mass = normalize(maps)
    mass = mass + (mass.flatten(1).amax(1) == 0)[:, None, None]
    centres = [(torch.arange(cells).to(mass) + 0.5) / cells for cells in mass.shape[1:]]
    # No matrix products, which autocast would take in half precision.
    moments = torch.stack(
        [(mass.sum(2) * centres[0]).sum(1), (mass.sum(1) * centres[1]).sum(1)], dim=1
    )
    return moments / mass.sum((1, 2))[:, None]
