"""Norms behind the pooling, with their scale held fixed while maps are taken.

LayerNorm, GroupNorm and RMSNorm undo whatever scales their input, so that to first order the cells'
contributions cancel: their sum is zero, whatever the logit. With the scale held fixed the norm is
linear (the mean that it subtracts is so already), and behind global average pooling the map adds up
again. The forward pass, and every gradient but that of a map, stay what they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROUNDINGS = 16  # of the type, relative, that a norm may differ from its formula by


class Switch:
    """Whether scales are held fixed now: while a map is taken."""

    on = False


def norms_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that may be such norms, by name.

    Example:
        >>> [name for name, _ in norms_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))]
        ['1']
    """
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        is_batch = isinstance(module, nn.modules.batchnorm._NormBase) or "batch" in kind
        if "norm" in kind and not is_batch and not list(module.children()):
            yield name, module


def held(module: nn.Module, given: Tensor, output: Tensor, switch: Switch) -> Tensor | None:
    """The output of a norm, as a function whose scale is fixed while the switch is on.

    Args:
        module: LayerNorm, GroupNorm, RMSNorm or their like.
        given: its input, of which each sample is one vector: (B, C), (B, C, 1, 1), (B, 1, C).
        output: what it returned.
        switch: turned on while gradients for maps are taken.

    Returns:
        ``None`` where the input is still over space, or the output is not that of such a norm.
    """
    if not _is_pooled(given) or output.shape != given.shape:
        return None
    flat = given.flatten(1).to(torch.promote_types(given.dtype, torch.float32))
    for groups in _possible_groups(module, flat.shape[1]):
        scale = _scale(module, flat, groups)
        if scale is None:
            continue
        if _explains(module, flat, scale, groups, output):
            result: Tensor = _Held.apply(output, given, scale, groups, switch)
            return result
    return None


class _Held(torch.autograd.Function):
    """The identity on a norm's output, with two ways back: the norm's own, and the linear one."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        given: Tensor,
        scale: Tensor,
        groups: int,
        switch: Switch,
    ) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.groups, ctx.switch, ctx.shape, ctx.dtype = (
            groups,
            switch,
            given.shape,
            given.dtype,
        )
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if not ctx.switch.on:
            return gradient, None, None, None, None
        (scale,) = ctx.saved_tensors
        linear = _centred(gradient.flatten(1).to(scale.dtype) * scale, ctx.groups)
        return None, linear.reshape(ctx.shape).to(ctx.dtype), None, None, None


def _is_pooled(given: Tensor) -> bool:
    return given.ndim >= 2 and given[0].numel() == max(given.shape[1:])


def _possible_groups(module: nn.Module, width: int) -> tuple[int, ...]:
    """Groups of channels whose mean is subtracted; 0: none is, as in RMSNorm."""
    groups = getattr(module, "num_groups", 1)
    return (groups, 0) if isinstance(groups, int) and groups and width % groups == 0 else (1, 0)


def _centred(vectors: Tensor, groups: int) -> Tensor:
    if groups == 0:
        return vectors
    grouped = vectors.reshape(len(vectors), groups, -1)
    return (grouped - grouped.mean(2, keepdim=True)).flatten(1)


def _scale(module: nn.Module, flat: Tensor, groups: int) -> Tensor | None:
    """(B, C): what the norm multiplies each channel by."""
    weight = getattr(module, "weight", None)
    if weight is not None and weight.numel() != flat.shape[1]:
        return None
    eps = next(
        (one for name in ("eps", "variance_epsilon") if (one := getattr(module, name, 0))),
        None,
    )
    eps = torch.finfo(flat.dtype).eps if eps is None else eps
    squares = _centred(flat, groups).square().reshape(len(flat), groups or 1, -1)
    scale: Tensor = (squares.mean(2, keepdim=True) + eps).rsqrt().expand(squares.shape).flatten(1)
    if weight is not None:
        scale = scale * weight.flatten().to(scale.dtype)
    return scale


def _explains(module: nn.Module, flat: Tensor, scale: Tensor, groups: int, output: Tensor) -> bool:
    """Whether the formula gives what the module returned; on meta there is nothing to compare."""
    if output.is_meta:
        return True
    with torch.no_grad():
        expected = _centred(flat, groups) * scale
        bias = getattr(module, "bias", None)
        if bias is not None:
            expected = expected + bias.flatten().to(expected.dtype)
        off = (expected - output.flatten(1).to(expected.dtype)).abs().amax()
        return bool(off <= _ROUNDINGS * torch.finfo(output.dtype).eps * (1 + expected.abs().amax()))
