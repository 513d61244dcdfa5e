"""Files that have an end, to read; and to write: whole or not there, renamed into their place."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from diffsal.errors import DiffsalError, one_line
from diffsal.system.locks import SCRATCH, holding


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; whatever has no end (a pipe, a device, a socket) is refused at once.

    Raises:
        DiffsalError: it is no regular file; names no path, which callers do.
        OSError: it cannot be opened.

    Example:
        >>> open_regular(Path("/dev/zero"))
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: is a pipe, device or socket: copy what it gives into a file
    """

    def without_waiting(name: str, flags: int) -> int:  # opening a pipe waits for its writer
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", opener=without_waiting)  # noqa: SIM115
    except ValueError as error:  # a name with a NUL
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DiffsalError("is a pipe, device or socket: copy what it gives into a file")
    return file


def read_text(path: Path) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        DiffsalError: it is no regular file; names no path.
        OSError, UnicodeDecodeError: it cannot be read.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("é", encoding="utf-8-sig")
        ...     read_text(Path(folder, "a.txt"))
        'é'
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8-sig")


def reserve(path: Path) -> None:
    """Take the room on the disk that a sparse file says it has, before it is mapped into memory.

    Without it, writing to the map of a file on a full disk ends the process (SIGBUS).

    Raises:
        OSError: there is no room.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "sparse")
        ...     with file.open("wb") as sparse:
        ...         _ = sparse.truncate(100_000)
        ...     reserve(file)
        ...     file.stat().st_blocks * 512 >= 100_000
        True
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def check_writable(folder: Path) -> None:
    """See, before any work is done, that files can be written to ``folder``; makes nothing.

    Raises:
        DiffsalError: they cannot.
    """
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # told below
    except (OSError, ValueError) as error:  # a name that cannot be
        raise DiffsalError(f"{folder}: {one_line(error)[:80]}; name another --out") from error
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
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
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder within ``folder``, for files on the way to others; it is gone afterwards.

    What a killed process left there, the next run removes, as it does not in the system's folder
    for temporary files.

    Raises:
        DiffsalError: the folder cannot be made, or the disk is full.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with scratch_folder(Path(folder)) as scratch:
        ...         there = scratch.parent == Path(folder)
        ...     there, list(Path(folder).iterdir())
        (True, [])
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        with suppress(OSError):  # Windows opens no folders
            stack.enter_context(holding(os.open(scratch, os.O_RDONLY)))
        yield scratch


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

    NaN and infinities must have been replaced by None. What is no UTF-8 in a file's name becomes an
    escape, which reading turns into the same name again.

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
            errors="backslashreplace",  # a lone surrogate's escape is the same in Python and JSON
        )
