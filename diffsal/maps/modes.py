"""Run a model in evaluation mode without changing its training flags, which all threads share.

A model that is in evaluation mode is run as it is. Of any other, a twin is: modules of its own, so
that the flags are, over the same tensors, hooks and attributes. ``nn.DataParallel`` does likewise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import getclosurevars, isfunction
from itertools import chain
from operator import attrgetter
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.contexts import set_hook
from diffsal.maps.parts import modules_of

_OF_PYTHON = "__dict__", "__weakref__"
_TRAINS = attrgetter("training")
_STEADY: "WeakSet[nn.Module]" = WeakSet()
"""Models that were seen to run in evaluation mode without changing a flag."""


@contextmanager
def evaluated(
    model: nn.Module, *, on_trial: bool = False, modules: list[nn.Module] | None = None
) -> Iterator[nn.Module]:
    """What to run in the model's stead, in evaluation mode: itself, or a twin.

    A model that has not been seen to keep its flags in a run is not run itself: its own forward
    pass may call ``train()``. What a twin's forward pass assigns to ``self``, the model has too.

    Args:
        model: see there.
        on_trial: what the runs assign is forgotten, and the buffers that they change are a twin's.
        modules: the model's, where the caller has just looked.

    Raises:
        DiffsalError: a part of a model in training mode that only runs as it is: it is scripted, or
            reached by a reference that is no submodule; weights that another thread changes.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluated(model) as run:
        ...     run.training, model.training
        (False, True)
    """
    modules = modules_of(model)[0] if modules is None else modules
    is_training = True in [*map(_TRAINS, modules)]
    training = [module for module in modules if module.training] if is_training else []
    if not training and model in _STEADY and not on_trial:
        yield model
        return
    twins, ran = _twins(modules), []
    if on_trial:
        _give_own_buffers(twins)
    run, refused, versions = twins[model], set(training), _versions(modules)
    made = [_attributes(twins[module]) for module in modules]

    def watch(module: nn.Module, _: Any) -> None:
        if module in refused:
            raise _not_alone(module)
        if module is run:
            ran.append(module)

    watched = [m for m in (model, *training) if not isinstance(m, torch.jit.ScriptModule)]
    remove = set_hook(watch, *(module.register_forward_pre_hook for module in watched))
    try:
        yield run
    finally:
        remove()
        if not on_trial:
            for module, attributes in zip(modules, made, strict=True):
                _hand_over(attributes, twins[module], module)
            _hand_over_modules(twins)
    if any(twin.training for twin in twins.values()):
        _STEADY.discard(model)
        return
    if _versions(modules) != versions:
        raise DiffsalError(
            "the model's weights or batch-norm statistics changed meanwhile, as if another thread "
            "trained it: copy it between two steps (copy.deepcopy(model)), and explain the copy"
        )
    if ran:
        _STEADY.add(model)


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """A twin in evaluation mode: modules of its own over a model's tensors and hooks.

    Raises:
        DiffsalError: see :func:`evaluated`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> twin = in_evaluation_mode(model)
        >>> twin is model, twin.weight is model.weight, twin.training, model.training
        (False, True, False, True)
    """
    return _twins(modules_of(model)[0])[model]


def _hand_over(before: dict[str, Any], twin: nn.Module, module: nn.Module) -> None:
    """Of a twin's attributes those that are others than before, but for flags."""
    for name, value in _attributes(twin).items():
        if value is not before.get(name) and name != "training":
            object.__setattr__(module, name, value)


def _hand_over_modules(twins: dict[nn.Module, nn.Module]) -> None:
    """Modules that a run was the first to build."""
    known = set(twins.values())
    for module, twin in twins.items():
        for name, child in twin._modules.items():
            if child is not None and child not in known:
                module.__dict__.pop(name, None)  # a None that stood for it would hide it
                module._modules[name] = child


def _give_own_buffers(twins: dict[nn.Module, nn.Module]) -> None:
    copies: dict[Tensor | None, Tensor | None] = {None: None}
    with torch.inference_mode(False), torch.no_grad():
        for module, twin in twins.items():
            if twin is module:
                continue
            for buffer in module._buffers.values():
                if buffer is not None and buffer not in copies:
                    copies[buffer] = buffer.clone()
            own = {name: copies[buffer] for name, buffer in module._buffers.items()}
            twin.__dict__["_buffers"] = own


def _versions(modules: Sequence[nn.Module]) -> list[int]:
    """How often each of the tensors that training changes was changed."""
    weights = chain.from_iterable(module._parameters.values() for module in modules)
    name = "num_batches_tracked"
    counts = (module._buffers[name] for module in modules if name in module._buffers)
    tensors = (one for one in chain(weights, counts) if one is not None)
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _twins(modules: Sequence[nn.Module]) -> dict[nn.Module, nn.Module]:
    twins = {module: _twin(module) for module in modules}
    for module in reversed(list(twins)):  # what was compiled has the flags of its time in its code
        if "_orig_mod" in module._modules and any(one.training for one in module.modules()):
            twins[module] = twins[module.get_submodule("_orig_mod")]
    for module, twin in list(twins.items()):
        if twin is not module and "_orig_mod" not in module._modules:
            children = module._modules.items()
            twin.__dict__["_modules"] = {
                name: None if child is None else twins[child] for name, child in children
            }
    return twins


def _twin(module: nn.Module) -> nn.Module:
    """One module of its own over the same tensors; itself, where it only runs as it is."""
    if "_orig_mod" in module._modules:
        return module
    if isinstance(module, torch.jit.ScriptModule) or not _can_move(module):
        if module.training:
            raise _not_alone(module)
        return module
    twin: nn.Module = module.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name, value in _slots(module).items():
        object.__setattr__(twin, name, value)
    twin.__dict__["training"] = False
    twin.__dict__["_compiled_call_impl"] = None
    for name, value in module.__dict__.items():
        if type(value) is MethodType and value.__self__ is module:
            twin.__dict__[name] = MethodType(value.__func__, twin)
    return twin


def _attributes(module: nn.Module) -> dict[str, Any]:
    return module.__dict__ | _slots(module)


def _slots(module: nn.Module) -> dict[str, Any]:
    """What is kept outside the dictionary of the module."""
    slots = chain.from_iterable(
        (names,) if isinstance(names, str) else names
        for kind in type(module).__mro__
        for names in (kind.__dict__.get("__slots__", ()),)
    )
    return {
        name: getattr(module, name)
        for name in slots
        if name not in _OF_PYTHON and hasattr(module, name)
    }


def _can_move(module: nn.Module) -> bool:
    """Whether its forward pass is a method, or a function that refers to no module by itself."""
    forward: Callable[..., Any] | None = module.__dict__.get("forward")
    if forward is None or getattr(forward, "__self__", None) is module:
        return True
    if not isfunction(forward):
        return False
    seen = getclosurevars(forward)
    values = (*seen.nonlocals.values(), *seen.globals.values())
    is_plain = not any(isinstance(value, nn.Module | MethodType) for value in values)
    return is_plain and not any(callable(value) for value in seen.nonlocals.values())


def _not_alone(module: nn.Module) -> DiffsalError:
    return DiffsalError(
        f"a {type(module).__name__} in training mode cannot be run in evaluation mode beside the "
        "model (it is scripted, its forward was replaced, or the model reaches it by a reference "
        "that is no submodule): call model.eval() first"
    )
