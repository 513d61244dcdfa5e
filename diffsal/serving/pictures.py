"""What a browser shows: images and maps over them, as data that stands in the page itself."""

import io
from base64 import b64encode
from typing import Any

import torch
from PIL import Image

from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.figures import Explanation, overlay_layers
from diffsal.explaining.overlays import Layer, Pixels, drawn_size, resized

LARGE = 640
"""Pixels of the longer side of an image on the page."""
SMALL = 360
"""The same, of those that stand side by side."""
_QUALITY = 92  # of JPEG; colours of maps are kept at full resolution


def for_screen(image: Pixels, side: int = LARGE) -> Pixels:
    """An image (H, W, 3) with a longer side of so many pixels; small ones grow, for smooth maps.

    Example:
        >>> import numpy as np
        >>> for_screen(np.zeros((20, 40, 3), np.uint8)).shape
        (320, 640, 3)
    """
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    return resized(image, width, height)


def as_uri(pixels: Pixels) -> str:
    """An image (H, W, 3) as a ``data:`` address.

    Example:
        >>> import numpy as np
        >>> as_uri(np.zeros((2, 3, 3), np.uint8))[:23]
        'data:image/jpeg;base64,'
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode("ascii")


def layers_over(explanation: Explanation) -> dict[str, dict[str, Any]]:
    """The panels of the project's figure, each with its scale in logits and the scale's colours.

    Returns:
        For each of :data:`diffsal.explaining.figures.PANELS`: ``picture``, ``bar``, ``low`` and
        ``high``.
    """
    image = for_screen(explanation.image)
    return {name: layer_over(image, layer) for name, layer in overlay_layers(explanation).items()}


def layer_over(image: Pixels, layer: Layer) -> dict[str, Any]:
    """A map over an image (H, W, 3): ``picture``, ``bar``, ``low`` and ``high``.

    Example:
        >>> import numpy as np
        >>> from diffsal.explaining.overlays import own_layer
        >>> shown = layer_over(np.zeros((8, 8, 3), np.uint8), own_layer(np.float32([[0, 2]])))
        >>> shown["low"], shown["high"], shown["bar"][:15]
        (0.0, 2.0, 'data:image/jpeg')
    """
    return {
        "picture": as_uri(layer.over(image)),
        "bar": as_uri(layer.bar(256)),
        "low": layer.low,
        "high": layer.high,
    }


def seen_box(preprocessing: Preprocessing, size: tuple[int, int]) -> list[float]:
    """Left, top, width and height of what the model sees, in shares of an image of this (H, W).

    Example:
        >>> seen_box(Preprocessing(size=(224, 224), resize="crop"), (256, 512))
        [0.28125, 0.0625, 0.4375, 0.875]
    """
    height, width = drawn_size(*size)
    seen = ~preprocessing.place(torch.zeros(1, 1), (height, width)).isnan()
    rows, columns = (seen.any(axis).nonzero()[:, 0] for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [left / width, top / height, len(columns) / width, len(rows) / height]
