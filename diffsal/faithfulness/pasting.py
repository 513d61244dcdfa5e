"""Paste regions of images into others: which, where, and the pixels.

What a model makes of it is in :mod:`diffsal.faithfulness.composites`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffsal.errors import DiffsalError
from diffsal.faithfulness.perturbation import cells_of_pixels, descending
from diffsal.faithfulness.statistics import Maps, one_map_each

Regions: TypeAlias = Literal["rectangles", "halves", "cells", "marked"]
"""What is pasted.

``rectangles``: one of 20 to 80 % of the cells. ``halves``: the left, right, upper or lower one.
``cells``: 20 to 80 % of them, anywhere. ``marked``: the 10 to 50 % that, by the receiver's map,
speak most for the receiver's own class: does moving what is marked move the decision as it says?
"""

Donors: TypeAlias = Literal["other", "same"]
"""Whether a donor is of the other class, or another image of the same."""

Seams: TypeAlias = Literal["sharp", "feathered"]
"""How a region ends: at a pixel, or in a linear ramp half a cell wide; R stays the same cells."""

_Plan = TypeVar("_Plan", bound="Plan")


@dataclass(frozen=True)
class Plan:
    """Which region of which image is pasted into which; on the CPU.

    Attributes:
        receiver: (N,) int64, indices of images.
        donor: (N,) int64, never the receiver.
        region: (N, h, w) bool, the cells that are the donor's: some, never all.
        seams: see :data:`Seams`.

    Example:
        >>> region = torch.tensor([[[True, False]]])
        >>> plan = Plan(torch.tensor([0]), torch.tensor([1]), region, "sharp")
        >>> len(plan), len(plan[plan.receiver == 1])
        (1, 0)
    """

    receiver: Tensor
    donor: Tensor
    region: Tensor
    seams: Seams

    @property
    def share(self) -> Tensor:
        """(N,) float64 in (0, 1): ``|R|``, the share of the cells that is the donor's."""
        return self.region.double().mean((1, 2))

    def __len__(self) -> int:
        """N, the number of composites."""
        return len(self.receiver)

    def __getitem__(self: _Plan, rows: Tensor | slice) -> _Plan:
        """Some of the composites, by a mask, indices or a slice."""
        chosen: dict[str, Any] = {
            field.name: value[rows]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **chosen)


def plan_composites(
    maps: Maps,
    labels: Tensor | Sequence[int],
    *,
    regions: Regions = "rectangles",
    donors: Donors = "other",
    seams: Seams = "sharp",
    per_image: int = 5,
    seed: int = 0,
) -> Plan:
    """Choose donors and regions at random; the same on every device.

    Args:
        maps: (B, h, w), what speaks for class 1 against class 0; of ``marked`` regions, the
            values count, of all others only the grid.
        labels: (B,) 1 or 0: whether an image is of the class whose score counts up in the margin.
        per_image: how many composites each image receives. Donors are drawn with replacement.
        seed: of donors first, then regions, so that all kinds of regions have the same donors.

    Returns:
        B·per_image composites, image by image.

    Raises:
        DiffsalError: maps that are not one for each label, a map of one cell, labels other than 0
            and 1, fewer than two images of a class, ``per_image`` below 1, an unknown kind.

    Example:
        >>> plan = plan_composites(torch.rand(4, 2, 3), [0, 0, 1, 1], per_image=2)
        >>> plan.receiver, plan.region.shape
        (tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.Size([8, 2, 3]))
    """
    for value, kind in ((regions, Regions), (donors, Donors), (seams, Seams)):
        if value not in get_args(kind):
            raise DiffsalError(f"{value!r} is unknown: pass one of {', '.join(get_args(kind))}")
    if per_image < 1:
        raise DiffsalError(f"per_image is {per_image}: every image receives at least one region")
    signs = signs_of_classes(labels)
    for label in (0, 1):
        if (found := int((signs == 2 * label - 1).sum())) < 2:
            raise DiffsalError(
                f"composites need two images of each class, and of class {label} there are {found}"
            )
    maps = one_map_each(torch.as_tensor(maps).detach().cpu().double(), signs)
    grid = (maps.shape[1], maps.shape[2])
    if grid[0] * grid[1] < 2:
        raise DiffsalError(
            "maps of a single cell have no region to paste: take them at a layer with a finer grid"
        )
    generator = Generator().manual_seed(seed)
    receiver = torch.arange(len(signs)).repeat_interleave(per_image)
    donor = _draw_donors(signs, receiver, donors, generator)
    own = (signs[:, None, None] * maps)[receiver]
    return Plan(receiver, donor, draw_regions(regions, own, generator), seams)


def draw_regions(regions: Regions, own: Tensor, generator: Generator) -> Tensor:
    """(N, h, w) bool: a region of a kind for each of N receivers.

    Args:
        regions: see :data:`Regions`.
        own: (N, h, w), what speaks for each receiver's own class; of all kinds but ``marked`` only
            the grid counts, which has two cells or more.
        generator: of the CPU.

    Example:
        >>> own = torch.tensor([[[0.0, 3.0, 1.0]]])
        >>> draw_regions("marked", own, Generator())  # at most half the cells
        tensor([[[False,  True, False]]])
    """
    count, *grid = own.shape
    if regions == "marked":
        return _highest(own.flatten(1), 10, 50, generator).view(own.shape)
    if regions == "cells":
        keys = torch.rand(count, grid[0] * grid[1], generator=generator)
        return _highest(keys, 20, 80, generator).view(own.shape)
    draw = draw_rectangles if regions == "rectangles" else _draw_halves
    return draw(count, (grid[0], grid[1]), generator)


def signs_of_classes(labels: Tensor | Sequence[int]) -> Tensor:
    """(B,) int64 on the CPU: 1 for images of class 1, -1 for those of class 0.

    Raises:
        DiffsalError: labels that are not all 0 or 1.

    Example:
        >>> signs_of_classes([0, 1])
        tensor([-1,  1])
    """
    labels = torch.as_tensor(labels).cpu()
    if labels.ndim != 1 or not ((labels == 0) | (labels == 1)).all():
        raise DiffsalError(
            "labels are 1 for images of the class that the maps speak for, 0 for the other class: "
            "pass one for each image, and images of these two classes alone"
        )
    return 2 * labels.long() - 1


def pasted(inputs: Tensor, plan: Plan) -> Tensor:
    """The composites' pixels, (N, C, H, W); take a few of a plan at a time.

    Args:
        inputs: (B, C, H, W), the images that the plan was made for.

    Raises:
        DiffsalError: inputs that are no images, or coarser than the plan's grid.

    Example:
        >>> region = torch.tensor([[[True, False]]])
        >>> plan = Plan(torch.tensor([0]), torch.tensor([1]), region, "sharp")
        >>> pasted(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]], [[[5.0, 6.0, 7.0, 8.0]]]]), plan)
        tensor([[[[5., 6., 3., 4.]]]])
    """
    grid = plan.region.shape[1:]
    mask = plan.region.flatten(1)[:, cells_of_pixels(inputs, grid)][:, None].to(inputs.device)
    before, after = (inputs[images.to(inputs.device)] for images in (plan.receiver, plan.donor))
    if plan.seams == "sharp":
        return torch.where(mask, after, before)
    reach = [pixels // (4 * cells) for pixels, cells in zip(mask.shape[2:], grid, strict=True)]
    padded = F.pad(mask.to(inputs.dtype), (reach[1],) * 2 + (reach[0],) * 2, mode="replicate")
    weight = F.avg_pool2d(padded, [2 * one + 1 for one in reach], stride=1)
    return torch.lerp(before, after, weight.expand_as(before))


def draw_rectangles(count: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """(N, h, w) bool: N rectangles of 20 to 80 % of a grid's cells.

    All such sizes are equally likely, and all places of a size.

    Args:
        count: N.
        grid: (h, w), two cells or more.
        generator: of the CPU.

    Example:
        >>> draw_rectangles(1, (1, 2), Generator().manual_seed(0)).sum()  # one of the two
        tensor(1)
    """
    cells = grid[0] * grid[1]
    sizes = torch.cartesian_prod(*(torch.arange(1, length + 1) for length in grid))
    share = sizes.prod(1) * 100
    sizes = sizes[(share >= 20 * cells) & (share <= 80 * cells)]
    size = sizes[_draw(torch.full((count,), len(sizes)), generator)]
    first = _draw(torch.tensor(grid) + 1 - size, generator)
    last = first + size
    rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    top, left, bottom, right = torch.cat([first, last], 1)[:, :, None, None].unbind(1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def _draw(below: Tensor, generator: Generator) -> Tensor:
    """Integers of the shape of ``below``, each from 0 to one less than it says."""
    return (torch.rand(below.shape, generator=generator, dtype=torch.float64) * below).long()


def _draw_donors(signs: Tensor, receiver: Tensor, donors: Donors, generator: Generator) -> Tensor:
    donor, is_same = torch.empty_like(receiver), donors == "same"
    chance = torch.rand(len(receiver), generator=generator, dtype=torch.float64)
    for sign in (-1, 1):
        rows = signs[receiver] == sign
        pool = (signs == (sign if is_same else -sign)).nonzero()[:, 0]
        place = (chance[rows] * (len(pool) - is_same)).long()
        if is_same:
            place += place >= torch.searchsorted(pool, receiver[rows])  # over the receiver itself
        donor[rows] = pool[place]
    return donor


def _highest(values: Tensor, least: int, most: int, generator: Generator) -> Tensor:
    """(N, n) bool: of (N, n) values, the highest, ``least`` to ``most`` per cent of them."""
    cells = values.shape[1]
    fewest = -(-cells * least // 100)
    counts = torch.full((len(values), 1), cells * most // 100 - fewest + 1)
    return descending(values) < fewest + _draw(counts, generator)


def _draw_halves(count: int, grid: tuple[int, int], generator: Generator) -> Tensor:
    """(N, h, w) bool; of an odd length, the lower or right half is the larger one."""
    upper = (torch.arange(grid[0]) < grid[0] // 2)[:, None].expand(grid)
    left = (torch.arange(grid[1]) < grid[1] // 2).expand(grid)
    sides = [side for half in (upper, left) if half.any() for side in (half, ~half)]
    return torch.stack(sides)[_draw(torch.full((count,), len(sides)), generator)]
