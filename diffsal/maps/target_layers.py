"""Finds the last spatial feature map of a model from its module structure, without running it.

The heuristic is the order in which modules are registered, which is nearly always the order in
which they run: from the end, whatever belongs to the head (linear layers, pooling, dropout,
flattening, auxiliary classifiers) is passed over, and the first module that computes features over
space is taken. Transformers of class tokens are known by their parts: at the norm after the last
block the patch tokens have no influence any more (their gradient is exactly zero), so the norm at
the entrance of the last block is the layer."""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from diffsal.errors import DiffsalError

Reshape: TypeAlias = Callable[[Tensor], Tensor]

_FEATURES = (
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.MultiheadAttention,
)
_CLASS_TOKENS = ("class_token", "cls_token")
_TOKENS = (*_CLASS_TOKENS, "dist_token", "reg_token")
_HEADS = ("classifier", "fc", "head", "heads", "pre_logits")
_POOLING = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)


@dataclass(frozen=True)
class TargetLayer:
    """Where maps are taken.

    Attributes:
        name: dotted name within the model.
        module: the layer.
        reshape: brings the layer's output to (B, C, h, w); ``None`` where it is so already.

    Example:
        >>> import torch
        >>> windows = TargetLayer("norm", nn.LayerNorm(96), channels_first)  # as of a Swin
        >>> windows.reshape(windows.module(torch.zeros(1, 7, 7, 96))).shape
        torch.Size([1, 96, 7, 7])
    """

    name: str
    module: nn.Module
    reshape: Reshape | None = None


def unwrap(model: nn.Module) -> tuple[str, nn.Module]:
    """Name prefix and module inside ``DataParallel`` and ``DistributedDataParallel``.

    Example:
        >>> unwrap(nn.DataParallel(nn.Linear(2, 2)))
        ('module.', Linear(in_features=2, out_features=2, bias=True))
    """
    prefix = ""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        prefix, model = prefix + "module.", model.module
    return prefix, model


def find_target_layer(model: nn.Module) -> TargetLayer:
    """The last spatial feature map before pooling.

    Raises:
        DiffsalError: no such layer is found; the message says how to name one.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        >>> find_target_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *head)).name
        '1'
    """
    prefix, inner = unwrap(model)
    found = _token_layer(inner) or _last_features(inner)
    if found is None:
        raise DiffsalError(
            f"no convolutional feature map was found in {type(inner).__name__}: name the layer "
            "whose output is spatial (target_layers=[...], or --target-layer NAME)"
        )
    return replace(found, name=prefix + found.name)


def get_target_layer(model: nn.Module, name: str) -> TargetLayer:
    """The layer called ``name``, with the reshape that the model's tokens or windows need.

    Raises:
        DiffsalError: there is no such layer; the message lists names near it.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.ReLU())
        >>> get_target_layer(model, "0.0").module
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    prefix, inner = unwrap(model)
    modules = {key: module for key, module in inner.named_modules() if key}
    key = name.removeprefix(prefix)
    if key not in modules:
        near = difflib.get_close_matches(key, modules, n=4, cutoff=0.4)
        hint = ", ".join(near) or ", ".join(child for child, _ in inner.named_children())
        raise DiffsalError(f"the model has no layer {name!r}: near it are {hint}")
    return TargetLayer(prefix + key, modules[key], _reshape_of(inner, modules[key]))


def _reshape_of(model: nn.Module, layer: nn.Module) -> Reshape | None:
    """What brings the output of any layer of a transformer of tokens or windows to (B, C, h, w)."""
    if isinstance(layer, nn.Conv2d | nn.Conv3d) or _permutes(layer):
        return None
    if tokens := _token_layer(model):
        return tokens.reshape
    found = _last_features(model)
    windowed = found is not None and (_permutes(found.module) or found.reshape is not None)
    return channels_first if windowed else None


def _token_layer(model: nn.Module) -> TargetLayer | None:
    """The norm at the entrance of a class-token transformer's last block."""
    tokens = {
        name: parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if name in _TOKENS and parameter is not None
    }
    if tokens.keys().isdisjoint(_CLASS_TOKENS):
        return None
    prefix_tokens = sum(
        parameter.shape[1] if parameter.ndim == 3 else 1 for parameter in tokens.values()
    )
    blocks = [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith((".ln_1", ".norm1", ".layernorm_before"))
    ]
    if not blocks:
        return None
    name, module = blocks[-1]
    return TargetLayer(name, module, partial(tokens_to_grid, prefix_tokens=prefix_tokens))


def _last_features(module: nn.Module) -> TargetLayer | None:
    for name, child in _from_the_end(module):
        if _permutes(child):
            return TargetLayer(name, child)
        if isinstance(child, nn.LayerNorm) and not _is_norm_2d(child):
            return TargetLayer(name, child, channels_first)
        if not any(isinstance(part, _FEATURES) or _is_norm_2d(part) for part in child.modules()):
            continue
        if not isinstance(child, nn.ModuleList) and not _has_head(child):
            return TargetLayer(name, child)
        inner = _last_features(child)
        if inner is not None:
            return replace(inner, name=f"{name}.{inner.name}")
    return None


def _from_the_end(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children before the global pooling, if that is a child, last first; no heads."""
    children = list(module.named_children())
    pooling = [index for index, (_, child) in enumerate(children) if _pools(child)]
    before = children[: pooling[0]] if pooling else children
    for name, child in reversed(before or children):  # some register the pooling first
        if not name.lower().startswith("aux") and name not in _HEADS:
            yield name, child


def _has_head(module: nn.Module) -> bool:
    """Whether a child is a whole network, as behind a wrapper, rather than a feature extractor."""
    children = list(module.named_children())
    if any(name in _HEADS or _pools(child) for name, child in children):
        return True
    last = children[-1][1] if children else module
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    return isinstance(last, nn.Linear)


def _pools(module: nn.Module) -> bool:
    return isinstance(module, _POOLING) or type(module).__name__ == "SelectAdaptivePool2d"  # timm


def _is_norm_2d(module: nn.Module) -> bool:
    return type(module).__name__ == "LayerNorm2d"  # torchvision's and timm's; channels first


def _permutes(module: nn.Module) -> bool:
    return type(module).__name__ == "Permute"  # torchvision.ops; Swin's (B, C, h, w) at last


def tokens_to_grid(output: Tensor, prefix_tokens: int = 0) -> Tensor:
    """Tokens (B, N, C), of which the first ``prefix_tokens`` are no patches, to (B, C, h, w).

    Raises:
        DiffsalError: the patch tokens do not fill a square.

    Example:
        >>> import torch
        >>> tokens_to_grid(torch.zeros(2, 1 + 14 * 14, 768), prefix_tokens=1).shape
        torch.Size([2, 768, 14, 14])
    """
    patches = output[:, prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    if output.ndim != 3 or side * side != patches.shape[1]:
        raise DiffsalError(
            f"an output of shape {tuple(output.shape)} is no square of patch tokens: pass a "
            "reshape_transform that brings it to (batch, channels, height, width)"
        )
    return channels_first(patches.reshape(len(patches), side, side, -1))


def channels_first(output: Tensor) -> Tensor:
    """Channels-last features (B, ..., C) to (B, C, ...).

    Example:
        >>> import torch
        >>> channels_first(torch.zeros(2, 7, 5, 96)).shape
        torch.Size([2, 96, 7, 5])
    """
    return output.movedim(-1, 1)


def in_copy(model: nn.Module, layer: TargetLayer) -> TargetLayer:
    """The same layer of a copy of its model.

    Example:
        >>> from copy import deepcopy
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        >>> copy = deepcopy(model)
        >>> in_copy(copy, TargetLayer("0", model[0])).module is copy[0]
        True
    """
    return replace(layer, module=model.get_submodule(layer.name))
