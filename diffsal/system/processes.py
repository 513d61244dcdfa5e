"""Which of several processes this one is, and what they give each other."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffsal.errors import DiffsalError

One = TypeVar("One")


class ApartError(DiffsalError):
    """Processes that share work have come apart: none of them can go on."""


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device, share: tuple[int, int] | None = None) -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; yields whether this is the first.

    Args:
        device: whose tensors are to be exchanged; the CPU for Python objects.
        share: this process's rank and the number that share; ``None``: all that torchrun started.

    Example:
        >>> with process_group(torch.device("cpu")) as is_first:
        ...     is_first
        True
    """
    rank, world = share or process_rank()
    if world == 1 or dist.is_initialized():  # by the caller, who also ends it
        yield rank == 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def in_turns(own: Sequence[One], processes: int, work: str) -> list[One]:
    """What all processes made, in the order of the work: each took every ``processes``-th piece.

    Args:
        own: what this process made, of pieces ``rank``, ``rank + processes`` and so on.
        processes: how many there are, in a group if more than one.
        work: what it is, the same in all.

    Raises:
        ApartError: another process ended, or is at other work.

    Example:
        >>> in_turns(["a", "b"], 1, "letters")
        ['a', 'b']
    """
    if processes == 1:
        return list(own)
    parts: list[Any] = [None] * processes
    try:
        dist.all_gather_object(parts, (work, list(own)))
    except RuntimeError as error:
        raise ApartError(
            f"another process ended during {work}: see what it said above, and start all again"
        ) from error
    works = {work for work, _ in parts}
    if len(works) > 1:
        raise ApartError(
            f"the processes are at different work, {' and '.join(sorted(works))}: give all of them "
            "the same files and options"
        )
    missing = object()
    turns = zip_longest(*(own for _, own in parts), fillvalue=missing)
    return [one for one in chain(*turns) if one is not missing]


def check_alike(value: object, processes: int, what: str) -> None:
    """See that all processes have the same.

    Raises:
        ApartError: they have not.

    Example:
        >>> check_alike(3, 1, "number of images")
    """
    if processes > 1 and any(one != value for one in in_turns([value], processes, what)):
        raise ApartError(
            f"the processes differ in the {what}: see that each can read all of the files"
        )
