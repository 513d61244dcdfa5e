"""From a file's bytes to tensors and plain values.

A weights file is data: nothing in it is executed. This module knows no architecture."""

import hashlib
import io
import os
import pickle
import re
import zipfile
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from diffsal.errors import DiffsalError, one_line, some_of
from diffsal.models.bounds import check_archive, check_pickle
from diffsal.system.files import open_regular

State: TypeAlias = dict[str, Tensor]

# Entries of a training checkpoint under which the model is found, and parts of names there of what
# has no part in its prediction.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
COPIES = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)", re.IGNORECASE)
_SAVE_WEIGHTS = "save its weights, torch.save({}, 'weights.pt'), where it can be loaded"
_IN_PYTHON = "or load it in Python and call diffsal.explain(model, images)"
_PICKLED = f"{_SAVE_WEIGHTS.format('model.state_dict()')}, {_IN_PYTHON}"
# ir_version, then the producer's name, the graph or the operators' version.
_ONNX = re.compile(rb"\x08[\x01-\x1f][\x12\x3a\x42]")
_DAMAGED = "is damaged, or no file of PyTorch weights: copy or download it again"
_PICKLES_BEFORE_1_6 = 5  # a number, the version, the system, the state, the names of its storages
_PROGRAMS = {  # an archive is told by how the name of one of its members ends
    "/constants.pkl": ("a TorchScript program", "torch.jit.load(PATH).state_dict()"),
    "/archive_format": ("an exported program", "torch.export.load(PATH).state_dict"),
    "exported_program.json": ("an exported program", "torch.export.load(PATH).state_dict"),
}


class _Object:
    """Stands for whatever a pickle would have made that is no tensor and of no plain type."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_weights(path: Path) -> tuple[Any, str]:
    """What a file holds, its objects replaced by `_Object`, and the SHA-256 of its bytes.

    Raises:
        DiffsalError: the file cannot be read, or holds something else than weights.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"fc.weight": torch.ones(1, 2), "epoch": 3}, Path(folder, "weights.pt"))
        ...     read_weights(Path(folder, "weights.pt"))[0]
        {'fc.weight': tensor([[1., 1.]]), 'epoch': 3}
    """
    try:
        with open_regular(path) as file:
            start = file.read(256)
            if not start:
                raise DiffsalError("is empty: copy or download the file again")
            if start.startswith(b"version https://git-lfs"):
                raise DiffsalError("is a Git LFS pointer, not the weights: run git lfs pull")
            if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
                raise DiffsalError("is a web page, not weights: download the file again")
            if start[0] == 8 and (_ONNX.match(start) or path.suffix.lower() == ".onnx"):
                raise DiffsalError(
                    "is an ONNX graph, which has no gradients: take the PyTorch model that it was "
                    f"exported from; {_PICKLED}"
                )
            digest = hashlib.sha256(start)
            while block := file.read(1 << 20):
                digest.update(block)
            file.seek(0)
            loaded = _read_safetensors(path) if start[8:9] == b"{" else _read_torch(file)
    except OSError as error:
        raise DiffsalError(f"{error.strerror or error}: pass a file of weights") from error
    return loaded, digest.hexdigest()


def _read_safetensors(path: Path) -> Any:
    try:
        safetensors = import_module("safetensors.torch")
    except ImportError as error:
        raise DiffsalError(
            "safetensors is not installed: pip install 'diffsal[safetensors]'"
        ) from error
    try:
        return safetensors.load_file(path)
    except Exception as error:
        raise DiffsalError(f"{_DAMAGED} ({one_line(error)})") from error


def _read_torch(file: IO[bytes]) -> Any:
    try:
        members = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
        for ending, (program, state) in _PROGRAMS.items():
            if any(member.filename.endswith(ending) for member in members):
                raise DiffsalError(
                    f"is {program}, whose layers cannot be watched: {_SAVE_WEIGHTS.format(state)}, "
                    "or load them into the model in Python and call diffsal.explain(model, images)"
                )
        _check(file, members)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except DiffsalError:
        raise
    except pickle.UnpicklingError as error:
        return _read_around_objects(file, error)
    except Exception as error:  # whatever the reading of other bytes leads to
        raise DiffsalError(f"{_DAMAGED} ({one_line(error)})") from error


def _check(file: IO[bytes], members: list[zipfile.ZipInfo]) -> None:
    """Refuse what would cost far more than the file is; one that is damaged is left to torch."""
    check_archive(members, file.seek(0, os.SEEK_END))
    file.seek(0)
    try:
        if members:
            for member in members:
                if member.filename.endswith("data.pkl"):
                    check_pickle(io.BytesIO(zipfile.ZipFile(file).read(member)))
        else:
            for _ in range(_PICKLES_BEFORE_1_6):
                check_pickle(file)
    except DiffsalError:
        raise
    except Exception:
        return


def _read_around_objects(file: IO[bytes], error: Exception) -> Any:
    """Read what torch refuses to, such as an argparse.Namespace beside the weights."""
    try:
        file.seek(0)
        names = get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        with safe_globals([(_Object, name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise DiffsalError(_DAMAGED) from error
        raise DiffsalError(f"holds pickled objects ({refused[1]}): {_PICKLED}") from error


def state_dict_in(loaded: Any) -> State:
    """The weights in a plain state_dict, or in the one entry of a checkpoint that holds some.

    Args:
        loaded: what :func:`read_weights` read.

    Raises:
        DiffsalError: there are no weights, or those of several models.

    Example:
        >>> state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
        >>> list(state_dict_in({"epoch": 3, "model": state, "model_ema": state}))
        ['fc.weight', 'fc.bias']
    """
    pickled = f"is a pickled whole model: {_PICKLED}"
    if isinstance(loaded, _Object):
        raise DiffsalError(pickled)
    if not isinstance(loaded, dict):
        raise DiffsalError(f"holds a {type(loaded).__name__}, not a state_dict: save one")
    entries = {str(name): tensors_in(value) for name, value in loaded.items()}
    entries = {name: state for name, state in entries.items() if _has_layers(state)}
    entries = {name: state for name, state in entries.items() if not COPIES.search(name)} or entries
    for name in _CONTAINERS:
        if name in entries:
            return entries[name]
    if len(entries) > 1:
        raise DiffsalError(
            f"holds several models ({some_of(entries)}): save one of them, "
            f"torch.save(torch.load(PATH)[{min(entries)!r}], 'weights.pt')"
        )
    for state in (*entries.values(), tensors_in(loaded)):
        if _has_layers(state):
            return state
    if any(isinstance(value, _Object) for value in loaded.values()):
        raise DiffsalError(pickled)
    raise DiffsalError(f"holds no weights, but {some_of(map(str, loaded)) or 'an empty dict'}")


def _has_layers(state: State) -> bool:
    return any(value.ndim > 1 for value in state.values())


def tensors_in(value: Any) -> State:
    """The tensors under names in a dict, without their graphs; none in anything else.

    Example:
        >>> tensors_in({"weight": torch.ones(2), "epoch": 3})
        {'weight': tensor([1., 1.])}
    """
    if not isinstance(value, dict):
        return {}
    return {
        key: tensor.detach()
        for key, tensor in value.items()
        if isinstance(key, str) and isinstance(tensor, Tensor)
    }
