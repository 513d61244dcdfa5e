"""Pixels as a figure of matplotlib's, which only who looks at one from Python has to import."""

import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

DPI = 100


def as_figure(pixels: NDArray[np.uint8]) -> Figure:
    """A matplotlib figure of pixels (H, W, 3), one for one.

    Example:
        >>> as_figure(np.zeros((50, 80, 3), np.uint8)).get_size_inches().tolist()
        [0.8, 0.5]
    """
    figure = empty_figure(pixels.shape[1] / DPI, pixels.shape[0] / DPI)
    figure.figimage(pixels)
    return figure


def empty_figure(width: float, height: float) -> Figure:
    """A figure, so many inches wide and high, that notebooks show though pyplot, whose task that
    is, knows nothing of it.

    Example:
        >>> empty_figure(2, 1)._repr_png_()[1:4]
        b'PNG'
    """
    return _Shown((width, height), dpi=DPI)


class _Shown(Figure):
    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
