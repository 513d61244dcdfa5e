"""Which of several processes this one is, and what they give each other."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist

One = TypeVar("One")


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; else (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device) -> Iterator[bool]:
    """Join the processes that torchrun started, if it did; yields whether this is the first.

    Args:
        device: whose tensors are to be exchanged; the CPU for Python objects.

    Example:
        >>> with process_group(torch.device("cpu")) as is_first:
        ...     is_first
        True
    """
    rank, world = process_rank()
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


def in_turns(own: Sequence[One], processes: int) -> list[One]:
    """What all processes made, in the order of the work: each took every ``processes``-th piece.

    Args:
        own: what this process made, of pieces ``rank``, ``rank + processes`` and so on.
        processes: how many there are, in a group if more than one.

    Example:
        >>> in_turns(["a", "b"], 1)
        ['a', 'b']
    """
    if processes == 1:
        return list(own)
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, list(own))
    missing = object()
    return [one for one in chain(*zip_longest(*parts, fillvalue=missing)) if one is not missing]
