"""Images and human maps: finding, reading, checking, and the geometry of a network's input."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from diffsal.errors import DiffsalError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "Preprocessing",
    "find_images",
    "read_image",
    "read_map",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".dcm", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)

# Nothing else that Pillow knows is opened: some of its readers start other programs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# The share of the resized image that a centre crop keeps in torchvision's ImageNet presets.
CROP_SHARE = 224 / 256


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
        mean, std: of red, green and blue, on the scale [0, 1].

    Raises:
        DiffsalError: a value that cannot be used; names the field.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop"] = "squash"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not _numbers(self.size, 2, int) or min(self.size) <= 0:
            raise _bad_field("size", self.size, "two positive whole numbers, height and width")
        if self.resize not in ("squash", "crop"):
            raise _bad_field("resize", self.resize, "'squash' or 'crop'")
        if not _numbers(self.mean, 3, int, float):
            raise _bad_field("mean", self.mean, "three finite numbers")
        if not _numbers(self.std, 3, int, float) or min(self.std) <= 0:
            raise _bad_field("std", self.std, "three positive finite numbers")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` undoes it."""
        return {
            "size": list(self.size),
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Preprocessing:
        """Undo `to_dict`. Every field must be there: a silent default would be a wrong input.

        Raises:
            DiffsalError: a field that is missing, unknown, or of a value that cannot be used.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or set(value) != set(names):
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
            raise DiffsalError(f"preprocessing: needs the fields {', '.join(names)}; found {found}")
        arguments: dict[str, Any] = {
            name: tuple(given) if isinstance(given, list) else given
            for name, given in value.items()
        }
        return cls(**arguments)

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Make the network's input.

        Args:
            image: (H0, W0, 3) uint8, RGB.

        Returns:
            (3, H, W) float32.

        Raises:
            DiffsalError: see `resized`.
        """
        pixels = torch.from_numpy(self.resized(image)).permute(2, 0, 1).contiguous()
        mean = torch.tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

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

    def place(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring maps of the network's input back onto the original image, bilinearly.

        Args:
            maps: (..., h, w) floating point; any h and w that span the network's input.
            size: height and width of the original image (H0, W0), in pixels.

        Returns:
            (..., H0, W0). Pixels that ``"crop"`` cut off, which the network never saw, are NaN.
        """
        resized, corner = self._geometry(*size)
        rows, columns = (
            # Of the resized image `cut` pixels from `start` on went in; here in original pixels.
            _interpolation(full, count, start * full / whole, cut * full / whole)
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


def _bad_field(name: str, value: object, wanted: str) -> DiffsalError:
    return DiffsalError(f"preprocessing: {name} must be {wanted}, not {value!r}")


def _numbers(value: object, count: int, *kinds: type) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(type(number) in kinds and math.isfinite(number) for number in value)
    )


def _interpolation(full: int, count: int, offset: float, length: float) -> Tensor:
    """The (full, count) matrix that spreads `count` samples over `length` of `full` pixels.

    Linear between the samples' centres, constant beyond the outer ones; NaN where a pixel's
    centre lies outside [offset, offset + length].
    """
    position = (torch.arange(full, dtype=torch.float64) + 0.5 - offset) / length
    sample = (position * count - 0.5).clamp(0, count - 1)
    weights = (1 - (sample[:, None] - torch.arange(count)).abs()).clamp(min=0)
    weights[(position < 0) | (position > 1)] = torch.nan
    return weights


def find_images(paths: Sequence[Path], recursive: bool) -> list[Path]:
    """Expand folders into the images they hold; files are taken as given, whatever their suffix.

    Args:
        paths: files and folders.
        recursive: look into the folders' subfolders too. Links to folders are not followed.

    Returns:
        In the order of `paths`; each folder's images, known by `IMAGE_SUFFIXES`, sorted. Hidden
        files and folders are left out.

    Raises:
        DiffsalError: a path that is not there or cannot be read, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if os.path.isfile(path):  # unlike Path.is_file, False where a folder cannot be searched
            found.append(path)
        elif os.path.isdir(path):
            found += _images_in(path, recursive)
        else:
            raise DiffsalError(f"{path}: no file or folder that can be read; check the path")
    return found


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DiffsalError(f"{error.filename}: {error.strerror}; check the path and its rights")

    images: list[Path] = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        visible = [name for name in subfolders if not name.startswith(".")]
        subfolders[:] = visible if recursive else []
        images += [Path(parent, name) for name in names if not name.startswith(".")]
    images = sorted(image for image in images if image.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        hint = "" if recursive else " (its subfolders are read with --recursive)"
        raise DiffsalError(f"{folder}: no images in this folder{hint}")
    return images


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read one image as a network trained through Pillow or torchvision sees it.

    Transparency and colour profiles are ignored, as torchvision's loader ignores them; the EXIF
    orientation is applied. Grey of more than 8 bits is scaled by the range that the file
    declares, not by its content: 12-bit values in a 16-bit file stay dark. Floating point must
    lie in [0, 1]. DICOM goes through its modality LUT and its (first) VOI LUT or window, whose
    output range becomes 0 to 255; without one, 8-bit values stay as they are and deeper ones are
    scaled from minimum to maximum. MONOCHROME1 is inverted.

    Args:
        path: PNG, JPEG, TIFF, BMP, WebP, or DICOM (extra ``dicom``), known by their content.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        DiffsalError: a file that cannot be read or decoded whole, that is larger than Pillow's
            ``MAX_IMAGE_PIXELS``, or that holds several images (a JPEG's previews apart).
    """
    with _opened(path) as stream:
        magic = stream.read(132)[128:]
        stream.seek(0)
        if magic == b"DICM":
            return _read_dicom(stream)
        image = _decode(stream)
        deep = _deep_grey(image)
        if deep is not None:
            return np.repeat(_to_8_bit(deep)[..., None], 3, axis=-1)
        # By way of RGBA where there is transparency, else Pillow warns of palettes.
        opaque = image.convert("RGBA") if image.has_transparency_data else image
        return np.array(opaque.convert("RGB"))


def read_map(path: Path) -> NDArray[np.float32]:
    """Read a human salience map or mask: its intensity, and nothing normalised.

    Colours become luminance (ITU-R 601), and what is transparent counts as unmarked (black).

    Args:
        path: PNG, JPEG, TIFF, BMP or WebP, of 1, 8 or 16 bits, or floating point in [0, 1].

    Returns:
        (H, W) float32 in [0, 1]: the values divided by the largest that the file could hold.

    Raises:
        DiffsalError: as `read_image`.
    """
    with _opened(path) as stream:
        image = _decode(stream)
        deep = _deep_grey(image)
        if deep is not None:
            return deep
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        grey: NDArray[np.float32] = np.array(image.convert("RGB").convert("L"), np.float32)
        grey /= 255
        return grey


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for the decoders and turn whatever they raise into one line with the path."""
    try:
        with Path(path).open("rb") as stream:
            if not stream.read(1):
                raise DiffsalError("the file is empty; replace it or leave it out")
            stream.seek(0)
            yield stream
    except DiffsalError as error:
        raise DiffsalError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise DiffsalError(f"{path}: not a readable image ({kinds}); convert it") from error
    except Exception as error:  # broken files make decoders raise almost anything
        if isinstance(error, OSError) and error.strerror:
            raise DiffsalError(f"{path}: {error.strerror}; check the path") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DiffsalError(f"{path}: cannot be decoded ({reason}); replace the file") from error


def _decode(stream: BinaryIO) -> Image.Image:
    """The one image in a file, decoded whole and upright."""
    image = Image.open(stream, formats=FORMATS)
    _check_pixels(image.height, image.width)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG: what follows are previews
        raise DiffsalError(f"holds {frames} images; save the one that is meant as its own file")
    ImageOps.exif_transpose(image, in_place=True)
    image.load()
    return image


def _check_pixels(height: int, width: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise DiffsalError(
            f"{height} x {width} pixels are more than the limit of {limit}; reduce the image"
        )


def _deep_grey(image: Image.Image) -> NDArray[np.float32] | None:
    """(H, W) in [0, 1] of a grey image of more than 8 bits; None for any other."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return None
    if image.mode == "I" and image.format == "TIFF":
        raise DiffsalError("holds signed or 32-bit integers, whose white is unknown; save 16 bits")
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    values: NDArray[np.float32] = np.array(image, np.float32)
    if image.mode != "F":
        values /= np.float32(2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1)
    if not (values.min() >= 0 and values.max() <= 1):
        raise DiffsalError("holds floating-point values outside [0, 1]; rescale them")
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        np.subtract(1, values, out=values)  # white is zero: Pillow inverts it at 8 bits alone
    return values


def _to_8_bit(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.rint(values * 255).astype(np.uint8)
    return pixels


def _read_dicom(stream: BinaryIO) -> NDArray[np.uint8]:
    try:
        from pydicom import dcmread
        from pydicom.pixels.processing import apply_color_lut
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise DiffsalError("DICOM needs pydicom; pip install 'diffsal[dicom]'") from error
    dataset = dcmread(stream)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DiffsalError(f"holds {frames} frames; save the one that is meant as its own file")
    _check_pixels(dataset.Rows, dataset.Columns)
    values = pixel_array(dataset)  # YBR comes out as RGB
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)[..., :3]
        low, high = 0.0, float(np.iinfo(values.dtype).max)
    elif values.ndim == 3:
        low, high = 0.0, 2.0**dataset.BitsStored - 1
    else:
        values, low, high = _display_values(values, dataset)
    # A window's range runs downwards where the rescale slope is negative; the quotient does not.
    shares = np.clip((values - low) / (high - low or 1.0), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shares = 1 - shares
    return _to_8_bit(shares if shares.ndim == 3 else np.repeat(shares[..., None], 3, axis=-1))


def _display_values(values: NDArray[Any], dataset: Any) -> tuple[NDArray[Any], float, float]:
    """Grey values as they are meant to be shown, and which of them are black and white.

    DICOM PS3.3 C.11.1 (modality LUT) and C.11.2 (VOI LUT).
    """
    from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing

    stored = dataset.BitsStored
    values = apply_modality_lut(values, dataset)
    if dataset.get("VOILUTSequence"):
        descriptor = dataset.VOILUTSequence[0].LUTDescriptor
        entries, first = descriptor[0] or 2**16, descriptor[1]
        # pydicom counts in the entries' own width: in a long table of 8 bits it would go astray.
        descriptor[2] = 16
        table = apply_voi(np.arange(first, first + entries), dataset)
        values = table[np.clip(np.rint(values).astype(np.int64) - first, 0, entries - 1)]
        # Some devices declare 16 bits and fill fewer; the table itself tells.
        return values, 0.0, 2.0 ** int(table.max()).bit_length() - 1
    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        low, high = apply_windowing(np.array([-np.inf, np.inf]), dataset)
        return apply_windowing(values, dataset), float(low), float(high)
    if stored <= 8:
        first = -(2 ** (stored - 1)) if dataset.PixelRepresentation else 0
        low, high = sorted(apply_modality_lut(np.array([first, first + 2**stored - 1]), dataset))
        return values, float(low), float(high)
    return values, float(values.min()), float(values.max())
