"""Where the images of an audit come from: the files of an index, or a data set in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diffsal.data.datasets import ImageDataset, InputDataset, Pixels, decode
from diffsal.data.forms import as_pixels
from diffsal.data.images import read_image
from diffsal.data.index import Index, Sample, class_position, read_index
from diffsal.data.oddities import oddities, oddities_in_memory
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError

_KEYS = (  # by which data sets whose items are mappings call an image, a label and a map
    ("image", "pixel_values", "img"),
    ("label", "labels"),
    ("map", "mask"),
)
_ASKED_TWICE = 8  # items, of which random augmentation would change some
_SLACK = 0.02  # by which pixels may leave [0, 1]: interpolation overshoots


class Source(Protocol):
    """What brings samples to a network's inputs and to pictures."""

    def items(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> ImageDataset:
        """Inputs, labels and human maps."""

    def pixels(self, sample: Sample) -> NDArray[np.uint8]:
        """(H, W, 3): the image as it is shown."""


class Files:
    """Images are files, and ``sample.path`` names them.

    Args:
        read: see :class:`diffsal.data.datasets.ImageDataset`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("L", (3, 2)).save(Path(folder, "a.png"))
        ...     Files().pixels(Sample(Path(folder, "a.png"), 0)).shape
        (2, 3, 3)
    """

    def __init__(self, read: Callable[[Sample, Preprocessing], Pixels] = decode) -> None:
        self._read = read

    def items(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> ImageDataset:
        return ImageDataset(samples, preprocessing, read=self._read)

    def pixels(self, sample: Sample) -> NDArray[np.uint8]:
        return read_image(sample.path)


@dataclass(frozen=True)
class Held:
    """A data set in memory with an index of it.

    Attributes:
        index: samples whose paths are no files but their positions' names.
        source: what brings them to tensors.
        preprocessing: of images; where items are tensors, how these were made of pixels.
    """

    index: Index
    source: Source
    preprocessing: Preprocessing

    @property
    def notes(self) -> list[str]:
        """What is odd about the data, or was passed over; one line each."""
        of_files = oddities(self.index.samples) if self.source is FILES else []
        return [*self.index.notes, *of_files]


def hold(data: Any, *, classes: Sequence[str] | None, preprocessing: Preprocessing | None) -> Held:
    """Make an index of what is in memory.

    An item is an image, a label and perhaps a human map: a tuple, or a mapping with the keys
    ``image`` (``pixel_values``, ``img``), ``label`` (``labels``) and ``map`` (``mask``). An image
    is a path, an image of Pillow's or a uint8 array, of which ``preprocessing`` makes the model's
    input; or a float tensor (C, H, W), which is the model's input as it is. A map is an array
    (H, W), a tensor or an image of Pillow's, brighter where it matters.

    Args:
        data: a ``Dataset``, or another sequence of items, which is asked for them again and again;
            or a ``DataLoader``, whose batches are read once and kept in memory.
        classes: names in the order of the labels; ``None``: ``data.classes`` or what the feature
            ``label`` of a Hugging Face data set names, else ``class 0`` and so on.
        preprocessing: of images to the model's input; of tensors, their mean and std, so that they
            can be shown; ``None`` where tensors lie in [0, 1].

    Raises:
        DiffsalError: no items, an item of another form, or that changes when it is asked for again
            (of the first eight), a label that is no class, or of classes in another order, images
            without ``preprocessing``, tensors of several shapes, or tensors that are not what
            ``preprocessing`` would have made.

    Example:
        >>> held = hold([(torch.rand(1, 8, 8), 0), (torch.rand(1, 8, 8), 1)], classes=None,
        ...             preprocessing=None)
        >>> held.index.classes, held.preprocessing.size
        (('class 0', 'class 1'), (8, 8))
    """
    name = type(data).__name__
    items = _batches_apart(data) if isinstance(data, DataLoader) else data
    if not hasattr(items, "__getitem__") or not hasattr(items, "__len__"):
        raise DiffsalError(
            f"the data are a {name}: pass a Dataset, a DataLoader, or a list of (image, label)"
        )
    if len(items) == 0:
        raise DiffsalError(f"the {name} is empty: pass images and labels of each class")
    own = tuple(_own_names(data) or ())
    names = tuple(classes or own)
    is_other_order = names != own and sorted(names) == sorted(own)
    labels, mapped, tensors = [], [], _Tensors(preprocessing)
    for position in range(len(items)):
        image, label, human = _parts(items[position], position)
        if human is not None:
            mapped.append(position)
        if is_other_order and not isinstance(label, str):
            raise DiffsalError(
                f"the {name} calls its classes {', '.join(own)}, the model's are "
                f"{', '.join(names)}: its labels would be read in the wrong order; "
                "yield names, or the model's labels"
            )
        labels.append(_label(label, names, position))
        tensors.look(image, position)
        if position < _ASKED_TWICE:
            _check_steady(image, _parts(items[position], position)[0], position)
    names = names or tuple(f"class {label}" for label in range(max(2, max(labels) + 1)))
    samples = tuple(
        Sample(Path(f"image {position}"), label) for position, label in enumerate(labels)
    )
    if tensors.shape is None and preprocessing is None:
        raise DiffsalError(
            f"the {name} yields images: pass preprocessing=, which makes tensors of them"
        )
    known = tensors.preprocessing()
    source = _InMemory(items, tensors.shape, known)
    notes = oddities_in_memory([samples[position] for position in mapped], source.sizes)
    return Held(Index(Path(name), names, samples, tuple(notes)), source, known)


def hold_any(
    data: Any,
    *,
    classes: Sequence[str] | None,
    preprocessing: Preprocessing | None,
    known: Sequence[str] | None = None,
) -> Held:
    """As :func:`hold`, and of an index or the path of one, too, whose images are files.

    Args:
        data: see there.
        classes: as the user names them; an index that was read with others is refused.
        preprocessing: see there; of an index it is needed.
        known: what the model calls them, where the user does not.

    Raises:
        DiffsalError: see there and :func:`diffsal.data.index.read_index`; an index without
            ``preprocessing``.

    Example:
        >>> hold_any("where/nothing/is", classes=None, preprocessing=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: where/nothing/is: ...
    """
    names = classes or known
    index = read_index(data, classes=names) if isinstance(data, str | Path) else data
    if not isinstance(index, Index):
        return hold(data, classes=names, preprocessing=preprocessing)
    if classes is not None and tuple(classes) != index.classes:
        raise DiffsalError(
            f"{index.source}: its classes were read as {', '.join(index.classes)}, asked for are "
            f"{', '.join(classes)}: pass its path, or read it with these"
        )
    if preprocessing is None:
        raise DiffsalError(f"{index.source}: pass preprocessing=, from images to the model's input")
    return Held(index, FILES, preprocessing)


class _Tensors:
    """Of the images seen so far: are they tensors, and as ``preprocessing`` would make them?"""

    def __init__(self, preprocessing: Preprocessing | None) -> None:
        self.given = preprocessing
        self.shape: torch.Size | None = None
        self.first = True

    def look(self, image: Any, position: int) -> None:
        is_tensor = isinstance(image, Tensor) and image.is_floating_point()
        if self.first:
            self.first, self.shape = False, image.shape if is_tensor else None
        shape = image.shape if is_tensor else None
        if shape != self.shape:
            raise DiffsalError(
                f"item {position}: its image has the shape {_told(shape)}, the first "
                f"{_told(self.shape)}: yield all of them alike"
            )
        if shape is not None:
            self._check(image, position)

    def _check(self, image: Tensor, position: int) -> None:
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise DiffsalError(
                f"item {position}: its image has the shape {_told(image.shape)}: pass (1, H, W) or "
                "(3, H, W)"
            )
        pixels = unnormalized(image, self.preprocessing())
        low, high = float(pixels.min()), float(pixels.max())
        if not -_SLACK <= low <= high <= 1 + _SLACK:
            remedy = "pass preprocessing= with" if self.given is None else "correct preprocessing:"
            raise DiffsalError(
                f"item {position}: its pixels reach from {low:.3g} to {high:.3g} where 0 to 1 is "
                f"right; {remedy} the mean and std that they were normalised with"
            )

    def preprocessing(self) -> Preprocessing:
        """What was given, or plain [0, 1]; of the tensors' size."""
        if self.shape is None:
            assert self.given is not None
            return self.given
        channels, height, width = self.shape
        base = self.given or Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
        return replace(base, size=(height, width), resize="squash", channels=channels)


def unnormalized(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A network's input (C, H, W) on the scale of pixels, [0, 1].

    Example:
        >>> grey = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> unnormalized(torch.ones(3, 1, 1), grey).flatten().tolist()
        [0.75, 0.75, 0.75]
    """
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    return image.detach().cpu().float() * std + mean


def as_shown(image: Tensor, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """(H, W, 3): the pixels of a network's input (C, H, W).

    Example:
        >>> as_shown(torch.zeros(1, 2, 2), Preprocessing(channels=1)).shape
        (2, 2, 3)
    """
    levels = (unnormalized(image, preprocessing).clamp(0, 1) * 255).round().byte()
    return levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


class _InMemory:
    """A source whose samples are items of a data set, in its order."""

    def __init__(self, items: Any, shape: torch.Size | None, made: Preprocessing) -> None:
        self._items, self._made = items, made
        self._are_tensors = shape is not None

    def items(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> ImageDataset:
        if self._are_tensors:
            return InputDataset(samples, preprocessing, read=self._read_input)
        return ImageDataset(samples, preprocessing, read=self._read)

    def pixels(self, sample: Sample) -> NDArray[np.uint8]:
        image = self.parts(sample)[0]
        return as_shown(image, self._made) if self._are_tensors else as_pixels(_array(image))

    def sizes(self, sample: Sample) -> tuple[Sequence[int], NDArray[np.float32]]:
        """The image's height and width, and its human map as it was given."""
        image, _, given = self.parts(sample)
        size = image.shape[1:] if self._are_tensors else as_pixels(_array(image)).shape[:2]
        return size, _human_map(given, sample).numpy()

    def parts(self, sample: Sample) -> tuple[Any, Any, Any]:
        position = int(sample.path.name.removeprefix("image "))
        return _parts(self._items[position], position)

    def _read(self, sample: Sample, preprocessing: Preprocessing) -> Pixels:
        image, _, given = self.parts(sample)
        pixels = as_pixels(_array(image))
        human = None
        if given is not None:
            human = preprocessing.resized(_spanning(_human_map(given, sample), pixels.shape[:2]))
        return preprocessing.resized(pixels), human

    def _read_input(self, sample: Sample, _: Preprocessing) -> Pixels:
        image, _, given = self.parts(sample)
        human = None if given is None else _spanning(_human_map(given, sample), image.shape[1:])
        return image.detach().cpu().float().numpy(), human


def _batches_apart(loader: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The items of a loader's batches."""
    items: list[tuple[Any, ...]] = []
    for number, batch in enumerate(loader):
        images, labels, maps = _parts(batch, number)
        rows = zip(images, labels, [None] * len(images) if maps is None else maps, strict=True)
        items += rows
    return items


def _parts(item: Any, position: int) -> tuple[Any, Any, Any]:
    """Image, label and map of an item or a batch; ``None`` for a map that is not there."""
    if isinstance(item, Mapping):
        found = [next((item[key] for key in keys if key in item), None) for keys in _KEYS]
        if found[0] is not None and found[1] is not None:
            return cast(tuple[Any, Any, Any], tuple(found))
    elif isinstance(item, tuple | list) and len(item) in (2, 3):
        return item[0], item[1], item[2] if len(item) == 3 else None
    keys = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
    raise DiffsalError(
        f"item {position} is a {type(item).__name__}{keys}: yield (image, label), (image, label, "
        "map), or a mapping with the keys image, label and perhaps map"
    )


def _check_steady(image: Any, again: Any, position: int) -> None:
    if isinstance(image, str | Path):
        return
    first, second = (
        one.detach().cpu().numpy() if isinstance(one, Tensor) else np.asarray(one)
        for one in (image, again)
    )
    if not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
        raise DiffsalError(
            f"item {position}: is another image whenever it is asked for; pass the data without "
            "random augmentation"
        )


def _label(label: Any, names: Sequence[str], position: int) -> int:
    if isinstance(label, str):
        found = class_position(label, names) if names else None
    elif isinstance(label, int | np.integer) or getattr(label, "shape", None) == ():
        found = int(label) if float(label).is_integer() else None
    else:
        found = None
    if found is None or found < 0 or (names and found >= len(names)):
        among = f"one of {', '.join(names)}, or its position" if names else "a whole number from 0"
        raise DiffsalError(f"item {position}: the label {label!r} is no class; yield {among}")
    return found


def _own_names(data: Any) -> Sequence[str] | None:
    """What a data set of torchvision's or Hugging Face's calls its classes."""
    if isinstance(data, DataLoader):
        data = data.dataset
    features = getattr(data, "features", None)
    label = features.get("label") if isinstance(features, Mapping) else None
    names = getattr(label, "names", None) or getattr(data, "classes", None)
    is_known = isinstance(names, tuple | list) and all(isinstance(one, str) for one in names)
    return names if is_known else None


def _array(image: Any) -> Any:
    """A tensor (C, H, W) of uint8 as an array (H, W, C); others as they are."""
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        return image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return image


def _human_map(given: Any, sample: Sample) -> Tensor:
    """(h, w), in [0, 1]."""
    if isinstance(given, Image.Image):
        given = np.asarray(given.convert("L"))
    values = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    if values.dtype == torch.uint8:
        values = values.float() / 255
    values = values.detach().float().squeeze()
    if values.ndim != 2 or not bool(((values >= 0) & (values <= 1)).all()):
        raise DiffsalError(
            f"{sample.path}: its human map has the shape {_told(values.shape)} or values beyond 0 "
            "to 1; yield (H, W), in [0, 1] or uint8"
        )
    return values


def _spanning(values: Tensor, size: Sequence[int]) -> NDArray[np.float32]:
    """(H, W): the map over the whole image."""
    if values.shape != torch.Size(size):
        values = F.interpolate(
            values[None, None], tuple(size), mode="bilinear", align_corners=False, antialias=True
        )[0, 0].clamp(0, 1)
    found: NDArray[np.float32] = values.contiguous().numpy()
    return found


def _told(shape: Sequence[int] | None) -> str:
    return "of a picture" if shape is None else f"({', '.join(map(str, shape))})"


FILES = Files()
