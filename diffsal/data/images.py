"""Images and human maps: finding, reading and checking."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from diffsal.errors import DiffsalError
from diffsal.system.files import open_regular

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".dcm", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)

# Nothing else that Pillow knows is opened: some of its readers start other programs.
_12_BITS = 4_095  # in a file of 16, which some devices write
_NEARLY_BLACK = "The image uses 4096 of 65536 levels of grey and is seen nearly black."
_BAND = 1 << 20  # pixels
_BYTES = 3  # of a pixel, at most, in deflated DICOM
_TURNED = 5  # EXIF orientations from here on change height and width for each other
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")


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

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.full((2, 3), 255, np.uint8)).save(Path(folder, "a.png"))
        ...     [path.name for path in find_images([Path(folder)], recursive=False)]
        ['a.png']
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

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.full((2, 3), 255, np.uint8)).save(Path(folder, "a.png"))
        ...     read_image(Path(folder, "a.png")).shape
        (2, 3, 3)
    """
    return read_image_with_notes(path)[0]


def read_image_with_notes(path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """What `read_image` reads, and a sentence where it is nearly black for want of a scale.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.full((2, 3), 4095, np.uint16)).save(Path(folder, "a.png"))
        ...     read_image_with_notes(Path(folder, "a.png"))[1]
        ['The image uses 4096 of 65536 levels of grey and is seen nearly black.']
    """
    with _opened(path) as stream:
        return _read(stream)


def image_of_bytes(content: bytes, name: str) -> tuple[NDArray[np.uint8], list[str]]:
    """What `read_image_with_notes` reads, of a file's content in memory.

    Args:
        content: the file's bytes.
        name: what errors call it.

    Raises:
        DiffsalError: as `read_image`.

    Example:
        >>> file = BytesIO()
        >>> Image.fromarray(np.full((2, 3), 255, np.uint8)).save(file, format="PNG")
        >>> image_of_bytes(file.getvalue(), "a.png")[0].shape
        (2, 3, 3)
    """
    with _one_line(name):
        return _read(_not_empty(BytesIO(content)))


def _read(stream: BinaryIO) -> tuple[NDArray[np.uint8], list[str]]:
    magic = stream.read(132)[128:]
    stream.seek(0)
    if magic == b"DICM":
        return _read_dicom(stream), []
    return pixels_of(_decode(stream))


def pixels_of(image: Image.Image) -> tuple[NDArray[np.uint8], list[str]]:
    """What a network sees of an image in memory, and sentences, as `read_image_with_notes`.

    Raises:
        DiffsalError: values whose black and white are unknown.

    Example:
        >>> pixels_of(Image.new("L", (3, 2), 7))[0][0, 0].tolist()
        [7, 7, 7]
    """
    deep = _deep_grey(image)
    if deep is not None:
        pixels = np.repeat(_to_8_bit(deep)[..., None], 3, axis=-1)
        brightest = round(float(deep.max()) * 65_535)
        is_dark = image.mode != "F" and 0 < brightest <= _12_BITS
        return pixels, [_NEARLY_BLACK] if is_dark else []
    # By way of RGBA where there is transparency, else Pillow warns of palettes.
    opaque = image.convert("RGBA") if image.has_transparency_data else image
    return _rgb(opaque), []


class Glance(NamedTuple):
    """What a file's header says.

    Attributes:
        size: height and width in pixels, upright.
        is_deep: whether it is grey of more than 8 bits.
    """

    size: tuple[int, int]
    is_deep: bool


def glance(path: Path) -> Glance:
    """What an image's header says, without its pixels.

    Raises:
        DiffsalError: no image that Pillow reads; DICOM is none.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("L", (3, 2)).save(Path(folder, "a.png"))
        ...     glance(Path(folder, "a.png"))
        Glance(size=(2, 3), is_deep=False)
    """
    with _opened(path) as stream:
        image = Image.open(stream, formats=FORMATS)
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= _TURNED
        size = (image.width, image.height) if is_turned else (image.height, image.width)
        return Glance(size, _is_deep(image))


def read_map(path: Path) -> NDArray[np.float32]:
    """Read a human salience map or mask: its intensity, and nothing normalised.

    Colours become luminance (ITU-R 601), and what is transparent counts as unmarked (black).

    Args:
        path: PNG, JPEG, TIFF, BMP or WebP, of 1, 8 or 16 bits, or floating point in [0, 1].

    Returns:
        (H, W) float32 in [0, 1]: the values divided by the largest that the file could hold.

    Raises:
        DiffsalError: as `read_image`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.full((2, 3), 255, np.uint8)).save(Path(folder, "a.png"))
        ...     read_map(Path(folder, "a.png")).max()
        np.float32(1.0)
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


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3), filled a band at a time: a copy of a large image is large, too."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(band.convert("RGB"))
    return pixels


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for the decoders."""
    with _one_line(path), open_regular(Path(path)) as stream:
        yield _not_empty(stream)


def _not_empty(stream: BinaryIO) -> BinaryIO:
    if not stream.read(1):
        raise DiffsalError("the file is empty; replace it or leave it out")
    stream.seek(0)
    return stream


@contextmanager
def _one_line(name: str | Path) -> Iterator[None]:
    """Turn whatever decoders raise into one line that begins with the file's name."""
    try:
        yield
    except DiffsalError as error:
        raise DiffsalError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise DiffsalError(f"{name}: not a readable image ({kinds}); convert it") from error
    except Exception as error:  # broken files make decoders raise almost anything
        if isinstance(error, OSError) and error.strerror:
            raise DiffsalError(f"{name}: {error.strerror}; check the path") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DiffsalError(f"{name}: cannot be decoded ({reason}); replace the file") from error


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


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("F", "I") or image.mode.startswith("I;16")


def _deep_grey(image: Image.Image) -> NDArray[np.float32] | None:
    """(H, W) in [0, 1] of a grey image of more than 8 bits; None for any other."""
    if not _is_deep(image):
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
    pixels = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND // max(1, values[:1].size))
    for top in range(0, len(values), rows):
        pixels[top : top + rows] = np.rint(values[top : top + rows] * 255)
    return pixels


def _read_dicom(stream: BinaryIO) -> NDArray[np.uint8]:
    try:
        from pydicom import dcmread
        from pydicom.pixels.processing import apply_color_lut
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise DiffsalError("DICOM needs pydicom; pip install 'diffsal[dicom]'") from error
    _check_inflated(stream)
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
    pixels = _to_8_bit(shares)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)


def _check_inflated(stream: BinaryIO) -> None:
    """Refuse deflated DICOM that inflates to more than the largest image; pydicom has no bound."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    read_preamble(stream, force=False)
    start = stream.tell()
    for is_implicit in (False, True):  # pydicom reads the head in the one way or the other
        stream.seek(start)
        try:
            head = read_dataset(stream, is_implicit, True, stop_when=lambda tag, *_: tag >> 16 != 2)
            syntax = head.get("TransferSyntaxUID")
        except Exception:  # it is then no head in this way
            continue
        if syntax == DeflatedExplicitVRLittleEndian:
            _check_stream(stream)
    stream.seek(0)


def _check_stream(stream: BinaryIO) -> None:
    """Inflate a stream to its end, a piece at a time."""
    limit = _BYTES * (Image.MAX_IMAGE_PIXELS or sys.maxsize)
    inflating, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflating.eof:
        given = inflating.unconsumed_tail or stream.read(_BAND)
        piece = inflating.decompress(given, _BAND)
        if not given and not piece:  # cut off, which pydicom says
            return
        size += len(piece)
        if size > limit:
            raise DiffsalError(
                f"inflates to more than {limit / 1e6:.0f} MB, which no image of "
                f"{Image.MAX_IMAGE_PIXELS} pixels fills; reduce the image"
            )


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
