"""Images, labels and human maps, ready for a network."""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from diffsal.data.images import read_image, read_map
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError, one_line
from diffsal.system.files import replacing, reserve

Item: TypeAlias = tuple[Tensor, int, Tensor, int]
"""Image, label, human map and position: see :class:`ImageDataset`."""
Pixels: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.float32] | None]
Augmentation: TypeAlias = Callable[..., Any]

AUGMENTATIONS: dict[str, type[v2.Transform]] = {
    "horizontal-flip": v2.RandomHorizontalFlip,
    "vertical-flip": v2.RandomVerticalFlip,
}
"""Augmentations that can be asked for by name; each strikes half of the images."""


def decode(sample: Sample, preprocessing: Preprocessing) -> Pixels:
    """Read a sample's image and human map, at the size and in the geometry of the network's input.

    A map of another size than its image is taken to span the whole image.

    Returns:
        (H, W, 3) uint8, and (H, W) float32 in [0, 1] or ``None``.

    Raises:
        DiffsalError: see :func:`diffsal.data.images.read_image`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(Path(folder, "a.png"))
        ...     sample, preprocessing = Sample(Path(folder, "a.png"), 1), Preprocessing(size=(8, 8))
        ...     decode(sample, preprocessing)[0].shape
        (8, 8, 3)
    """
    image = read_image(sample.path)
    human_map = None
    if sample.map is not None:
        human_map = read_map(sample.map)
        if human_map.shape != image.shape[:2]:
            size = image.shape[1], image.shape[0]
            resized = Image.fromarray(human_map).resize(size, Image.Resampling.BILINEAR)
            human_map = np.asarray(resized)
        human_map = preprocessing.resized(human_map)
    return preprocessing.resized(image), human_map


class DecodedImages:
    """Decoded samples in two ``.npy`` files, which processes of one machine share in memory.

    Called in the place of :func:`decode`, for the same result without decoding. The files are made
    on first use, whole or not at all, and found again as long as no image or map file changes.

    Args:
        samples: all that will be asked for; those of several splits and jobs, say.
        preprocessing: its geometry is what is stored.
        folder: of the files.

    Raises:
        DiffsalError: see :func:`decode`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(Path(folder, "a.png"))
        ...     sample, preprocessing = Sample(Path(folder, "a.png"), 1), Preprocessing(size=(8, 8))
        ...     DecodedImages([sample], preprocessing, folder)(sample, preprocessing)[0].shape
        (8, 8, 3)
    """

    def __init__(
        self, samples: Sequence[Sample], preprocessing: Preprocessing, folder: str | Path
    ) -> None:
        key = hashlib.sha256(_fingerprint(samples, preprocessing).encode()).hexdigest()[:16]
        self._files = (Path(folder, f"{key}.images.npy"), Path(folder, f"{key}.maps.npy"))
        self._image_rows = _rows(samples)
        self._map_rows = _rows(sample for sample in samples if sample.map is not None)
        if not all(file.exists() for file in self._files):
            self._write(samples, preprocessing)

    def __call__(self, sample: Sample, preprocessing: Preprocessing) -> Pixels:
        images, maps = map(_mapped, self._files)
        image = images[self._image_rows[sample.path]]
        return image, None if sample.map is None else maps[self._map_rows[sample.path]]

    def _write(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> None:
        with replacing(self._files[0]) as image_scratch, replacing(self._files[1]) as map_scratch:
            height, width = preprocessing.size
            images = _room(image_scratch, np.uint8, (len(self._image_rows), height, width, 3))
            maps = _room(map_scratch, np.float32, (len(self._map_rows), height, width))

            def store(sample: Sample) -> None:
                image, human_map = decode(sample, preprocessing)
                images[self._image_rows[sample.path]] = image
                if human_map is not None:
                    maps[self._map_rows[sample.path]] = human_map

            with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
                stored = pool.map(store, samples)
                deque(tqdm(stored, "decoding", len(samples), unit="image", disable=None), maxlen=0)


def _room(scratch: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """A file of this content to fill, of which every byte has its place on the disk."""
    try:
        array = np.lib.format.open_memmap(scratch, "w+", dtype, shape)
        reserve(scratch)
    except (OSError, ValueError) as error:
        size = math.prod(shape) * np.dtype(dtype).itemsize / 1e6
        raise DiffsalError(
            f"{scratch.parent}: no room for {size:.0f} MB of decoded images "
            f"({one_line(error)}); free some or name another folder"
        ) from error
    return array


def _rows(samples: Iterable[Sample]) -> dict[Path, int]:
    return {path: row for row, path in enumerate(dict.fromkeys(one.path for one in samples))}


@lru_cache(maxsize=16)
def _mapped(file: Path) -> NDArray[Any]:
    """Opened once in every process: a memory map that is pickled would be copied."""
    array: NDArray[Any] = np.load(file, mmap_mode="r")
    return array


def _fingerprint(samples: Sequence[Sample], preprocessing: Preprocessing) -> str:
    files = [path for sample in samples for path in (sample.path, sample.map) if path]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([states, preprocessing.size, preprocessing.resize])


class ImageDataset(Dataset[Item]):
    """Images, labels and human maps, ready for a network.

    ``dataset[position]`` is the image (C, H, W) float32, the label, the human map (H, W) float32 in
    the image's geometry, all NaN where there is none, and the position. ``dataset[position, seed]``
    draws the augmentation from ``seed``, so that it is the same in whichever process, and leaves
    torch's own generator alone.

    Args:
        samples: see :class:`Sample`.
        preprocessing: from pixels to the network's input.
        augment: a transform of ``torchvision.transforms.v2``; it is called with a
            ``tv_tensors.Image`` (3, H, W) uint8 and, if there is a map, a ``tv_tensors.Mask`` (H,
            W) float32, which moves with the image. ``None``, as in the paper: no augmentation.
        read: what brings samples to pixels; :class:`DecodedImages` spares the decoding.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(Path(folder, "a.png"))
        ...     sample, preprocessing = Sample(Path(folder, "a.png"), 1), Preprocessing(size=(8, 8))
        ...     image, label, human_map, position = ImageDataset([sample], preprocessing)[0]
        >>> image.shape, label, bool(human_map.isnan().all()), position
        (torch.Size([3, 8, 8]), 1, True, 0)
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocessing: Preprocessing,
        augment: Augmentation | None = None,
        read: Callable[[Sample, Preprocessing], Pixels] = decode,
    ) -> None:
        self.samples = tuple(samples)
        self.preprocessing = preprocessing
        self.augment = augment
        self.read = read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int | None]) -> Item:
        pixels, label, human_map, position = self.pixels(key)
        return self.normalized(pixels), label, human_map, position

    def normalized(self, pixels: Tensor) -> Tensor:
        """What :meth:`pixels` gives, or a batch of it, as the network's input."""
        return self.preprocessing.normalized(pixels)

    def pixels(self, key: int | tuple[int, int | None]) -> Item:
        """As an item, before its image is normalised: (C, H, W) uint8, a quarter of the bytes."""
        position, seed = key if isinstance(key, tuple) else (key, None)
        sample = self.samples[position]
        pixels, human_map = self.read(sample, self.preprocessing)
        # Copies, since what is mapped from a file must not be written to.
        planes = np.array(pixels.transpose(2, 0, 1), order="C")
        views: list[Tensor] = [tv_tensors.Image(torch.from_numpy(planes))]
        if human_map is not None:
            views.append(tv_tensors.Mask(torch.from_numpy(human_map.copy())))
        if self.augment is not None:
            views = self._augmented(views, seed)
        image, *moved_maps = (view.as_subclass(Tensor) for view in views)
        image = self.preprocessing.in_channels(image)
        missing = torch.full(image.shape[1:], torch.nan)
        return image, sample.label, moved_maps[0] if moved_maps else missing, position

    def _augmented(self, views: list[Tensor], seed: int | None) -> list[Tensor]:
        assert self.augment is not None
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            moved = self.augment(*views)
        return list(moved) if isinstance(moved, tuple | list) else [moved]


class InputDataset(ImageDataset):
    """Items whose images are a network's inputs already, and are never resized or augmented.

    ``read`` gives (C, H, W) float32 in the place of pixels, and the map as elsewhere.

    Example:
        >>> read = lambda sample, preprocessing: (np.full((1, 2, 2), 0.5, np.float32), None)
        >>> dataset = InputDataset([Sample(Path("image 0"), 1)], Preprocessing((2, 2)), read=read)
        >>> dataset[0][0].flatten()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    def pixels(self, key: int | tuple[int, int | None]) -> Item:
        """As an item, which needs no normalising."""
        position = key[0] if isinstance(key, tuple) else key
        sample = self.samples[position]
        values, given = self.read(sample, self.preprocessing)
        image = torch.tensor(values)
        human = torch.full(image.shape[1:], torch.nan) if given is None else torch.tensor(given)
        return image, sample.label, human, position

    def normalized(self, pixels: Tensor) -> Tensor:
        """They are inputs already."""
        return pixels


class Unnormalized(Dataset[Item]):
    """A data set's items with images (C, H, W) uint8: what they weigh between processes and on the
    way to a GPU is a quarter, and :meth:`ImageDataset.normalized` is for whole batches there.

    Example:
        >>> grey = lambda sample, preprocessing: (np.full((8, 8, 3), 51, np.uint8), None)
        >>> dataset = ImageDataset([Sample(Path("a.png"), 1)], Preprocessing((8, 8)), read=grey)
        >>> image, *_ = Unnormalized(dataset)[0]
        >>> torch.equal(dataset.preprocessing.normalized(image), dataset[0][0])
        True
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int | None]) -> Item:
        return self.dataset.pixels(key)
