"""From an index of images, labels and human maps to splits and a data set.

Three layouts are read: a CSV with the header ``path,label[,map][,subset][,group][,split]``, a
folder of class folders, and the header-less ``split,class,path`` of the CYBORG scripts. All become
an :class:`Index`; splits are made from it, and a :class:`ImageDataset` reads what they hold.
"""

import csv
import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from diffsal.errors import DiffsalError
from diffsal.files import replacing
from diffsal.images import IMAGE_SUFFIXES, Preprocessing, find_images, read_image, read_map

__all__ = [
    "AUGMENTATIONS",
    "DecodedImages",
    "ImageDataset",
    "Index",
    "Item",
    "Sample",
    "Split",
    "decode",
    "hold_out",
    "leave_out",
    "read_index",
    "with_test",
    "with_validation",
]

Split: TypeAlias = Literal["", "train", "val", "test"]
Item: TypeAlias = tuple[Tensor, int, Tensor, int]
"""Image, label, human map and position: see :class:`ImageDataset`."""
Pixels: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.float32] | None]
Augmentation: TypeAlias = Callable[..., Any]

AUGMENTATIONS: dict[str, type[v2.Transform]] = {
    "horizontal-flip": v2.RandomHorizontalFlip,
    "vertical-flip": v2.RandomVerticalFlip,
}
"""Augmentations that can be asked for by name; each strikes half of the images."""

_REQUIRED = ("path", "label")
_COLUMNS = (*_REQUIRED, "map", "subset", "group", "split")
_SPLITS = get_args(Split)[1:]
_SPLIT_FOLDERS = (*_SPLITS, "valid", "validation")
# A share is held out as some of at most this many folds.
_MAX_FOLDS = 20


@dataclass(frozen=True)
class Sample:
    """One image of an index.

    Attributes:
        path: of the image.
        label: position of its class in :attr:`Index.classes`.
        map: of the human salience map or mask; ``None`` where there is none.
        subset: what it belongs to within its class, such as an attack type; ``""``: none.
        group: samples of one group (a person, a part) never come apart; ``""``: a group of its own.
        split: ``"train"``, ``"val"``, ``"test"``, or ``""`` where none is named.
    """

    path: Path
    label: int
    map: Path | None = None
    subset: str = ""
    group: str = ""
    split: Split = ""


@dataclass(frozen=True)
class Index:
    """Samples and the names of their classes.

    Attributes:
        source: the file or folder that it was read from, for messages.
        classes: names; a sample's label is a position here.
        samples: in the order of the file, or sorted by class and path.
    """

    source: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def split(self, name: Split) -> tuple[Sample, ...]:
        """The samples of one split."""
        return tuple(sample for sample in self.samples if sample.split == name)

    def relative(self, path: Path) -> str:
        """A path as seen from the index, with slashes: the same on whatever machine it lies."""
        root = self.source if self.source.is_dir() else self.source.parent
        return Path(os.path.relpath(path, root)).as_posix()


@dataclass(frozen=True)
class _Row:
    """A line of an index before it is checked; ``key`` is what a map's name is compared to."""

    place: str
    path: Path
    key: str
    label: str
    map: str = ""
    subset: str = ""
    group: str = ""
    split: str = ""


# ------------------------------------------------------------------------------------------ index


def read_index(
    path: str | Path,
    *,
    maps: str | Path | None = None,
    classes: Sequence[str] | None = None,
) -> Index:
    """Read and check an index.

    - CSV with a header: the columns ``path,label[,map][,subset][,group][,split]`` in any order,
      and no others; paths are relative to the file. ``split`` is train, val or test, and named
      for all samples or for none.
    - A folder: each of its folders is a class, with images in it at any depth.
    - CSV without a header: ``split,class,path`` (the CYBORG scripts), paths relative to the file.

    Args:
        path: of the CSV or the folder.
        maps: a folder of human maps, for an index without a ``map`` column. A map has its image's
            name with any suffix: beneath a class folder of the same name for a folder of class
            folders, directly in ``maps`` for a CSV. An image without such a file has no map.
        classes: names in the order of the model's outputs; a label is one of them, or a position
            among them. ``None``: the labels found, sorted (as numbers where all are whole numbers).

    Raises:
        DiffsalError: the index cannot be read or is empty; names the file and the line of a column
            that is missing or unknown, a class or split that is unknown, an image or map that is
            not there, or a path that is named twice. One class only, where ``classes`` is not
            given.
    """
    path = Path(path)
    rows = list(_class_folders(path) if path.is_dir() else _csv_rows(path))
    if not rows:
        raise DiffsalError(f"{path}: the index is empty; list at least one image of each class")
    if maps is not None:
        rows = _with_maps(rows, Path(maps))
    names = tuple(classes) if classes is not None else _class_names(path, rows)
    unsplit = [row.place for row in rows if not row.split]
    if 0 < len(unsplit) < len(rows):
        raise DiffsalError(f"{unsplit[0]}: has no split, others have; name all of them or none")
    _check_files(rows)
    return Index(path, names, tuple(_sample(row, names) for row in rows))


def _csv_rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [
                (f"{path}, line {reader.line_num}", [value.strip() for value in line])
                for line in reader
                if line
            ]
    except OSError as error:
        raise DiffsalError(f"{path}: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DiffsalError(f"{path}: is no CSV in UTF-8 ({error}); export it again") from error
    columns = list(_REQUIRED)
    if lines:
        first = lines[0][1]
        cyborg = len(first) == 3 and first[0] in _SPLITS
        columns = ["split", "label", "path"] if cyborg else _header(*lines.pop(0))
    for place, values in lines:
        if len(values) != len(columns):
            raise DiffsalError(
                f"{place}: has {len(values)} fields, not {len(columns)} ({','.join(columns)}); "
                "complete it, and quote what contains a comma"
            )
        row = dict(zip(columns, values, strict=True))
        for name in _REQUIRED:
            if not row[name]:
                raise DiffsalError(f"{place}: the {name} is empty; fill it in or remove the line")
        image = path.parent / row.pop("path")
        if row.get("map"):
            row["map"] = str(path.parent / row["map"])
        yield _Row(place, image, image.stem, **row)


def _header(place: str, columns: list[str]) -> list[str]:
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise DiffsalError(
            f"{place}: the column {missing[0]!r} is missing from the header "
            f"{','.join(columns)!r}; it needs path,label"
        )
    # A misspelt group would go unnoticed and leak from training into validation.
    wrong = [name for name in columns if name not in _COLUMNS or columns.count(name) > 1]
    if wrong:
        raise DiffsalError(
            f"{place}: the column {wrong[0]!r} is unknown or there twice; "
            f"the columns are {','.join(_COLUMNS)}, remove others"
        )
    return columns


def _class_folders(root: Path) -> Iterator[_Row]:
    folders = [one for one in sorted(root.iterdir()) if one.is_dir() and one.name[0] != "."]
    if folders and all(folder.name.lower() in _SPLIT_FOLDERS for folder in folders):
        raise DiffsalError(
            f"{root}: its folders are splits, not classes; pass one of them, or a CSV with the "
            "columns path,label,split"
        )
    for folder in folders:
        for image in find_images([folder], recursive=True):
            yield _Row(str(image), image, _key(root, image), folder.name)


def _key(root: Path, path: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _with_maps(rows: Sequence[_Row], folder: Path) -> list[_Row]:
    """Give each row the map of its name."""
    if any(row.map for row in rows):
        raise DiffsalError(f"{rows[0].place}: the index names maps itself; leave out {folder}")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(_key(folder, path), path)
        if other is not path:
            raise DiffsalError(f"{path}: {other.name} beside it has the same name; remove one")
    users = Counter(row.key for row in rows)
    for row in rows:
        if row.key in found and users[row.key] > 1:
            raise DiffsalError(
                f"{row.place}: another image is called {row.key!r} too, so its map in {folder} is "
                "ambiguous; name maps in a map column"
            )
    if not found.keys() & users.keys():
        raise DiffsalError(
            f"{folder}: no map here has the name of an image, as {rows[0].key!r}; check the folder"
        )
    return [replace(row, map=str(found.get(row.key, ""))) for row in rows]


def _class_names(path: Path, rows: Sequence[_Row]) -> tuple[str, ...]:
    names = {row.label for row in rows}
    if len(names) == 1:
        raise DiffsalError(
            f"{path}: all samples are of one class, {rows[0].label!r}; at least two are needed"
        )
    return tuple(sorted(names, key=int if all(map(str.isdecimal, names)) else None))


def _check_files(rows: Sequence[_Row]) -> None:
    places: dict[Path, str] = {}
    for row in rows:
        if not row.path.is_file():
            raise DiffsalError(f"{row.place}: there is no image {row.path}; correct or remove it")
        if row.map and not Path(row.map).is_file():
            raise DiffsalError(f"{row.place}: there is no map {row.map}; correct it or leave empty")
        other = places.setdefault(row.path.resolve(), row.place)
        if other != row.place:
            raise DiffsalError(f"{row.place}: {row.path} is named before, in {other}; remove one")


def _sample(row: _Row, classes: tuple[str, ...]) -> Sample:
    split: Split | None = next((name for name in get_args(Split) if name == row.split), None)
    if split is None:
        raise DiffsalError(
            f"{row.place}: the split {row.split!r} is unknown; write {', '.join(_SPLITS)}"
        )
    return Sample(
        path=row.path,
        label=_label(row, classes),
        map=Path(row.map) if row.map else None,
        subset=row.subset,
        group=row.group,
        split=split,
    )


def _label(row: _Row, classes: tuple[str, ...]) -> int:
    if row.label in classes:
        return classes.index(row.label)
    if row.label.isdecimal() and int(row.label) < len(classes):
        return int(row.label)
    raise DiffsalError(
        f"{row.place}: the class {row.label!r} is unknown; the classes are {', '.join(classes)}"
    )


# ----------------------------------------------------------------------------------------- splits


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """Choose a share of samples: reproducible, stratified by label, groups whole.

    Args:
        samples: in an order that is the same each time.
        fraction: of the samples, from 0.05 to 0.95; met as well as twentieths and whole groups
            allow.
        seed: of the choice.

    Returns:
        Those chosen, in the order of ``samples``.

    Raises:
        DiffsalError: another fraction, or too few samples or groups.
    """
    if not 1 / _MAX_FOLDS <= fraction <= 1 - 1 / _MAX_FOLDS:
        raise DiffsalError(f"a fraction of {fraction} cannot be held out; choose 0.05 to 0.95")
    share = Fraction(fraction).limit_denominator(_MAX_FOLDS)
    labels = [sample.label for sample in samples]
    groups = None
    if any(sample.group for sample in samples):
        groups = [sample.group or f"\0{position}" for position, sample in enumerate(samples)]
    least = min([*Counter(labels).values(), len(set(groups or range(len(samples))))])
    if least < share.denominator:
        raise DiffsalError(
            f"to hold out {fraction} of the samples takes {share.denominator} of each class and as "
            f"many groups, and there are {least}; add samples, or name splits in the index"
        )
    # Without groups both would do, but the one that knows them takes time squared.
    folds = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        share.denominator, shuffle=True, random_state=seed
    )
    parts = [part for _, part in folds.split(labels, labels, groups)]
    return [samples[position] for position in np.sort(np.concatenate(parts[: share.numerator]))]


def with_validation(index: Index, fraction: float = 0.2, seed: int = 0) -> Index:
    """Name the split of every sample; the index's own word goes before.

    Where samples are marked ``val``, nothing changes. Else a ``fraction`` of the training samples
    (all samples, where the index names no splits) is marked ``val``.

    Raises:
        DiffsalError: see :func:`hold_out`; the index names splits, but no ``train``.
    """
    if index.split("val"):
        return index
    candidates = index.split("train") or index.split("")
    if not candidates:
        raise DiffsalError(f"{index.source}: no sample has the split train; mark some")
    held = {sample.path for sample in hold_out(candidates, fraction, seed)}
    samples = [
        replace(sample, split="val" if sample.path in held else sample.split or "train")
        for sample in index.samples
    ]
    return replace(index, samples=tuple(samples))


def with_test(index: Index, fraction: float = 0.2, seed: int = 0) -> Index:
    """Mark a ``fraction`` of the samples ``test``, the others ``train``; an index's own word goes
    before.

    Raises:
        DiffsalError: the index names splits, but no ``test``; see :func:`hold_out`.
    """
    if index.split("test"):
        return index
    if len(index.split("")) < len(index.samples):
        raise DiffsalError(f"{index.source}: no sample has the split test; mark some")
    held = {sample.path for sample in hold_out(index.samples, fraction, seed)}
    samples = [
        replace(sample, split="test" if sample.path in held else "train")
        for sample in index.samples
    ]
    return replace(index, samples=tuple(samples))


def leave_out(index: Index, subset: str, fraction: float = 0.2, seed: int = 0) -> Index:
    """Train without one subset, and test on it against the normals.

    The normals are the samples without a subset. A ``fraction`` of them, chosen by ``seed`` and
    the normals alone and therefore the same for every subset, is tested with the subset. Where the
    index names splits, the normals of its ``test`` are, and of the subset those marked ``test``, if
    there are any. What remains is for training, unless it is of the subset, shares a group with a
    tested sample, or is marked ``test`` itself.

    Returns:
        An index whose samples have the splits ``train`` (or the index's own ``val``) and ``test``.

    Raises:
        DiffsalError: there is no such subset, or there are no normals; see :func:`hold_out`.
    """
    known = sorted({sample.subset for sample in index.samples} - {""})
    if subset not in known:
        raise DiffsalError(
            f"{index.source}: there is no subset {subset!r}; there are: {', '.join(known) or '-'}"
        )
    normals = [sample for sample in index.samples if not sample.subset]
    held = [sample for sample in normals if sample.split == "test"]
    if normals and not any(sample.split for sample in normals):
        held = hold_out(normals, fraction, seed)
    if not held:
        raise DiffsalError(
            f"{index.source}: no samples without a subset to test {subset!r} against; leave the "
            "subset of normals empty, and mark some as test where splits are named"
        )
    left_out = [sample for sample in index.samples if sample.subset == subset]
    marked = [sample for sample in left_out if sample.split == "test"]
    tested = {sample.path for sample in (*held, *(marked or left_out))}
    groups = {sample.group for sample in index.samples if sample.path in tested} - {""}
    samples = [
        replace(sample, split="test" if sample.path in tested else sample.split or "train")
        for sample in index.samples
        if sample.path in tested
        or (sample.subset != subset and sample.split != "test" and sample.group not in groups)
    ]
    return replace(index, samples=tuple(samples))


# ----------------------------------------------------------------------------------------- images


def decode(sample: Sample, preprocessing: Preprocessing) -> Pixels:
    """Read a sample's image and human map, at the size and in the geometry of the network's input.

    A map of another size than its image is taken to span the whole image.

    Returns:
        (H, W, 3) uint8, and (H, W) float32 in [0, 1] or ``None``.

    Raises:
        DiffsalError: see :func:`diffsal.images.read_image`.
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
            images, maps = (
                np.lib.format.open_memmap(scratch, "w+", dtype, shape)
                for scratch, dtype, shape in (
                    (image_scratch, np.uint8, (len(self._image_rows), height, width, 3)),
                    (map_scratch, np.float32, (len(self._map_rows), height, width)),
                )
            )

            def store(sample: Sample) -> None:
                image, human_map = decode(sample, preprocessing)
                images[self._image_rows[sample.path]] = image
                if human_map is not None:
                    maps[self._map_rows[sample.path]] = human_map

            with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
                stored = pool.map(store, samples)
                deque(tqdm(stored, "decoding", len(samples), unit="image", disable=None), maxlen=0)


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

    ``dataset[position]`` is the image (3, H, W) float32, the label, the human map (H, W) float32 in
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
        position, seed = key if isinstance(key, tuple) else (key, None)
        sample = self.samples[position]
        pixels, human_map = self.read(sample, self.preprocessing)
        # Copies, since what is mapped from a file must not be written to.
        views: list[Tensor] = [tv_tensors.Image(torch.from_numpy(pixels.copy()).permute(2, 0, 1))]
        if human_map is not None:
            views.append(tv_tensors.Mask(torch.from_numpy(human_map.copy())))
        if self.augment is not None:
            views = self._augmented(views, seed)
        image, *moved_maps = (view.as_subclass(Tensor) for view in views)
        image = image.to(torch.float32).div_(255)  # bit for bit what Preprocessing makes
        image = F.normalize(image, list(self.preprocessing.mean), list(self.preprocessing.std))
        missing = image.new_full(image.shape[1:], torch.nan)
        return image, sample.label, moved_maps[0] if moved_maps else missing, position

    def _augmented(self, views: list[Tensor], seed: int | None) -> list[Tensor]:
        assert self.augment is not None
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            moved = self.augment(*views)
        return list(moved) if isinstance(moved, tuple | list) else [moved]
