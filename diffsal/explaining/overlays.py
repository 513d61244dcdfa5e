"""Maps as colours over an image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, ListedColormap
from numpy.typing import NDArray
from PIL import Image

from diffsal.system.files import replacing

Pixels = NDArray[np.uint8]
Map = NDArray[np.float32]

# Red high, blue low; the yellow between tells the own scale from the signed one. Both are safe for
# the colour-blind. The signed one stops short of its ends, which turn black over dark images.
_OWN = matplotlib.colormaps["RdYlBu_r"]
SIGNED = ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 255)))
_DARKEST = 0.65  # what black in the image leaves of a colour's brightness


@dataclass(frozen=True)
class Layer:
    """A map and the scale that it is drawn on.

    Attributes:
        values: (h, w), raw; NaN where nothing is drawn.
        low: the value that has the scale's first colour.
        high: the value that has its last.
        colormap: the colours between.

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

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to tell apart."""
        return not self.high > self.low

    def over(self, image: Pixels) -> Pixels:
        """Colour ``image``, of any size, by the map; leave it as it is where the map is NaN, or
        constant.
        """
        values = resized(self.values, image.shape[1], image.shape[0])
        if self.is_constant:
            return image
        span = self.high - self.low
        colours = self.colormap((values - self.low) / span, bytes=True)[..., :3]
        grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32) / 255
        tinted = colours * (_DARKEST + (1 - _DARKEST) * grey)[..., None]
        return np.where(np.isnan(values)[..., None], image, (tinted + 0.5).astype(np.uint8))

    def bar(self, width: int) -> Pixels:
        """The scale itself, lowest value left."""
        colours: Pixels = self.colormap(np.linspace(0, 1, width), bytes=True)[:, :3]
        return np.repeat(colours[None], 10, axis=0)


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


def save_png(path: Path, pixels: Pixels) -> None:
    """Write an image (H, W, 3); it appears whole or not at all, and equal ones are equal bytes."""
    with replacing(path) as scratch:
        Image.fromarray(pixels).save(scratch, format="PNG", compress_level=2)  # a third of the time
