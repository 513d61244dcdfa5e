"""Maps as colours over an image."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import Colormap, ListedColormap
from numpy.typing import NDArray
from PIL import Image

from diffsal.errors import DiffsalError
from diffsal.system.files import replacing

Pixels = NDArray[np.uint8]
Map = NDArray[np.float32]

# Red high, blue low; the yellow between tells the own scale from the signed one. Both are safe for
# the colour-blind. The signed one stops short of its ends, which turn black over dark images.
_OWN = matplotlib.colormaps["RdYlBu_r"]
SIGNED = ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 255)))
_PNG = (  # one filter, and runs alone: a tenth larger than with all that there is, at half the time
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),  # first, as it sets the strategy, too
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
)
_BAND = 1 << 20  # pixels that are coloured at a time
_ENOUGH = 1_600  # twice the width of the widest panel, and more
_DARKEST = 0.65  # what black in the image leaves of a colour's brightness
PALE = 0.85  # the same, where colours are to be read off the bar


@dataclass(frozen=True)
class Layer:
    """A map and the scale that it is drawn on.

    Attributes:
        values: (h, w), raw; NaN where nothing is drawn.
        low: the value that has the scale's first colour.
        high: the value that has its last.
        colormap: the colours between.
        darkest: what black in the image leaves of a colour's brightness.

    Example:
        >>> evidence = Layer(np.float32([[-2, 2]]), -2, 2, SIGNED)
        >>> white = np.full((1, 2, 3), 255, np.uint8)
        >>> [(int(red), int(blue)) for red, _, blue in evidence.over(white)[0]]
        [(32, 170), (176, 42)]
    """

    values: Map
    low: float
    high: float
    colormap: Colormap
    darkest: float = _DARKEST

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to tell apart."""
        return not self.high > self.low

    def over(self, image: Pixels) -> Pixels:
        """Colour ``image``, of any size, by the map; leave it as it is where the map is NaN, or
        constant.
        """
        if self.is_constant:
            return image
        height, width = image.shape[:2]
        tinted = np.empty_like(image)
        for top, bottom in _bands(height, width):
            values = _rows_of(self.values, (height, width), top, bottom)
            tinted[top:bottom] = self._tint(image[top:bottom], values)
        return tinted

    def _tint(self, image: Pixels, values: Map) -> Pixels:
        missing = np.isnan(values)
        any_missing = bool(missing.any())
        if any_missing:
            values = np.where(missing, np.float32(self.low), values)
        count = self.colormap.N
        scaled = (values - self.low) / (self.high - self.low) * count
        place = scaled.clip(0, count - 1).astype(np.int32)
        grey = np.asarray(Image.fromarray(image).convert("L"))
        tints = _tints(_Same(self.colormap), self.darkest)
        # As one number a colour, for three are gathered in ten times as long.
        packed = tints.take(place * 256 + grey, mode="clip")
        tinted = cv2.cvtColor(packed.view(np.uint8).reshape(*packed.shape, 4), cv2.COLOR_RGBA2RGB)
        return np.where(missing[..., None], image, tinted) if any_missing else tinted

    def bar(self, width: int) -> Pixels:
        """The scale itself, lowest value left."""
        colours: Pixels = self.colormap(np.linspace(0, 1, width), bytes=True)[:, :3]
        return np.repeat(colours[None], 10, axis=0)


class _Same:
    """A colormap, which cannot be hashed, by its identity."""

    def __init__(self, colormap: Colormap) -> None:
        self.colormap = colormap

    def __hash__(self) -> int:
        return id(self.colormap)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.colormap is other.colormap


@lru_cache(maxsize=8)
def _tints(same: _Same, darkest: float) -> NDArray[np.uint32]:
    """(N * 256,): each colour over each grey of the image; red, green, blue and a spare byte."""
    colours = same.colormap(np.arange(same.colormap.N), bytes=True)[:, None]
    share = darkest + (1 - darkest) * (np.arange(256, dtype=np.float32) / 255)
    tints: Pixels = (colours * share[None, :, None] + 0.5).astype(np.uint8)
    return tints.view(np.uint32).ravel()


def overlay(image: Pixels, values: Map) -> Pixels:
    """Colour an image (H, W, 3) by a raw map of any size, on the map's own scale.

    Example:
        >>> black = np.zeros((40, 60, 3), np.uint8)
        >>> overlay(black, np.float32([[0, 1], [2, 3]])).shape
        (40, 60, 3)
    """
    return own_layer(values).over(image)


def own_layer(values: Map) -> Layer:
    """A map on its own scale: lowest value blue, highest red.

    Example:
        >>> layer = own_layer(np.float32([[5, np.nan, 7]]))
        >>> layer.low, layer.high
        (5.0, 7.0)
    """
    # Unlike min and max these pass NaN by, unless there is nothing else.
    low, high = (float(end.reduce(values, axis=None)) for end in (np.fmin, np.fmax))
    return Layer(values, low, high, _OWN)


def resized(pixels: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """Resize an image (H, W, 3) or a map (H, W), averaging where it shrinks.

    Example:
        >>> resized(np.zeros((40, 60, 3), np.uint8), width=30, height=20).shape
        (20, 30, 3)
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    resample = Image.Resampling.BICUBIC if pixels.ndim == 3 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), resample, reducing_gap=3.0))


def reduced(image: Pixels) -> Pixels:
    """An image as large as any figure needs it: unchanged, or 1,600 pixels on its longer side.

    Example:
        >>> reduced(np.zeros((40, 3_200, 3), np.uint8)).shape
        (20, 1600, 3)
    """
    height, width = drawn_size(*image.shape[:2])
    return resized(image, width, height)


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """The height and width of what `reduced` makes of an image of this one.

    Example:
        >>> drawn_size(40, 60), drawn_size(9_400, 9_400)
        ((40, 60), (1600, 1600))
    """
    scale = min(1.0, _ENOUGH / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """First and last row of parts that are worked on one at a time, which bounds the memory."""
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _rows_of(values: Map, size: tuple[int, int], top: int, bottom: int) -> Map:
    """Rows of what `resized` makes of a map at this size (H, W)."""
    height, width = size
    if values.shape == size or (top, bottom) == (0, height):
        return resized(values, width, height)[top:bottom]
    rows, columns = values.shape
    box = (0, top * rows / height, columns, bottom * rows / height)
    part = Image.fromarray(values).resize((width, bottom - top), Image.Resampling.BILINEAR, box)
    return np.asarray(part)


def save_png(path: Path, pixels: Pixels) -> None:
    """Write an image (H, W, 3); it appears whole or not at all, and equal ones are equal bytes.

    Raises:
        DiffsalError: an image that PNG or the memory has no room for; see
            :func:`diffsal.system.files.replacing`.
    """
    try:
        done, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _PNG)
    except cv2.error:
        done = False
    if not done:
        height, width = pixels.shape[:2]
        raise DiffsalError(f"{path}: cannot be made, as {width} × {height} pixels are too many")
    with replacing(path) as scratch:
        scratch.write_bytes(encoded.data)
