"""Where maps are taken: a layer that is found by :mod:`diffsal.maps.looking`, or named."""

import difflib
from dataclasses import dataclass, replace

from torch import nn

from diffsal.errors import DiffsalError
from diffsal.maps.layouts import Layout, Reshape
from diffsal.maps.looking import Candidate, Example, Look, called, has_module, look_at
from diffsal.maps.run_record import Place

BRANCHES = " + "

_CERTAIN = (  # what these return is (B, C, h, w), whatever ran
    *(nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AvgPool2d, nn.AvgPool3d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class TargetLayer:
    """Where maps are taken.

    Attributes:
        name: dotted name within the model.
        module: the layer.
        reshape: brings the layer's output to (B, C, h, w); ``None`` where it is so already.
        place: which part of the layer's output it is, an index or a key; ``None``: all of it.
        branches: further layers beside this one, whose maps are added to its.
        call: which of its calls in one forward pass is meant, from 1; ``None``: it runs once.

    Example:
        >>> import torch
        >>> windows = TargetLayer("norm", nn.LayerNorm(96), Layout("channels-last", (7, 7)))
        >>> windows.reshape(windows.module(torch.zeros(1, 7, 7, 96))).shape
        torch.Size([1, 96, 7, 7])
    """

    name: str
    module: nn.Module
    reshape: Reshape | None = None
    place: Place = None
    branches: "tuple[TargetLayer, ...]" = ()
    call: int | None = None

    def __str__(self) -> str:
        return BRANCHES.join(called(one.name, one.call) for one in (self, *self.branches))


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


def find_target_layer(model: nn.Module, example: Example = None) -> TargetLayer:
    """The last feature map over space that all of the logits pass through.

    The model runs once on one image, forward and back, in evaluation mode; what was found is kept
    for as long as the model lives.

    Args:
        model: on its device; it is left as it was.
        example: an input of the model, or a tuple or mapping of its inputs, of which one sample is
            used; ``None``: noise of a size that the model says or takes.

    Raises:
        DiffsalError: no such layer is found, or the model does not run on noise; the message says
            how to name one.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        >>> find_target_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), *head)).name
        '1'
    """
    prefix, inner = unwrap(model)
    look = look_at(inner, example)
    if not look.chosen:
        raise DiffsalError(
            f"{look.reason} in {type(inner).__name__}: name the layer whose output is spatial "
            "(target_layers=[...], or --target-layer NAME)"
        )
    first, *others = (_as_layer(inner, prefix, one) for one in look.chosen)
    return replace(first, branches=tuple(others))


def get_target_layer(
    model: nn.Module, name: str, example: Example = None, reshape: Reshape | None = None
) -> TargetLayer:
    """The layer called ``name``, with the reshape that its output needs.

    Args:
        model: on its device.
        name: dotted; of branches, several names with `` + `` between them; ``NAME#3`` is the third
            call of a layer that runs several times.
        example: see :func:`find_target_layer`.
        reshape: what brings the output to (B, C, h, w), where that is known better.

    Raises:
        DiffsalError: there is no such layer; the message lists names near it.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.ReLU())
        >>> get_target_layer(model, "0.0").module
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    if BRANCHES in name:
        first, *others = (
            get_target_layer(model, one, example, reshape) for one in name.split(BRANCHES)
        )
        return replace(first, branches=tuple(others))
    prefix, inner = unwrap(model)
    modules = {key: module for key, module in inner.named_modules() if key}
    key, _, number = name.removeprefix(prefix).partition("#")
    call = int(number) if number.isdecimal() else None
    if key not in modules or (number and not call):
        near = difflib.get_close_matches(key, modules, n=4, cutoff=0.4)
        hint = ", ".join(near) or ", ".join(child for child, _ in inner.named_children())
        raise DiffsalError(f"the model has no layer {name!r}: near it are {hint}")
    layer = TargetLayer(prefix + key, modules[key], reshape, call=call)
    if reshape is not None or isinstance(modules[key], _CERTAIN):
        return layer
    found = _named(_what_is_seen(inner, example), inner, modules[key], call)
    if found is None:  # where its output is no (B, C, h, w), the capture says so
        return layer
    return replace(layer, place=found.place, reshape=_reshape(found.layout))


def in_copy(model: nn.Module, layer: TargetLayer) -> TargetLayer:
    """The same layer of a copy of its model.

    Example:
        >>> from copy import deepcopy
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        >>> copy = deepcopy(model)
        >>> in_copy(copy, TargetLayer("0", model[0])).module is copy[0]
        True
    """
    branches = tuple(in_copy(model, one) for one in layer.branches)
    return replace(layer, module=model.get_submodule(layer.name), branches=branches)


def _what_is_seen(model: nn.Module, example: Example) -> Look:
    """What a run shows, if the model runs; a named layer may do without."""
    try:
        return look_at(model, example)
    except DiffsalError:
        return Look((), ())


def _as_layer(model: nn.Module, prefix: str, candidate: Candidate) -> TargetLayer:
    return TargetLayer(
        prefix + candidate.name,
        model.get_submodule(candidate.name),
        _reshape(candidate.layout),
        candidate.place,
        call=candidate.call,
    )


def _reshape(layout: Layout) -> Reshape | None:
    return None if layout.kind == "channels-first" else layout


def _named(look: Look, model: nn.Module, module: nn.Module, call: int | None) -> Candidate | None:
    found = [one for one in look.candidates if has_module(model, one.name) and one.call == call]
    of_module = [one for one in found if model.get_submodule(one.name) is module]
    chosen = [one for one in look.chosen if one in of_module]
    return next(reversed(chosen or of_module), None)
