"""How far an audit is: bars for who watches, lines in ``audit.log`` for who does not."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from diffsal.errors import DiffsalError
from diffsal.system.files import open_regular, writing

LOG = logging.getLogger("diffsal.auditing")
LOG_NAME = "audit.log"
_FORM = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
_EVERY = 60.0  # seconds between lines
Watch: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage's title, how many of its images are done, and how many there are."""
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch | None) -> Iterator[None]:
    """Call ``watch`` whenever images of a stage are done.

    Example:
        >>> with watched(print), stage("audit", 9) as advance:
        ...     advance(4)
        audit 4 9
    """
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


@contextmanager
def logged(handler: logging.Handler) -> Iterator[None]:
    """Give the lines to a handler as well, and close it at the end.

    Example:
        >>> import sys
        >>> with logged(logging.StreamHandler(sys.stdout)):  # doctest: +ELLIPSIS
        ...     LOG.info("audit begins")
        20... audit begins
    """
    level = LOG.level
    handler.setFormatter(_FORM)
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(level)
        LOG.removeHandler(handler)
        handler.close()


def log_file(folder: Path) -> logging.Handler:
    """:data:`LOG_NAME` in a folder that is made where it is not there; what was in it is lost."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _LogFile(folder / LOG_NAME, mode="w", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a log is an earlier audit's, or empty: nothing else may be lost.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "audit.log").write_text("May 3: the auditors came")
        ...     is_ours(Path(folder, "audit.log"))
        False
    """
    try:
        with open_regular(path) as file:
            start = file.read(60).decode("utf-8", "replace")
    except (OSError, DiffsalError):
        return False
    return not start or re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d audit of ", start) is not None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing: a full disk is told of what matters more, the report."""


@contextmanager
def stage(title: str, images: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; for the log a line each minute, and one at the end.

    Args:
        title: what is done.
        images: how many there are to do.

    Yields:
        What is to be called with how many more are done.

    Example:
        >>> import sys
        >>> with logged(logging.StreamHandler(sys.stdout)):  # doctest: +ELLIPSIS
        ...     with stage("audit", 9) as advance:
        ...         advance(9)
        20... audit: 9 of 9 images, 0:00 elapsed
    """
    begun = told = time.monotonic()
    done, watch = 0, _WATCH.get()

    def advance(more: int) -> None:
        nonlocal told, done
        done += more
        progress.update(more)
        if watch is not None:
            watch(title, done, images)
        now = time.monotonic()
        if done < images and now - told >= _EVERY:
            told, left = now, (now - begun) / done * (images - done)
            LOG.info("%s, about %s left", _said(title, done, images, begun), _clock(left))

    with tqdm(total=images, desc=title, unit="image", disable=None) as progress:
        yield advance
    LOG.info("%s", _said(title, done, images, begun))


def _said(title: str, done: int, images: int, begun: float) -> str:
    return f"{title}: {done} of {images} images, {_clock(time.monotonic() - begun)} elapsed"


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds).removeprefix("0")
