"""From an image's pixels to the network's input, and back from maps to the image."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffsal.data.forms import ImageLike, as_pixels
from diffsal.errors import DiffsalError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LARGEST = {"mean": 1.0, "std": 10.0}  # a std above 1 is rare, of pixels from 0 to 255 it is 58
# The share of the resized image that a centre crop keeps in torchvision's ImageNet presets.
CROP_SHARE = 224 / 256
# Red's, green's and blue's parts of luminance in 65536ths (ITU-R 601), as in Pillow.
_LUMINANCE = (19595, 38470, 7471)


@dataclass(frozen=True)
class Preprocessing:
    """From an image's pixels to a network's input, and from the network's maps back to the image.

    Bit for bit what torchvision's ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` make
    of a PIL image (bilinear, antialiased).

    Args:
        size: height and width of the network's input, in pixels.
        resize: ``"squash"`` brings the whole image to ``size``, whatever its aspect ratio.
            ``"crop"`` keeps the aspect ratio: the side that limits is resized to 256/224 of its
            ``size``, then the centre is cut out.
        mean, std: of red, green and blue, on the scale [0, 1]; of one channel, one number (of three
            given, their mean).
        channels: 3, or 1 for luminance (ITU-R 601, as Pillow's ``L``).

    Raises:
        DiffsalError: a value that cannot be used; names the field.

    Example:
        >>> Preprocessing(size=(32, 32))(np.zeros((20, 40, 3), np.uint8)).shape
        torch.Size([3, 32, 32])
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop"] = "squash"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: int = 3

    def __post_init__(self) -> None:
        if not _numbers(self.size, 2, int) or min(self.size) <= 0:
            raise _bad_field("size", self.size, "two positive whole numbers, height and width")
        if self.resize not in ("squash", "crop"):
            raise _bad_field("resize", self.resize, "'squash' or 'crop'")
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise _bad_field("channels", self.channels, "3, or 1 for grey")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _of_channels(getattr(self, name), self.channels))
        if not _numbers(self.mean, self.channels, int, float):
            raise _bad_field("mean", self.mean, "three finite numbers, or one for grey")
        if not _numbers(self.std, self.channels, int, float) or min(self.std) <= 0:
            raise _bad_field("std", self.std, "three positive finite numbers, or one for grey")
        for name in ("mean", "std"):
            if max(getattr(self, name)) > _LARGEST[name]:
                raise _bad_field(name, getattr(self, name), "of pixels from 0 to 1: divide by 255")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` undoes it."""
        return {
            "size": list(self.size),
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            **({} if self.channels == 3 else {"channels": self.channels}),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Undo `to_dict`. Every field must be there, as a silent default would be a wrong input;
        without ``channels``, which are younger, there are 3.

        Raises:
            DiffsalError: a field that is missing, unknown, or of a value that cannot be used.
        """
        names = [field.name for field in fields(cls) if field.name != "channels"]
        if not isinstance(value, Mapping) or set(value) - {"channels"} != set(names):
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
            raise DiffsalError(f"preprocessing: needs the fields {', '.join(names)}; found {found}")
        arguments: dict[str, Any] = {
            name: tuple(given) if isinstance(given, list) else given
            for name, given in value.items()
        }
        return cls(**arguments)

    def __call__(self, image: ImageLike) -> Tensor:
        """Make the network's input.

        Args:
            image: a path, an image of Pillow's, or (H0, W0, 3) or (H0, W0) uint8; see
                :func:`diffsal.data.forms.as_pixels`.

        Returns:
            (channels, H, W) float32.

        Raises:
            DiffsalError: see `resized` and :func:`diffsal.data.forms.as_pixels`.
        """
        pixels = torch.from_numpy(self.resized(as_pixels(image))).permute(2, 0, 1).contiguous()
        return self.normalized(self.in_channels(pixels))

    def normalized(self, pixels: Tensor) -> Tensor:
        """From pixels to the network's input, on the pixels' device, to the same bits on any.

        Args:
            pixels: (channels, H, W) or (B, channels, H, W) uint8.

        Returns:
            The same shape, float32.

        Example:
            >>> white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
            >>> Preprocessing(mean=(0.5,), std=(0.5,)).normalized(white).flatten()
            tensor([1., 1., 1.])
        """
        # 255 is on the device, too: by a number that is not, GPUs divide with its rounded inverse.
        constants = (255.0,), self.mean, self.std
        white, mean, std = (_per_channel(one, pixels.device) for one in constants)
        return pixels.to(torch.float32).div_(white).sub_(mean).div_(std)

    def in_channels(self, pixels: Tensor) -> Tensor:
        """Colours as they are, or their luminance, to the bit as Pillow makes it.

        Args:
            pixels: (3, H, W) uint8, RGB.

        Returns:
            (channels, H, W) uint8.

        Example:
            >>> red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
            >>> Preprocessing(channels=1).in_channels(red).flatten()
            tensor([76], dtype=torch.uint8)
        """
        if self.channels == 3:
            return pixels
        parts = torch.tensor(_LUMINANCE, dtype=torch.int32).view(3, 1, 1)
        grey = (pixels.to(torch.int32) * parts).sum(0, keepdim=True) + 0x8000
        return (grey >> 16).to(torch.uint8)

    def resized(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Bring an image, or a human map that belongs to one, to the network's geometry.

        Args:
            pixels: an image (H0, W0, 3) uint8, or a map (H0, W0) float32.

        Returns:
            The same dtype, (H, W, 3) or (H, W).

        Raises:
            DiffsalError: the resized image would exceed Pillow's ``MAX_IMAGE_PIXELS``, as a very
                elongated one does under ``"crop"``.
        """
        image = Image.fromarray(pixels)
        (height, width), (top, left) = self._geometry(image.height, image.width)
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise DiffsalError(
                f"{image.height} x {image.width} pixels would become {height} x {width}, more than "
                "fits in memory; use --resize squash or a smaller --size"
            )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.array(image.crop((left, top, left + self.size[1], top + self.size[0])))

    def place(self, maps: Tensor, size: tuple[int, int], as_cells: bool = False) -> Tensor:
        """Bring maps of the network's input back onto the original image, bilinearly.

        Args:
            maps: (..., h, w) floating point; any h and w that span the network's input.
            size: height and width of the original image (H0, W0), in pixels.
            as_cells: give every pixel the value of its cell, without interpolation.

        Returns:
            (..., H0, W0). Pixels that ``"crop"`` cut off, which the network never saw, are NaN.

        Example:
            >>> Preprocessing(size=(64, 64)).place(torch.eye(2), (2, 4))
            tensor([[1.0000, 0.7500, 0.2500, 0.0000],
                    [0.0000, 0.2500, 0.7500, 1.0000]])
        """
        resized, corner = self._geometry(*size)
        rows, columns = (
            # Of the resized image `cut` pixels from `start` on went in; here in original pixels.
            _interpolation(full, count, start * full / whole, cut * full / whole, as_cells)
            .to(maps.dtype)
            .to(maps.device)
            for full, count, whole, start, cut in zip(
                size, maps.shape[-2:], resized, corner, self.size, strict=True
            )
        )
        return rows @ maps @ columns.T

    def _geometry(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size that an image is resized to, and there the top left corner of what is kept."""
        if self.resize == "squash":
            return self.size, (0, 0)
        # As in torchvision: the side that limits is exact, the other is cut to whole pixels.
        if height * self.size[1] <= width * self.size[0]:
            short = round(self.size[0] / CROP_SHARE)
            resized = (short, int(short * width / height))
        else:
            short = round(self.size[1] / CROP_SHARE)
            resized = (int(short * height / width), short)
        return resized, (
            round((resized[0] - self.size[0]) / 2),
            round((resized[1] - self.size[1]) / 2),
        )


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(channels, 1, 1); kept, as bringing them to a GPU would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _bad_field(name: str, value: object, wanted: str) -> DiffsalError:
    return DiffsalError(f"preprocessing: {name} must be {wanted}, not {value!r}")


def _of_channels(value: Any, channels: int) -> Any:
    """One number for all colours, or the mean of three for grey; anything else as it is."""
    if channels == 3 and _numbers(value, 1, int, float):
        return value * 3
    if channels == 1 and _numbers(value, 3, int, float):
        return (fmean(value),)
    return value


def _numbers(value: object, count: int, *kinds: type) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(type(number) in kinds and abs(number) <= sys.float_info.max for number in value)
    )


def _interpolation(
    full: int, count: int, offset: float, length: float, nearest: bool = False
) -> Tensor:
    """The (full, count) matrix that spreads `count` samples over `length` of `full` pixels.

    Linear between the samples' centres, constant beyond the outer ones, or the nearest sample; NaN
    where a pixel's centre lies outside [offset, offset + length].
    """
    position = (torch.arange(full, dtype=torch.float64) + 0.5 - offset) / length
    sample = (position * count - 0.5).clamp(0, count - 1)
    sample = sample.round() if nearest else sample
    weights = (1 - (sample[:, None] - torch.arange(count)).abs()).clamp(min=0)
    weights[(position < 0) | (position > 1)] = torch.nan
    return weights
