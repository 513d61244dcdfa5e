"""Folders that several runs may want to write to: one at a time, and none leaves scratch behind.

Locks are the system's (flock): they end with the process that holds them, however it ends, so that
none is ever stale. Windows has none. There, and on file systems without locks, nothing is refused,
and what killed runs left is not removed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffsal.errors import DiffsalError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCRATCH = ".diffsal-"
"""How the names of scratch files and folders begin."""
_held: set[int] = set()  # descriptors with locks


def _let_go() -> None:
    """Locks are this process's: with a fork that outlives it they would seem held."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def sole_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Be the one run that writes to ``folder``, and clear it of what killed runs left there.

    Afterwards the lock file is gone, and so is the folder if it was made here and is empty.

    Args:
        folder: made where it is not there.
        name: of the one file in it that is written, beside which others may write theirs; ``""``:
            the folder is this run's.

    Raises:
        DiffsalError: another run is writing there, or the folder cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, sole_writer(Path(folder)):
        ...     try:
        ...         with sole_writer(Path(folder)):
        ...             pass
        ...     except DiffsalError as error:
        ...         print(str(error).removeprefix(folder).strip())
        is being written by another run; choose another --out, or wait
    """
    is_new, path = not folder.exists(), folder / f".{name or 'diffsal'}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None if fcntl is None else _lock_file(path)
    except BlockingIOError:
        raise DiffsalError(
            f"{folder / name} is being written by another run; choose another --out, or wait"
        ) from None
    except OSError as error:
        raise DiffsalError(
            f"{folder}: cannot be written ({error.strerror}); name another --out"
        ) from error
    try:
        remove_scratch(folder)
        yield
    finally:
        with suppress(OSError):  # gone, or the folder is
            path.unlink()
        if descriptor is not None:
            _close(descriptor)
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def remove_scratch(folder: Path) -> None:
    """Remove the scratch files and folders that lie in a folder and that no living process holds.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in (".diffsal-x1.pt", ".x2.pt"):
        ...         Path(folder, name).touch()
        ...     remove_scratch(Path(folder))
        ...     [path.name for path in Path(folder).iterdir()]
        ['.x2.pt']
    """
    if fcntl is None:
        return
    paths: list[Path] = []
    with suppress(OSError):  # the folder is gone
        paths += folder.glob(f"{SCRATCH}*")
    for path in paths:
        with suppress(OSError):  # in use, someone else's, or gone by now
            is_folder = path.is_dir()
            way = os.O_RDONLY if is_folder else os.O_RDWR
            descriptor = os.open(path, way | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if is_folder else path.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def holding(scratch: int) -> Iterator[None]:
    """Hold an open scratch file or folder: :func:`remove_scratch` lets it be; it is closed at last.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scratch, name = tempfile.mkstemp(prefix=SCRATCH, dir=folder)
        ...     with holding(scratch):
        ...         remove_scratch(Path(folder))
        ...     Path(name).exists()
        True
    """
    _held.add(scratch)
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(scratch, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        _close(scratch)


def _close(descriptor: int) -> None:
    if descriptor in _held:  # not in a fork
        _held.remove(descriptor)
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    """A descriptor of the file, locked where that can be; BlockingIOError: another run's."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _close(descriptor)
            raise
        except OSError:  # a file system without locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        _close(descriptor)  # of a run that ended, and removed it, just now
