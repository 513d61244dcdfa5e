"""What can be captured: models and layers, checked before any hook is set."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from diffsal.errors import DiffsalError
from diffsal.maps.fixed_statistics import may_be_norm
from diffsal.maps.layouts import Reshape
from diffsal.maps.looking import Example
from diffsal.maps.target_layers import TargetLayer, find_target_layer, get_target_layer

Layer: TypeAlias = "TargetLayer | nn.Module | str"
Layers: TypeAlias = "Layer | Sequence[Layer] | None"


class Walk(NamedTuple):
    """What one walk over a model's modules finds; it is taken at every training step.

    Attributes:
        norms: modules that may be norms behind the pooling.
        compiled: modules that were compiled, and whether in place.
    """

    norms: list[nn.Module]
    compiled: list[tuple[nn.Module, bool]]


def walk(model: nn.Module) -> Walk:
    """Refuse models that cannot be captured, and note what a capture needs to know.

    Raises:
        DiffsalError: parameters made in inference mode, or not made yet, or
            ``DistributedDataParallel`` with ``static_graph``.

    Example:
        >>> len(walk(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))).norms)
        1
    """
    found = Walk([], [])
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.static_graph:
            raise DiffsalError(
                "DistributedDataParallel(static_graph=True) gives silently wrong gradients for "
                "losses of maps: build it without static_graph"
            )
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                _check_values(module, tensor)
        in_place = module.__dict__.get("_compiled_call_impl") is not None
        if in_place or "_orig_mod" in module._modules:
            found.compiled.append((module, in_place))
        if not module._modules and may_be_norm(type(module)):
            found.norms.append(module)
    return found


def _check_values(module: nn.Module, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise DiffsalError(
            f"a {type(module).__name__} has no weights before it has run: call the model once, on "
            "a batch of images"
        )
    if tensor.is_inference():
        raise DiffsalError(
            "the model's parameters or buffers were made in inference mode, which autograd "
            "cannot use: build or load the model outside torch.inference_mode()"
        )


def check_compiled(found: Walk, layers: Sequence[TargetLayer]) -> None:
    """Refuse layers inside a compiled module, where hooks do not run.

    Raises:
        DiffsalError: a layer is inside one.
    """
    for module, in_place in found.compiled:
        _check_outside(module, layers, in_place)


def _check_outside(compiled: nn.Module, layers: Sequence[TargetLayer], in_place: bool) -> None:
    if any(part is layer.module for part in compiled.modules() for layer in layers):
        what = (
            "pass a copy on which .compile() was not called"
            if in_place
            else "pass the module it was made from (compiled._orig_mod)"
        )
        raise DiffsalError(f"hooks do not run inside a compiled {type(compiled).__name__}: {what}")


def as_layers(
    model: nn.Module,
    layers: Layers,
    reshape_transform: Reshape | None = None,
    example: Example = None,
) -> list[TargetLayer]:
    """Layers, modules or names as layers of a model; ``None``: the one that is found.

    Raises:
        DiffsalError: there are none, or one is not of the model; see
            :func:`diffsal.maps.target_layers.get_target_layer`.
    """
    if layers is None:
        layers = find_target_layer(getattr(model, "_orig_mod", model), example)
    chosen = [layers] if isinstance(layers, TargetLayer | nn.Module | str) else list(layers)
    if not chosen:
        raise DiffsalError("target_layers is empty: name a layer, or pass None to have it found")
    return [_as_layer(model, layer, reshape_transform, example) for layer in chosen]


def _as_layer(
    model: nn.Module, layer: Layer, reshape: Reshape | None, example: Example
) -> TargetLayer:
    if isinstance(layer, str):
        return get_target_layer(model, layer, example, reshape)
    if isinstance(layer, TargetLayer):
        return layer if reshape is None else replace(layer, reshape=reshape)
    for name, module in model.named_modules():
        if module is layer:
            if not name:
                return TargetLayer("", model, reshape)
            return get_target_layer(model, name, example, reshape)
    raise DiffsalError(f"the target layer {type(layer).__name__} is not part of the model")
