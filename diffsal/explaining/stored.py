"""Maps of a batch in one file, and back."""

import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsal.errors import DiffsalError
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.system.files import open_regular, replacing

_FORMAT = "diffsal-maps-1"


def write_maps(path: str | Path, maps: SalienceMaps) -> None:
    """Write maps as an ``.npz`` of arrays; the file appears whole or not at all.

    Args:
        path: of the file; ``.npz`` is added where it ends otherwise.
        maps: on any device.

    Raises:
        DiffsalError: a path that cannot be written.

    Example:
        See :func:`read_maps`.
    """
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
    content: dict[str, Any] = {"format": _FORMAT}
    for field in fields(maps):
        value = getattr(maps, field.name)
        content[field.name] = (
            value.detach().cpu().numpy() if isinstance(value, Tensor) else str(value or "")
        )
    with replacing(path) as scratch:
        np.savez_compressed(scratch, **content)


def read_maps(path: str | Path) -> SalienceMaps:
    """What :func:`write_maps` wrote, bit for bit, on the CPU.

    Raises:
        DiffsalError: no such file, or one of another kind.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> each = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1]), torch.tensor([0])
        >>> maps = SalienceMaps(*torch.rand(2, 1, 7, 7), torch.rand(1, 2), *each, "label")
        >>> with TemporaryDirectory() as folder:
        ...     write_maps(Path(folder, "maps.npz"), maps)
        ...     again = read_maps(Path(folder, "maps.npz"))
        >>> torch.equal(again.difference, maps.difference), again.true_from
        (True, 'label')
    """
    try:
        with open_regular(Path(path)) as file, np.load(file, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DiffsalError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError, zipfile.BadZipFile, DiffsalError) as error:
        raise DiffsalError(f"{path}: cannot be read as maps ({error}); save them again") from error
    names = [field.name for field in fields(SalienceMaps)]
    if str(content.get("format")) != _FORMAT or set(content) != {"format", *names}:
        raise DiffsalError(f"{path}: holds no maps of SalienceMaps.save; pass such a file")
    values: dict[str, Any] = {
        name: (str(content[name]) or None)
        if content[name].dtype.kind == "U"
        else torch.from_numpy(content[name])
        for name in names
    }
    return SalienceMaps(**values)
