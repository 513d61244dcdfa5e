"""Which images there are: labels, human maps, subsets, groups and splits, from a CSV or folders."""

import csv
import difflib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

from diffsal.data.images import IMAGE_SUFFIXES, find_images
from diffsal.errors import DiffsalError, some_of
from diffsal.system.files import read_text

Split: TypeAlias = Literal["", "train", "val", "test"]
_Line = TypeVar("_Line")
_Result = TypeVar("_Result")
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
        notes: one line each on what was passed over.

    Example:
        >>> samples = Sample(Path("a"), 0, split="train"), Sample(Path("b"), 1, split="test")
        >>> index = Index(Path("index.csv"), ("intact", "worn"), samples)
        >>> [str(sample.path) for sample in index.split("test")]
        ['b']
    """

    source: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

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


def class_position(name: str, classes: Sequence[str]) -> int | None:
    """A class by its name or, where no class is called so, by a number; None if neither.

    Whether there are so many classes is not looked at.

    Example:
        >>> class_position("cat", ("dog", "cat")), class_position("0", ("dog", "cat"))
        (1, 0)
        >>> class_position("9" * 5_000, ("dog", "cat"))
    """
    if name in classes:
        return list(classes).index(name)
    digits = name.lstrip("0") or "0"
    is_short = name.isdecimal() and len(digits) < 10  # int() refuses thousands of digits
    return int(digits) if is_short else None


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

    - CSV with a header: the columns ``path,label[,map][,subset][,group][,split]`` in any order and
      case, with commas, semicolons or tabs between them; paths are relative to the file. ``split``
      is train, val or test, and named for all samples or for none. Other columns are passed over
      with a note, unless they are near one of these names: a misspelt ``group`` would leak from
      training into validation.
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
            that is missing or misspelt, a class or split that is unknown, an image or map that is
            not there, or a path that is named twice, and how many further lines are wrong. One
            class only, where ``classes`` is not given.

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
    notes: tuple[str, ...] = ()
    if os.path.isdir(path):
        rows = list(_class_folders(path))
    else:
        table = _table(path)
        rows = _checked(table.lines, partial(_row, path, table.columns))
        notes = table.notes
    if not rows:
        raise DiffsalError(f"{path}: the index is empty; list at least one image of each class")
    if maps is not None:
        rows = _with_maps(rows, Path(maps))
    names = tuple(classes) if classes is not None else _class_names(path, rows)
    check_distinct(names, path)
    unsplit = [row.place for row in rows if not row.split]
    if 0 < len(unsplit) < len(rows):
        raise DiffsalError(f"{unsplit[0]}: has no split, others have; name all of them or none")
    places: dict[Path, str] = {}
    samples = _checked(rows, lambda row: _sample(_with_files(row, places), names))
    return Index(path, names, tuple(samples), notes)


def _checked(lines: Iterable[_Line], check: Callable[[_Line], _Result]) -> list[_Result]:
    """What ``check`` makes of each line; its first error is raised, and tells how many follow."""
    results, errors = [], []
    for line in lines:
        try:
            results.append(check(line))
        except DiffsalError as error:
            errors.append(error)
    if len(errors) > 1:
        many = "1 further line is" if len(errors) == 2 else f"{len(errors) - 1} further lines are"
        raise DiffsalError(f"{errors[0]} ({many} wrong)") from errors[0]
    if errors:
        raise errors[0]
    return results


@dataclass(frozen=True)
class _Table:
    """A CSV's columns, its lines with their places, and what was passed over."""

    columns: list[str]
    lines: list[tuple[str, list[str]]]
    notes: tuple[str, ...] = ()


def _table(path: Path) -> _Table:
    try:
        text = read_text(path)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        lines = [
            (f"{path}, line {reader.line_num}", [value.strip() for value in line])
            for line in reader
            if line
        ]
    except DiffsalError as error:
        raise DiffsalError(f"{path}: {error}") from error
    except OSError as error:
        raise DiffsalError(f"{path}: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DiffsalError(f"{path}: is no CSV in UTF-8 ({error}); export it again") from error
    if not lines:
        return _Table([], [])
    first = lines[0][1]
    if len(first) == 3 and first[0] in _SPLITS:
        return _Table(["split", "label", "path"], lines)
    columns = _header(*lines.pop(0))
    others = sorted(set(columns) - set(_COLUMNS))
    note = f"{path}: passed over the columns {some_of(others)}"
    return _Table(columns, lines, (note,) if others else ())


def _delimiter(text: str) -> str:
    """What is most often in the first line: commas, semicolons (of spreadsheets) or tabs."""
    return max(",;\t", key=text.partition("\n")[0].count)


def _row(path: Path, columns: Sequence[str], line: tuple[str, list[str]]) -> _Row:
    place, values = line
    if len(values) != len(columns):
        raise DiffsalError(
            f"{place}: has {len(values)} fields, not {len(columns)} ({','.join(columns)}); "
            "complete it, and quote what contains a comma"
        )
    cells = zip(columns, values, strict=True)
    row = {column: value for column, value in cells if column in _COLUMNS}
    for name in _REQUIRED:
        if not row[name]:
            raise DiffsalError(f"{place}: the {name} is empty; fill it in or remove the line")
    image = path.parent / row.pop("path")
    if row.get("map"):
        row["map"] = str(path.parent / row["map"])
    return _Row(place, image, image.stem, **row)


def _header(place: str, columns: list[str]) -> list[str]:
    columns = [name.lower() for name in columns]
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise DiffsalError(
            f"{place}: the column {missing[0]!r} is missing from the header "
            f"{','.join(columns)!r}; it needs path,label"
        )
    # A misspelt group would go unnoticed and leak from training into validation.
    counts = Counter(columns)
    misspelt = [name for name in counts if name not in _COLUMNS and _is_near_a_column(name)]
    wrong = misspelt + [name for name in _COLUMNS if counts[name] > 1]
    if wrong:
        raise DiffsalError(
            f"{place}: the column {wrong[0]!r} is misspelt or there twice; "
            f"the columns are {','.join(_COLUMNS)}, rename others"
        )
    return columns


def _is_near_a_column(name: str) -> bool:
    return bool(difflib.get_close_matches(name[:50], _COLUMNS, n=1, cutoff=0.75))


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
    numbers = all(name.isdecimal() and len(name) < 100 for name in names)
    return tuple(sorted(names, key=int if numbers else None))


def _with_files(row: _Row, places: dict[Path, str]) -> _Row:
    """The row, if its files are there and none of ``places``, which its own then joins."""
    if not os.path.isfile(row.path):  # unlike the method, False for a name that cannot be
        raise DiffsalError(f"{row.place}: there is no image {row.path}; correct or remove it")
    if row.map and not os.path.isfile(row.map):
        raise DiffsalError(f"{row.place}: there is no map {row.map}; correct it or leave empty")
    other = places.setdefault(row.path.resolve(), row.place)
    if other != row.place:
        raise DiffsalError(f"{row.place}: {row.path} is named before, in {other}; remove one")
    return row


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
    label = class_position(row.label, classes)
    if label is not None and label < len(classes):
        return label
    raise DiffsalError(
        f"{row.place}: the class {row.label!r} is unknown; the classes are {', '.join(classes)}"
    )
