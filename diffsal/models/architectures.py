"""From an architecture's name to a module: torchvision's, timm's, and a user's own factory."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from diffsal.errors import DiffsalError, one_line, some_of
from diffsal.models.fitting import assign, current_names, last_layer

SOURCES = ("torchvision:", "timm:", "transformers:")
"""Of architectures that a file may name; any other is a factory."""
INCEPTIONS = ("googlenet", "inception_v3")
# Arguments by which a constructor would fetch or open other files.
_FETCHING = re.compile(r"weights(_backbone)?|(cache|checkpoint|(use_)?pretrained)(_.*)?")

_OWN_ARGUMENTS = ("num_classes", "transform_input")


def build_model(
    architecture: str, arguments: Mapping[str, Any], *, weights: str | None = None
) -> nn.Module:
    """Build a model with fresh weights, or with published ones and a fresh last layer.

    torchvision's GoogLeNet and Inception come without their auxiliary heads unless ``aux_logits``
    is among the arguments.

    Args:
        architecture: a torchvision classification model's name (``"densenet121"`` or
            ``"torchvision:densenet121"``) or class (``"torchvision:DenseNet"``), ``"timm:NAME"``,
            or ``"package.module:factory"``, which may lie in the working directory.
        arguments: keyword arguments of its constructor.
        weights: ``"DEFAULT"``, or another name that torchvision gives to weights of this model;
            downloaded if need be. Where ``num_classes`` is not theirs, the last layer stays fresh,
            see :func:`redraw_fresh_layers`.

    Returns:
        The model as its constructor leaves it, in training mode.

    Raises:
        DiffsalError: there is no such architecture or no such weights, or building it fails.

    Example:
        >>> shape = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8}
        >>> build_model("torchvision:DenseNet", {**shape, "num_classes": 2}).classifier
        Linear(in_features=10, out_features=2, bias=True)
    """
    source, _, name = qualified(architecture).partition(":")
    try:
        if source == "torchvision":
            return _torchvision_model(name, arguments, weights)
        if source == "timm":
            return _timm_model(name, arguments, weights)
        if source == "transformers":
            return _transformers_model(name, arguments, weights)
        return _factory_model(architecture, arguments, weights)
    except DiffsalError:
        raise
    except Exception as error:  # whatever a constructor or a download raises
        raise DiffsalError(
            f"{architecture} cannot be built with {dict(arguments)}: {one_line(error)}"
        ) from error


def redraw_fresh_layers(model: nn.Module, kept: Collection[str]) -> None:
    """Draw the linear layers that are not kept as torch does, whatever the architecture does.

    EfficientNets draw their last layer for thousands of classes: two rows are as wide as 0.7, their
    logits about 10, and the first steps of training undo what the other layers have learned.

    Args:
        model: changed in place.
        kept: names of the parameters that were loaded.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2)).requires_grad_(False)
        >>> for layer in model:
        ...     _ = layer.weight.fill_(9)
        >>> redraw_fresh_layers(model, kept=["0.weight", "0.bias"])
        >>> model[0].weight.abs().max().item(), model[1].weight.abs().max().item() <= 2**-0.5
        (9.0, True)
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" not in kept:
            module.reset_parameters()


def qualified(architecture: str) -> str:
    """``torchvision:NAME`` for a bare name.

    Example:
        >>> qualified("densenet121"), qualified("timm:resnet18")
        ('torchvision:densenet121', 'timm:resnet18')
    """
    return architecture if ":" in architecture else f"torchvision:{architecture}"


def check_confirmed(
    architecture: str, arguments: Mapping[str, Any], trusted: bool | Mapping[str, Any]
) -> None:
    """Refuse a file's arguments for a factory, unless they are confirmed.

    The number of classes and ``transform_input``, which diffsal itself writes, need no word.

    Raises:
        DiffsalError: there are others; the message shows them.

    Example:
        >>> check_confirmed("own:net", {"num_classes": 2, "width": 8}, {"width": 8})
        >>> check_confirmed("own:net", {"width": 8}, False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: has own:net called with width=8: if that is meant, pass ...
    """
    if trusted is True or architecture.startswith(SOURCES):
        return
    meant = trusted or {}
    shown = [
        f"{name}={value!r}"[:60]
        for name, value in arguments.items()
        if not (name in _OWN_ARGUMENTS and isinstance(value, int))
        and not (name in meant and meant[name] == value)
    ]
    if shown:
        raise DiffsalError(
            f"has {architecture} called with {', '.join(shown)}: if that is meant, pass "
            "--trust-arguments (to diffsal train, the same arguments)"
        )


def check_origin(architecture: str, arguments: Mapping[str, Any], *, chosen_by_user: bool) -> None:
    """Refuse what a file may not choose: code to run, and other files to fetch.

    Raises:
        DiffsalError: the architecture is a factory and not `chosen_by_user`, or the arguments would
            have torchvision or timm fetch files.

    Example:
        >>> check_origin("timm:resnet18", {"pretrained": True}, chosen_by_user=True)
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: its architecture's arguments would fetch files: pretrained
    """
    if not architecture.startswith(SOURCES):
        if not chosen_by_user:
            raise DiffsalError(
                f"its architecture is code that a file cannot have run: if you trust "
                f"{architecture}, pass --arch {architecture}"
            )
    elif fetching := [k for k, value in arguments.items() if value and _FETCHING.fullmatch(k)]:
        raise DiffsalError(f"its architecture's arguments would fetch files: {some_of(fetching)}")


def _torchvision_model(name: str, arguments: Mapping[str, Any], weights: str | None) -> nn.Module:
    names = torchvision_models.list_models(module=torchvision_models)
    named = getattr(torchvision_models, name, None)
    constructor: Callable[..., nn.Module]
    if name in names:
        constructor = torchvision_models.get_model_builder(name)
    elif isinstance(named, type) and issubclass(named, nn.Module):
        constructor = named
    else:
        raise DiffsalError(f"torchvision has no classification model {name!r}{_near(name, names)}")
    if name in INCEPTIONS:
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    if weights is None:
        return constructor(**arguments)

    published = torchvision_models.get_model_weights(name).__members__ if name in names else {}
    if weights not in published:
        known = ", ".join(published) or "none"
        raise DiffsalError(f"{name} has no weights {weights!r}; published are: {known}")
    chosen = published[weights]
    if name in INCEPTIONS:
        arguments = {"transform_input": True, **arguments}
    model = constructor(**{"num_classes": len(chosen.meta["categories"]), **arguments})
    state = current_names(chosen.get_state_dict(progress=True, check_hash=True), model)
    last = last_layer(model)
    redraw_fresh_layers(model, [key for key in state if not key.startswith(f"{last}.")])
    fresh = {key: value for key, value in model.state_dict().items() if key.startswith(f"{last}.")}
    if any(state[key].shape != value.shape for key, value in fresh.items()):
        state.update(fresh)
    assign(model, state, f"torchvision:{name}")
    return model


def _timm_model(name: str, arguments: Mapping[str, Any], weights: str | None) -> nn.Module:
    timm = timm_with(name)
    if weights not in (None, "DEFAULT"):
        raise DiffsalError(f"timm names weights in the model's name: timm:{name}.{weights}")
    model: nn.Module = timm.create_model(name, pretrained=weights is not None, **arguments)
    theirs = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if weights is not None and arguments.get("num_classes", theirs) != theirs:
        fresh = {id(module) for module in _classifiers(model)}
        kept = [f"{name}.weight" for name, one in model.named_modules() if id(one) not in fresh]
        redraw_fresh_layers(model, kept)
    return model


def _transformers_model(name: str, arguments: Mapping[str, Any], weights: str | None) -> nn.Module:
    if weights is not None:
        raise DiffsalError("name the folder of transformers' weights instead: --weights FOLDER")
    transformers = transformers_module()
    config = transformers.AutoConfig.for_model(name, **arguments)
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(
        config, trust_remote_code=False
    )
    return model


def transformers_module() -> Any:
    """The module, if it is installed."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise DiffsalError(
            "transformers is not installed: pip install 'diffsal[transformers]'"
        ) from error


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    """timm's heads: one, or two of a distilled model."""
    heads = model.get_classifier()
    return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def _factory_model(
    architecture: str, arguments: Mapping[str, Any], weights: str | None
) -> nn.Module:
    if weights is not None:
        raise DiffsalError(f"{architecture} has no published weights; let the factory load them")
    model = find_factory(architecture)(**arguments)
    if not isinstance(model, nn.Module):
        raise DiffsalError(f"{architecture} returns {type(model).__name__}, not a torch.nn.Module")
    return model


def timm_with(name: str) -> Any:
    """The module, if it has a model of that name; a name that it would fetch from a hub is none."""
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise DiffsalError("timm is not installed: pip install 'diffsal[timm]'") from error
    if not timm.is_model(name):
        raise DiffsalError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    return timm


def find_factory(architecture: str) -> Callable[..., Any]:
    """What ``package.module:factory`` names; it may lie in the working directory.

    Example:
        >>> find_factory("collections:OrderedDict.fromkeys")("ab")
        OrderedDict([('a', None), ('b', None)])
    """
    module, _, attribute = architecture.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not see it by itself
        sys.path.append(os.getcwd())
    try:
        found: object = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the import of others' code raises
        raise DiffsalError(
            f"--arch {architecture} cannot be imported: {one_line(error)}"
        ) from error
    if not callable(found):
        raise DiffsalError(f"--arch {architecture} is not callable: name a function or a class")
    return found


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=4)
    return f"; near it are {', '.join(near)}" if near else ""
