"""Which images there are: labels, human maps, subsets, groups and splits, from a CSV or folders."""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from diffsal.data.images import IMAGE_SUFFIXES, find_images
from diffsal.errors import DiffsalError

Split: TypeAlias = Literal["", "train", "val", "test"]
_REQUIRED = ("path", "label")
_COLUMNS = (*_REQUIRED, "map", "subset", "group", "split")
_SPLITS = get_args(Split)[1:]
_SPLIT_FOLDERS = (*_SPLITS, "valid", "validation")


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

    Example:
        >>> Sample(Path("a.png"), 1, subset="crack").split
        ''
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

    Example:
        >>> samples = Sample(Path("a"), 0, split="train"), Sample(Path("b"), 1, split="test")
        >>> index = Index(Path("index.csv"), ("intact", "worn"), samples)
        >>> [str(sample.path) for sample in index.split("test")]
        ['b']
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

    def outside(self, samples: Sequence[Sample]) -> int:
        """How many of the samples' images and maps have paths that lead out of its folder.

        Example:
            >>> sample = Sample(Path("data/a.png"), 0, map=Path("data/../maps/a.png"))
            >>> Index(Path("data/index.csv"), ("intact", "worn"), (sample,)).outside([sample])
            1
        """
        paths = [path for one in samples for path in (one.path, one.map) if path is not None]
        return sum(self.relative(path).split("/")[0] == ".." for path in paths)


def check_distinct(classes: Sequence[str], source: str | Path) -> None:
    """Refuse classes of one name, which no label and no picture could tell apart.

    Args:
        classes: names.
        source: where they are from, for the message.

    Raises:
        DiffsalError: a name is there twice.

    Example:
        >>> check_distinct(("intact", "worn"), "index.csv")
    """
    for name, count in Counter(classes).items():
        if count > 1:
            raise DiffsalError(f"{source}: {count} classes are called {name!r}; name them apart")


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

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("a.png", "b.png"):
        ...         _ = Path(folder, name).write_bytes(b"")  # images are opened later
        ...     _ = Path(folder, "index.csv").write_text("path,label\\na.png,good\\nb.png,worn\\n")
        ...     read_index(Path(folder, "index.csv")).classes
        ('good', 'worn')
    """
    path = Path(path)
    rows = list(_class_folders(path) if path.is_dir() else _csv_rows(path))
    if not rows:
        raise DiffsalError(f"{path}: the index is empty; list at least one image of each class")
    if maps is not None:
        rows = _with_maps(rows, Path(maps))
    names = tuple(classes) if classes is not None else _class_names(path, rows)
    check_distinct(names, path)
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
