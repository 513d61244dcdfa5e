"""Rows of pictures with words, as a matplotlib figure."""

from collections.abc import Sequence
from typing import TypeAlias

from matplotlib.figure import Figure

from diffsal.explaining.matplotlib_figures import empty_figure
from diffsal.explaining.overlays import Pixels
from diffsal.explaining.typography import drawable

PictureRow: TypeAlias = tuple[str, list[tuple[str, Pixels]]]
"""A title, and pictures (H, W, 3) with a caption each."""

_SIDE = 2.6  # inches of a picture, its caption included
_MOST = 34  # characters of a caption's line


def sheet(rows: Sequence[PictureRow]) -> Figure:
    """A figure that pyplot knows nothing of; rows may be of different lengths.

    Args:
        rows: at least one.

    Example:
        >>> import numpy as np
        >>> black = np.zeros((4, 6, 3), np.uint8)
        >>> figure = sheet([("two", [("a", black), ("b", black)]), ("one", [("c", black)])])
        >>> [[axes.get_title() for axes in part.axes] for part in figure.subfigs]
        [['a', 'b'], ['c']]
    """
    columns = max(len(pictures) for _, pictures in rows)
    figure = empty_figure(_SIDE * max(columns, 3), (_SIDE + 0.5) * len(rows))
    figure.set_layout_engine("constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (title, pictures) in zip(parts, rows, strict=True):
        part.suptitle(drawable(title), fontsize=10, parse_math=False)
        for place, (caption, pixels) in enumerate(pictures, 1):
            axes = part.add_subplot(1, columns, place)
            axes.imshow(pixels)
            axes.set_title(_lines(drawable(caption)), fontsize=7, parse_math=False)
            axes.axis("off")
    return figure


def _lines(text: str) -> str:
    return "\n".join(text[start : start + _MOST] for start in range(0, len(text), _MOST))
