"""Norms behind the pooling, with their scale held fixed while maps are taken.

LayerNorm, GroupNorm and RMSNorm undo whatever scales their input, so that to first order the cells'
contributions cancel: their sum is zero, whatever the logit. With the scale held fixed the norm is
linear (the mean that it subtracts is so already), and behind global average pooling the map adds up
again. The forward pass, and every gradient but that of a map, stay what they are.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_MAY_BE_NORM: dict[type[nn.Module], bool] = {}
_ROUNDINGS = 16  # of the type, relative, that a norm may differ from its formula by


class Switch:
    """Whether scales are held fixed now: while a map is taken."""

    on = False


def may_be_norm(kind: type[nn.Module]) -> bool:
    """Whether modules of a type may be such norms, by its name; batch norms are linear as it is.

    Example:
        >>> may_be_norm(nn.LayerNorm), may_be_norm(nn.BatchNorm2d), may_be_norm(nn.Linear)
        (True, False, False)
    """
    if kind not in _MAY_BE_NORM:
        name = kind.__name__.lower()
        is_batch = issubclass(kind, nn.modules.batchnorm._NormBase) or "batch" in name
        _MAY_BE_NORM[kind] = "norm" in name and not is_batch
    return _MAY_BE_NORM[kind]


_GROUPS: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
"""Of norms whose formula was seen to give what they return."""
_BEHIND: "WeakKeyDictionary[nn.Module, tuple[list[nn.Module], list[nn.Module]]]"
_BEHIND = WeakKeyDictionary()


def norms_to_hold(model: nn.Module, norms: list[nn.Module]) -> list[nn.Module]:
    """Of a model's norms, those that were seen to run behind the pooling; all, if none was seen."""
    known, behind = _BEHIND.get(model, ([], []))
    return behind if known == norms else norms


def remember_norms(model: nn.Module, norms: list[nn.Module], behind: list[nn.Module]) -> None:
    """Spare a model's next runs the hooks on norms that do not run behind the pooling."""
    if model not in norms:  # a value that holds its key would never go
        _BEHIND[model] = norms, behind


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
    known = _GROUPS.get(module)
    for groups in _possible_groups(module, flat.shape[1]) if known is None else (known,):
        scale = _scale(module, flat, groups)
        if scale is None:
            continue
        if known is not None or _explains(module, flat, scale, groups, output):
            _GROUPS[module] = groups
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
        return output.clone()  # no view, which must not be changed in place behind the norm

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
