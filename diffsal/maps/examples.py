"""Inputs to look at a model's run with: the caller's, or noise of a size that the model takes."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError, one_line, some_of

Inputs: TypeAlias = "tuple[tuple[Any, ...], Mapping[str, Any]]"
"""Positional arguments, and named ones."""

MADE_IN_INFERENCE = (
    "the model's parameters or buffers were made in inference mode, which autograd cannot use: "
    "build or load the model outside torch.inference_mode()"
)
_SIDES = (224, 256, 299, 384, 448, 512, 336, 192, 160, 128, 96, 64, 48, 32, 28, 16, 8)
_VOLUMES = (
    *(
        (16, 112, 112),
        (64, 64, 64),
        (96, 96, 96),
        (32, 32, 32),
        (16, 224, 224),
        (8, 224, 224),
    ),
    *((32, 224, 224), (128, 128, 128)),
)


def as_inputs(example: Any) -> Inputs:
    """A tensor, or a tuple or mapping of inputs, as arguments.

    Example:
        >>> positional, named = as_inputs(torch.zeros(1, 3, 8, 8))
        >>> len(positional), named
        (1, {})
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def answer(model: nn.Module, inputs: Inputs) -> Any:
    """What a model returns for inputs.

    Raises:
        DiffsalError: whatever the model raises on them, but for a lack of memory.

    Example:
        >>> answer(nn.Linear(2, 2), as_inputs(torch.zeros(1, 2))).shape
        torch.Size([1, 2])
    """
    positional, named = inputs
    try:
        return model(*positional, **named)
    except (DiffsalError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "nference tensor" in str(error):
            raise DiffsalError(MADE_IN_INFERENCE) from error
        given = (*positional, *named.values())
        shapes = [f"{list(one.shape)} {one.dtype}" for one in given if isinstance(one, Tensor)]
        first = next(model.parameters(), None)
        weights = "" if first is None else f", weights {first.dtype} on {first.device}"
        raise DiffsalError(
            f"{type(model).__name__} does not run on {some_of(shapes)} inputs "
            f"({one_line(error)}{weights}): check their size and type (--size, --arch)"
        ) from error


def example_inputs(model: nn.Module, example: Any = None) -> Iterator[Inputs]:
    """The caller's example alone, else noise in the sizes that the model may take, likelier first.

    Example:
        >>> (noise,), _ = next(example_inputs(nn.Conv2d(1, 4, 3)))
        >>> noise.shape
        torch.Size([1, 1, 224, 224])
    """
    if example is not None and not _is_empty(example):
        yield as_inputs(example)
        return
    first = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    for channels, size in dict.fromkeys(_shapes(model)):
        noise = torch.rand((1, channels, *size), generator=generator)
        dtype = first.dtype if first.is_floating_point() else torch.float32
        yield (noise.to(first.device, dtype),), {}


def noise_of_size(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """``(1, C, *size)``: noise of a model's channels, type and device.

    Example:
        >>> noise_of_size(nn.Conv2d(1, 4, 3), (8, 9)).shape
        torch.Size([1, 1, 8, 9])
    """
    first = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((1, _channels(model), *size), generator=generator)
    return noise.to(first.device, first.dtype if first.is_floating_point() else torch.float32)


def _channels(model: nn.Module) -> int:
    stem = _stem(model)
    return 3 if stem is None else stem.in_channels


def _stem(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    convolutions = (one for one in model.modules() if isinstance(one, nn.Conv2d | nn.Conv3d))
    return next(convolutions, None)


def _is_empty(example: Any) -> bool:
    """Whether a batch has no sample."""
    positional, named = as_inputs(example)
    return any(isinstance(one, Tensor) and not len(one) for one in (*positional, *named.values()))


def _shapes(model: nn.Module) -> Iterator[tuple[int, tuple[int, ...]]]:
    stem, channels = _stem(model), _channels(model)
    for module in model.modules():
        yield from _declared(module, channels)
    if isinstance(stem, nn.Conv3d):
        yield from ((channels, size) for size in _VOLUMES)
    yield from ((channels, (side, side)) for side in _SIDES)
    if channels != 3:  # the first layer may not be the first to run
        yield from ((3, (side, side)) for side in _SIDES)


def _declared(module: nn.Module, channels: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """What a module says of its input: timm's, transformers' and torchvision's ways."""
    timm = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    size = timm.get("input_size") if isinstance(timm, Mapping) else None
    if isinstance(size, tuple | list) and len(size) == 3:
        yield size[0] if channels not in (1, 2, 4) else channels, tuple(size[1:])
    for holder in (getattr(module, "config", None), module):
        size = getattr(holder, "image_size", None) or getattr(holder, "img_size", None)
        if isinstance(size, int):
            size = (size, size)
        if isinstance(size, tuple | list) and all(isinstance(one, int) for one in size):
            yield channels, tuple(size)
