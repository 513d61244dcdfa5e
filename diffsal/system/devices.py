"""Where tensors live."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsal.errors import DiffsalError


def choose_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` to a device that is there.

    ``auto`` takes CUDA, then MPS, then the CPU. Under torchrun, CUDA without a number is the
    process's own GPU.

    Raises:
        DiffsalError: no such device, here or at all.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DiffsalError(
            f"device {name!r} is unknown: pass auto, cpu, cuda, cuda:N or mps"
        ) from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    there = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise DiffsalError(f"device {name!r} is not available on this machine: pass --device cpu")
    return device


def on_host(tensor: Tensor) -> NDArray[np.float32]:
    """A float32 array of a tensor of any device and floating-point type, in memory of its own.

    From a GPU it goes to page-locked memory, which is several times as fast; torch uses that of an
    array again when the array is gone.

    Example:
        >>> on_host(torch.ones(2, dtype=torch.float64))
        array([1., 1.], dtype=float32)
    """
    tensor = tensor.detach().float()
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor)
    return host.numpy()


@contextmanager
def running(device: torch.device, size: Sequence[int], images: int) -> Iterator[None]:
    """Turn what a model raises on inputs that it was not made for into one line.

    Args:
        device: where it runs.
        size: height and width of the inputs, in pixels.
        images: in one forward pass.

    Raises:
        DiffsalError: the model does not run on such inputs, or not on so many at once.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise DiffsalError(
            f"{device} has no memory for {images} images at once: pass a smaller --batch-size"
        ) from None
    except (RuntimeError, ValueError, AssertionError) as error:
        pixels = " x ".join(map(str, size))
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DiffsalError(
            f"the model does not run on {pixels} inputs ({reason}): check --size and --arch"
        ) from error
