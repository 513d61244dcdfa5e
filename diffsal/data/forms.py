"""Images in whatever form a caller has them."""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffsal.data.images import pixels_of, read_image
from diffsal.errors import DiffsalError

ImageLike: TypeAlias = str | Path | Image.Image | NDArray[Any]
"""A path, an image of Pillow's, or an array (H, W, 3) or (H, W), uint8."""


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """An image as a network trained through Pillow or torchvision sees it.

    Files and Pillow's images are read alike, see :func:`diffsal.data.images.read_image`: upright,
    without transparency; grey of more than 8 bits by the range of its type.

    Args:
        image: see :data:`ImageLike`.

    Returns:
        (H, W, 3) uint8, RGB; of an array that is so already, the array itself.

    Raises:
        DiffsalError: what is no image, an array of another type or shape, and what cannot be read.

    Example:
        >>> as_pixels(np.zeros((2, 3), np.uint8)).shape
        (2, 3, 3)
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return pixels_of(ImageOps.exif_transpose(image))[0]
    if not isinstance(image, np.ndarray):
        raise DiffsalError(
            f"a {type(image).__name__} is no image: pass a path, a Pillow image, or a uint8 array"
        )
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise DiffsalError(
            f"an array of {image.dtype} and shape {image.shape} is no image: pass uint8 of shape "
            "(height, width, 3) or (height, width)"
        )
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
