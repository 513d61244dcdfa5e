"""How far long work is: bars for who watches, lines in a log for who does not."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from tqdm import tqdm

LOG = logging.getLogger("diffsal")
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
