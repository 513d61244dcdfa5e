"""Pixels as a figure of matplotlib's, which only who looks at one from Python has to import."""

import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_DPI = 100


def as_figure(pixels: NDArray[np.uint8]) -> Figure:
    """A matplotlib figure of pixels (H, W, 3), one for one; pyplot knows nothing of it.

    Example:
        >>> as_figure(np.zeros((50, 80, 3), np.uint8)).get_size_inches().tolist()
        [0.8, 0.5]
    """
    figure = ShownFigure((pixels.shape[1] / _DPI, pixels.shape[0] / _DPI), dpi=_DPI)
    figure.figimage(pixels)
    return figure


class ShownFigure(Figure):
    """A figure that notebooks show though pyplot, whose task that is, knows nothing of it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
