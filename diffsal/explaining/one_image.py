"""What is done for one image: it is read before the model runs, told and drawn afterwards.

Processes of their own do both, each of which imports this: torchvision and models stay out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsal.data.images import read_image_with_notes
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.explaining.figures import PANELS, save_figure, save_overlays
from diffsal.explaining.overlays import reduced
from diffsal.explaining.records import (
    NOT_FINITE,
    Draft,
    Record,
    draft,
    failure,
    maps_at_image_size,
)
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.system.files import replacing


@dataclass(frozen=True)
class Outputs:
    """What is written for each image.

    Attributes:
        figure: ``<stem>.png``, the picture of the explanation.
        overlays: each panel as its own PNG of the image's size, ``<stem>.true.png`` and so on.
        maps: ``<stem>.npz``: ``true``, ``false``, ``difference`` raw at the layer's size (h, w),
            ``logits``, ``true_class``, ``false_class``.
        resized_maps: there, ``true_normalized`` and so on, too: in [0, 1] at the image's size, NaN
            where the model did not see it.
    """

    figure: bool = True
    overlays: bool = False
    maps: bool = False
    resized_maps: bool = False

    def names(self, stem: str) -> list[str]:
        """Every file name that is written for ``stem``.

        Example:
            >>> Outputs(overlays=True).names("x")
            ['x.png', 'x.true.png', 'x.false.png', 'x.difference.png', 'x.evidence.png']
        """
        return [
            *([f"{stem}.png"] if self.figure else []),
            *([f"{stem}.{panel}.png" for panel in PANELS] if self.overlays else []),
            *([f"{stem}.npz"] if self.maps or self.resized_maps else []),
        ]


@dataclass(frozen=True)
class Wanted:
    """What is the same for all images of a run.

    Attributes:
        folder: where files are written.
        preprocessing: from an image's pixels to the model's input.
        outputs: what is written.
    """

    folder: Path
    preprocessing: Preprocessing
    outputs: Outputs


@dataclass(frozen=True)
class Prepared:
    """An image that was read.

    Attributes:
        image: uint8 (H, W, 3), in its own size if overlays want it so, or reduced; a pixel of it
            where nothing is drawn.
        size: its own, (H, W).
        tensor: the model's input, (C, h, w).
        notes: sentences on the image.
    """

    image: NDArray[np.uint8]
    size: tuple[int, int]
    tensor: Tensor
    notes: list[str]


def prepare(wanted: Wanted, path: Path) -> Prepared | DiffsalError:
    """What is held of an image; an error is a value, as others go on.

    Example:
        >>> prepare(Wanted(Path(), Preprocessing(), Outputs()), Path("none.png"))
        DiffsalError('none.png: No such file or directory; check the path')
    """
    try:
        image, notes = read_image_with_notes(path)
        size = (image.shape[0], image.shape[1])
        return Prepared(_kept(image, wanted.outputs), size, wanted.preprocessing(image), notes)
    except DiffsalError as error:
        return error


def _kept(image: NDArray[np.uint8], outputs: Outputs) -> NDArray[np.uint8]:
    """As much of an image as is drawn of it; it goes from process to process twice."""
    if outputs.overlays:
        return image
    return reduced(image) if outputs.figure else image[:1, :1].copy()


@dataclass(frozen=True)
class Computed:
    """An image and its maps.

    Attributes:
        path: of the image.
        stem: what the names of its files begin with.
        image: see :class:`Prepared`, as are ``size`` and ``notes``.
        maps: the fields of :class:`SalienceMaps`, a batch of one, as arrays, which go from process
            to process as they are, where every tensor would take an open file.
        names: one per class.
    """

    path: Path
    stem: str
    image: NDArray[np.uint8]
    size: tuple[int, int]
    notes: Sequence[str]
    maps: dict[str, Any]
    names: Sequence[str]


def computed(
    path: Path, stem: str, one: Prepared, maps: SalienceMaps, names: Sequence[str]
) -> Computed:
    """An image with its maps, a batch of one on the CPU; the model's input is let go.

    Example:
        >>> one = Prepared(np.zeros((4, 6, 3), np.uint8), (4, 6), torch.zeros(3, 2, 2), [])
        >>> each = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1]), torch.tensor([0])
        >>> maps = SalienceMaps(*torch.zeros(2, 1, 2, 2), torch.zeros(1, 2), *each, "label")
        >>> computed(Path("a.png"), "a", one, maps, ["healthy", "ill"]).maps["true_class"]
        array([1])
    """
    values = {field.name: getattr(maps, field.name) for field in fields(maps)}
    arrays = {
        name: value.numpy() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    return Computed(path, stem, one.image, one.size, one.notes, arrays, names)


def write(wanted: Wanted, one: Computed) -> Record:
    """Write one image's files and return its record.

    Example:
        >>> one = Prepared(np.zeros((4, 6, 3), np.uint8), (4, 6), torch.zeros(3, 2, 2), [])
        >>> each = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1]), torch.tensor([0])
        >>> maps = SalienceMaps(*torch.zeros(2, 1, 2, 2), torch.zeros(1, 2), *each, "label")
        >>> nothing = Wanted(Path(), Preprocessing(), Outputs(figure=False))
        >>> record = write(nothing, computed(Path("a.png"), "a", one, maps, ["healthy", "ill"]))
        >>> record["true_name"], record["margin"], record["files"]
        ('ill', 1.0, [])
    """
    if not all(np.isfinite(one.maps[name]).all() for name in ("true", "false", "logits")):
        return failure(one.path, NOT_FINITE)
    values: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in one.maps.items()
    }
    maps = SalienceMaps(**values)
    told = one.image, one.size, maps, one.names, wanted.preprocessing, one.notes
    made = draft(one.path, one.stem, *told)
    try:
        _write_files(wanted, made)
    except (OSError, DiffsalError) as error:
        return failure(made.path, error)
    return made.record | {"files": wanted.outputs.names(made.stem)}


def _write_files(wanted: Wanted, made: Draft) -> None:
    outputs, folder = wanted.outputs, wanted.folder
    if outputs.figure:
        save_figure(folder / f"{made.stem}.png", made.explanation)
    if outputs.overlays:
        save_overlays(folder, made.stem, made.explanation)
    if outputs.maps or outputs.resized_maps:
        with replacing(folder / f"{made.stem}.npz") as scratch:
            resized = maps_at_image_size(made) if outputs.resized_maps else {}
            arrays = made.arrays | resized
            np.savez_compressed(scratch, **arrays)  # type: ignore[arg-type]
