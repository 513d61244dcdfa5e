"""Files that are either whole or not there: written beside their place, then renamed into it."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffsal.errors import DiffsalError
from diffsal.system.locks import SCRATCH, holding


def check_writable(folder: Path) -> None:
    """See, before any work is done, that files can be written to ``folder``; makes nothing.

    Raises:
        DiffsalError: they cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DiffsalError(f"{folder}: no folder that can be written to; name another --out")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path in the folder of ``path``; rename it to ``path`` on success.

    On any exception, KeyboardInterrupt included, the scratch file is removed and what stood at
    ``path`` before is untouched. The scratch name keeps the suffix, by which writers such as
    matplotlib choose a format.

    Raises:
        DiffsalError: the folder cannot be made or written to, or the disk is full.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "new", "a.txt")) as scratch:
        ...         _ = scratch.write_text("whole")
        ...         there_yet = Path(folder, "new", "a.txt").exists()
        ...     there_yet, Path(folder, "new", "a.txt").read_text()
        (False, 'whole')
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=SCRATCH, suffix=path.suffix, dir=path.parent)
        scratch = Path(name)
        with holding(handle):
            try:
                yield scratch
                umask = os.umask(0)
                os.umask(umask)
                scratch.chmod(0o666 & ~umask)  # mkstemp makes private files; ours are ordinary ones
                _to_disk(scratch)  # or a crash of the system could leave the name without content
                scratch.replace(path)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise
        with suppress(OSError):  # Windows opens no folders
            _to_disk(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a full disk, or of a folder that is gone, into one line.

    Raises:
        DiffsalError: ``path`` cannot be written.

    Example:
        >>> try:
        ...     with writing(Path("a.txt")), Path("/dev/full").open("w") as file:
        ...         _ = file.write("a")
        ... except DiffsalError as error:
        ...     print(error)
        a.txt: cannot be written (No space left on device); make room, or name another --out
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Where writing fails, torch raises a RuntimeError of its own from the OSError.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError) or reason.errno is None:
            raise
        raise DiffsalError(
            f"{path}: cannot be written ({os.strerror(reason.errno)}); make room, or name another "
            "--out"
        ) from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write ``value`` as JSON, on one line for an ``indent`` of ``None``.

    NaN and infinities must have been replaced by None.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "row.json"), {"margin": 0.5}, indent=None)
        ...     Path(folder, "row.json").read_text()
        '{"margin": 0.5}\\n'
    """
    with replacing(path) as scratch:
        scratch.write_text(
            json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )
