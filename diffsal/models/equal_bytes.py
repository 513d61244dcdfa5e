"""Equal checkpoints as equal bytes, so that one can tell by a hash whether two runs agree."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


def save_equal(value: Any, path: Path) -> None:
    """Save as ``torch.save`` does, such that equal values give equal files wherever they are from.

    Args:
        value: dicts, lists, tuples, plain types and tensors.
        path: of the file; its name is not in its bytes, where ``torch.save`` would put it.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: the same, as torch tells it; the OSError is its context.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("a.pt", "b.pt"):
        ...         save_equal({"key": ["".join(["ke", "y"])]}, Path(folder, name))
        ...     Path(folder, "a.pt").read_bytes() == Path(folder, "b.pt").read_bytes()
        True
    """
    with path.open("wb") as file:
        torch.save(_unshared(value), file)


def _unshared(value: Any) -> Any:
    """The same value, in which every text is one object and no container is there twice.

    Pickle writes an object in full once and then refers to it, so its bytes tell which of a
    value's equal parts are the same object: these differ in a run that was resumed.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) in (list, tuple):
        return type(value)(map(_unshared, value))
    if type(value) in (dict, OrderedDict):
        made = type(value)((_unshared(key), _unshared(one)) for key, one in value.items())
        if isinstance(made, OrderedDict):
            vars(made).update(_unshared(vars(value)))  # a state's versions of modules
        return made
    return value
