"""What can be captured: models and layers, checked before any hook is set."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from diffsal.errors import DiffsalError
from diffsal.maps.examples import MADE_IN_INFERENCE
from diffsal.maps.fixed_statistics import may_be_norm
from diffsal.maps.layouts import Reshape
from diffsal.maps.looking import Example
from diffsal.maps.parts import Walk, modules_of
from diffsal.maps.target_layers import TargetLayer, find_target_layer, get_target_layer

Layer: TypeAlias = "TargetLayer | nn.Module | str"
Layers: TypeAlias = "Layer | Sequence[Layer] | None"

_SEEN: "WeakKeyDictionary[Walk, tuple[list[int], ...]]" = WeakKeyDictionary()
"""Of walks whose tensors autograd can use, see :func:`_positions`."""
_COMPILED_IN_PLACE = attrgetter("_compiled_call_impl")
_LAZY = UninitializedParameter, UninitializedBuffer


class Admitted(NamedTuple):
    """What a capture needs to know of a model's modules.

    Attributes:
        modules: all of them.
        norms: modules that may be norms behind the pooling.
        compiled: modules that were compiled, and whether in place.
    """

    modules: list[nn.Module]
    norms: list[nn.Module]
    compiled: list[tuple[nn.Module, bool]]


def admit(model: nn.Module) -> Admitted:
    """Refuse models that cannot be captured, and note what a capture needs to know.

    Raises:
        DiffsalError: parameters made in inference mode, or not made yet, or
            ``DistributedDataParallel`` with ``static_graph``.

    Example:
        >>> len(admit(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))).norms)
        1
    """
    modules, walk = modules_of(model)
    if walk not in _SEEN:  # tensors that change later, torch refuses when the model runs
        _check_values(modules)
        _SEEN[walk] = _positions(modules)
    norms, wrapped, parallel = ([modules[one] for one in some] for some in _SEEN[walk])
    _check_ddp(parallel)
    compiled = [(module, False) for module in wrapped]
    in_place = [*map(_COMPILED_IN_PLACE, modules)]
    if in_place.count(None) < len(modules):
        pairs = zip(modules, in_place, strict=True)
        compiled += [(module, True) for module, made in pairs if made is not None]
    return Admitted(modules, norms, compiled)


def _positions(modules: Sequence[nn.Module]) -> tuple[list[int], ...]:
    """Which of them may be norms behind the pooling, hold what they compiled, run in parallel."""
    numbered = [*enumerate(modules)]
    norms = [n for n, one in numbered if not one._modules and may_be_norm(type(one))]
    wrapped = [n for n, one in numbered if "_orig_mod" in one._modules]
    parallel = [n for n, one in numbered if isinstance(one, DistributedDataParallel)]
    return norms, wrapped, parallel


def _check_ddp(modules: Sequence[Any]) -> None:
    for module in modules:
        if module.static_graph:
            raise DiffsalError(
                "DistributedDataParallel(static_graph=True) gives silently wrong gradients for "
                "losses of maps: build it without static_graph"
            )


def _check_values(modules: Sequence[nn.Module]) -> None:
    """Refuse parameters and buffers that autograd cannot use."""
    holders = [(module._parameters, module._buffers) for module in modules]
    values = chain.from_iterable([one.values() for pair in holders for one in pair if one])
    tensors = [tensor for tensor in values if tensor is not None]
    if any(issubclass(kind, _LAZY) for kind in {*map(type, tensors)}):
        lazy = next(one for pair, one in zip(holders, modules, strict=True) if _any_lazy(*pair))
        raise DiffsalError(
            f"a {type(lazy).__name__} has no weights before it has run: call the model once, on "
            "a batch of images"
        )
    if any(map(Tensor.is_inference, tensors)):
        raise DiffsalError(MADE_IN_INFERENCE)


def _any_lazy(*holders: Mapping[str, Tensor | None]) -> bool:
    return any(one is not None and is_lazy(one) for holder in holders for one in holder.values())


def check_compiled(found: Admitted, layers: Sequence[TargetLayer]) -> None:
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
