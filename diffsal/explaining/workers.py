"""Processes that read images and draw pictures while the model runs."""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import cv2
import torch

from diffsal.errors import DiffsalError

Item = TypeVar("Item")
Later: TypeAlias = Callable[[], Any]
Do: TypeAlias = Callable[[Callable[[Any], Any], Any], Later]
"""Begins a piece of work on one thing, and gives what waits for its result."""


@contextmanager
def working(workers: int) -> Iterator[Do]:
    """Work is done when its result is asked for, or by ``workers`` processes as soon as they can.

    Args:
        workers: how many; 0: this process does it all.

    Raises:
        DiffsalError: one of the processes ended.

    Example:
        >>> with working(0) as do:
        ...     later = do(abs, -1)
        ...     later()
        1
    """
    if workers == 0:
        yield partial
        return
    # Spawned: forks of a process in which CUDA or OpenMP ran break, and a server of forks would
    # import what lies in the working directory.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_step_back)
    try:
        yield lambda work, one: pool.submit(work, one).result
    except BrokenProcessPool as error:
        raise DiffsalError(
            "a process that reads images and draws ended before its work: it was killed, as where "
            'memory is short, or a script calls this outside of `if __name__ == "__main__":`; '
            "take fewer workers, or 0"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, what was ahead is left


def _step_back() -> None:
    """In each worker: the model's own threads come first, or they wait for one another."""
    gc.freeze()  # what was imported is not looked through, image by image
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if hasattr(os, "nice"):
        os.nice(10)


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, where each is asked for ``count`` items before it is handed on.

    Example:
        >>> asked = []
        >>> next(ahead((asked.append(n) or n for n in range(9)), 2)), asked
        (0, [0, 1, 2])
    """
    held: deque[Item] = deque()
    for item in items:
        held.append(item)
        if len(held) > count:
            yield held.popleft()
    yield from held
