"""How a layer's output lies over the image: channels first, channels last, or tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from diffsal.errors import DiffsalError

Reshape: TypeAlias = Callable[[Tensor], Tensor]
Grid: TypeAlias = tuple[int, ...]

_USUAL_PREFIXES = 0, 1, 2  # tokens that are no patches: none, class, class and distillation
_MOST_PREFIX_TOKENS = 32  # registers too, where a feature map tells how many patches there are


@dataclass(frozen=True)
class Layout:
    """Brings an output to (B, C, h, w), or (B, C, d, h, w) for volumes; called like a function.

    Attributes:
        kind: ``channels-first`` (B, C, h, w), ``channels-last`` (B, h, w, C), or ``tokens``
            (B, N, C), of which the first ``prefix`` are no patches and the rest run row by row.
        grid: cells along each axis, as seen when the layout was found.
        prefix: class, distillation and register tokens before the patches.

    Example:
        >>> import torch
        >>> Layout("channels-last", (2, 3))(torch.zeros(1, 2, 3, 8)).shape
        torch.Size([1, 8, 2, 3])
        >>> Layout("tokens", (2, 3), prefix=1)(torch.zeros(1, 7, 8)).shape
        torch.Size([1, 8, 2, 3])
    """

    kind: Literal["channels-first", "channels-last", "tokens"]
    grid: Grid
    prefix: int = 0

    def __call__(self, output: Tensor) -> Tensor:
        if self.kind == "channels-first":
            return output
        if self.kind == "channels-last":
            return output.movedim(-1, 1)
        patches = output[:, self.prefix :]
        if output.ndim != 3 or patches.shape[1] != math.prod(self.grid):
            raise DiffsalError(
                f"an output of shape {tuple(output.shape)} is not {self.prefix} tokens and then "
                f"{' × '.join(map(str, self.grid))} patches: pass a reshape_transform that brings "
                "it to (batch, channels, height, width)"
            )
        return patches.reshape(len(patches), *self.grid, patches.shape[2]).movedim(-1, 1)

    def over(self, image: Sequence[int], tokens: int) -> "Layout":
        """The same for an image of another size (pixels), whose output has ``tokens`` tokens.

        Raises:
            DiffsalError: no grid of the image's proportions has as many cells.
        """
        if self.kind != "tokens":
            return self
        grids = [
            grid for grid in _grids(tokens - self.prefix, image) if len(grid) == len(self.grid)
        ]
        if not grids:
            raise DiffsalError(
                f"{tokens - self.prefix} patch tokens do not fill a grid of the proportions of an "
                f"image of {' × '.join(map(str, image))} pixels: pass a reshape_transform"
            )
        same = [grid for grid in grids if grid == self.grid]
        return Layout("tokens", (same or grids)[0], self.prefix)

    def __str__(self) -> str:
        return f"tokens:{self.prefix}" if self.kind == "tokens" else self.kind


def layout_from_word(word: str) -> Layout | None:
    """What a user says of a layer's output: ``none``, ``channels-last`` or ``tokens:PREFIX``.

    Raises:
        DiffsalError: another word.

    Example:
        >>> str(layout_from_word("tokens:1")), layout_from_word("none")
        ('tokens:1', None)
    """
    kind, _, prefix = word.partition(":")
    if kind == "tokens" and (prefix or "0").isdecimal():
        return Layout("tokens", (0, 0), int(prefix or 0))  # the image tells the grid
    if word == "channels-last":
        return Layout("channels-last", (0, 0))
    if word == "none":
        return None
    raise DiffsalError(f"the reshape {word!r} is unknown: tokens:PREFIX, channels-last or none")


def possible_layouts(
    shape: Sequence[int],
    image: Sequence[int],
    grids: Sequence[Grid],
    prefixes: Sequence[int] = (),
) -> list[Layout]:
    """Every way in which an output may lie over an image, likelier ones first.

    Args:
        shape: of the output, batch included.
        image: height and width in pixels, or depth, height and width.
        grids: of the feature maps that ran before, latest first; tokens are patches of one.
        prefixes: of the tokens that ran before, latest first; they seldom change.

    Example:
        >>> str(possible_layouts((1, 197, 64), (224, 224), [(14, 14)])[0])
        'tokens:1'
        >>> possible_layouts((1, 6, 6, 288), (192, 192), [])[0].kind
        'channels-last'
        >>> possible_layouts((1, 512, 1, 1), (224, 224), [])
        []
    """
    shape = tuple(shape)
    if math.prod(shape[2:]) == 1:
        return []
    if len(shape) == len(image) + 2:
        first = Layout("channels-first", shape[2:])
        last = Layout("channels-last", shape[1:-1])
        over = [layout for layout in (first, last) if _is_over(layout.grid, image)]
        fitting = [layout for layout in over if fits(layout.grid, image)]
        exact = [layout for layout in fitting if _stretch(layout.grid, image) < 1e-6]
        return exact or fitting or [layout for layout in over if layout is first]
    if len(shape) == 3:
        return list(dict.fromkeys(_token_layouts(shape[1], image, grids, prefixes)))
    return []


def fits(grid: Grid, image: Sequence[int]) -> bool:
    """Whether height and width of a grid stand to those of the image in one proportion.

    A cell more or less is due to padding. Depth may be strided otherwise.

    Example:
        >>> fits((7, 7), (224, 224)), fits((6, 288), (192, 192)), fits((9, 16), (144, 256))
        (True, False, True)
    """
    (height, width), (rows, columns) = image[-2:], grid[-2:]
    stride = math.sqrt((height / rows) * (width / columns))
    return all(
        abs(cells - pixels / stride) <= 0.5 + 0.04 * cells
        for cells, pixels in ((rows, height), (columns, width))
    )


def looks_channels_last(shape: Sequence[int], image: Sequence[int] | None) -> bool:
    """Whether an output that is taken as it is can only be (B, h, w, C).

    Example:
        >>> looks_channels_last((1, 7, 7, 96), (224, 224)), looks_channels_last((1, 96, 7, 7), None)
        (True, False)
    """
    if image is None or len(shape) != len(image) + 2:
        return False
    _, *grid, channels = shape
    is_grid = min(grid) > 1 and channels > max(grid) and fits(tuple(grid), image)
    return is_grid and not fits(tuple(shape[2:]), image)


def _stretch(grid: Grid, image: Sequence[int]) -> float:
    """How far the proportions of height and width are from the image's; 0: the same."""
    return abs(math.log((grid[-2] * image[-1]) / (grid[-1] * image[-2])))


def _is_over(grid: Grid, image: Sequence[int]) -> bool:
    """More than one cell, and not more cells than pixels."""
    within = all(cells <= pixels for cells, pixels in zip(grid, image, strict=True))
    return within and math.prod(grid[-2:]) > 1


def _token_layouts(
    count: int, image: Sequence[int], grids: Sequence[Grid], prefixes: Sequence[int]
) -> Iterator[Layout]:
    for grid in grids:
        prefix = count - math.prod(grid)
        if 0 <= prefix <= _MOST_PREFIX_TOKENS and math.prod(grid) > 1:
            yield Layout("tokens", grid, prefix)
    for prefix in dict.fromkeys((*prefixes, *_USUAL_PREFIXES)):
        for grid in _grids(count - prefix, image):
            yield Layout("tokens", grid, prefix)


def _grids(cells: int, image: Sequence[int]) -> Iterator[Grid]:
    """Grids of as many cells in the proportions of the image, likelier ones first."""
    found: list[tuple[float, Grid]] = []
    for depth in range(1, (image[0] if len(image) == 3 else 1) + 1):
        if cells < 4 or cells % depth:
            continue
        area = cells // depth
        for rows in range(1, min(area, image[-2]) + 1):
            if area % rows == 0 and area // rows <= image[-1]:
                grid = (depth, rows, area // rows)[-len(image) :]
                if fits(grid, image):
                    found.append((_stretch(grid, image), grid))
    return (grid for _, grid in sorted(found))
