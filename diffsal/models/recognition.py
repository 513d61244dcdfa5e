"""From a weights file to a model, its classes, its preprocessing and its target layer.

A weights file is data: nothing in it is executed, and it can name no code but torchvision's and
timm's own architectures. The architecture of a plain ``state_dict`` is recognized from its
parameters' names and shapes.
"""

import difflib
import hashlib
import inspect
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torchvision import models as torchvision_models
from torchvision.models.resnet import Bottleneck

from diffsal.errors import DiffsalError
from diffsal.files import replacing
from diffsal.images import Preprocessing
from diffsal.target_layers import TargetLayer, find_target_layer, get_target_layer

__all__ = [
    "LoadedModel",
    "build_model",
    "check_class_order",
    "load_model",
    "redraw_fresh_layers",
    "save_checkpoint",
]

State: TypeAlias = dict[str, Tensor]

FORMAT_VERSION = 1

# Every classification model of torchvision: under a key that its family alone has, the number of
# its backbone's keys (without heads and num_batches_tracked) and of their elements (without the
# position embedding, which follows the image's size).
# fmt: off
ARCHITECTURES: dict[str, dict[str, tuple[int, int]]] = {
    "Conv2d_1a_3x3.conv.weight": {
        "inception_v3": (470, 21_820_000),
    },
    "class_token": {
        "vit_b_16": (150, 85_647_360), "vit_b_32": (150, 87_416_832),
        "vit_h_14": (390, 630_435_840), "vit_l_16": (294, 303_099_904),
        "vit_l_32": (294, 305_459_200),
    },
    "conv1.0.weight": {
        "shufflenet_v2_x0_5": (280, 349_744), "shufflenet_v2_x1_0": (280, 1_269_784),
        "shufflenet_v2_x1_5": (280, 2_502_064), "shufflenet_v2_x2_0": (280, 5_378_712),
    },
    "conv1.conv.weight": {
        "googlenet": (285, 5_614_464),
    },
    "conv1.weight": {
        "resnet101": (520, 42_605_504), "resnet152": (775, 58_295_232),
        "resnet18": (100, 11_186_112), "resnet34": (180, 21_301_696), "resnet50": (265, 23_561_152),
        "resnext101_32x8d": (520, 86_945_216), "resnext101_64x4d": (520, 81_609_152),
        "resnext50_32x4d": (265, 23_048_128), "wide_resnet101_2": (520, 124_975_552),
        "wide_resnet50_2": (265, 66_902_464),
    },
    "features.0.0.weight": {
        "convnext_base": (340, 87_564_416), "convnext_large": (340, 196_227_264),
        "convnext_small": (340, 49_453_152), "convnext_tiny": (178, 27_818_592),
        "efficientnet_b0": (309, 4_049_564), "efficientnet_b1": (437, 6_575_232),
        "efficientnet_b2": (437, 7_768_562), "efficientnet_b3": (494, 10_783_528),
        "efficientnet_b4": (608, 17_673_816), "efficientnet_b5": (736, 28_513_520),
        "efficientnet_b6": (850, 40_960_136), "efficientnet_b7": (1035, 64_097_680),
        "efficientnet_v2_l": (1329, 117_746_848), "efficientnet_v2_m": (961, 53_150_388),
        "efficientnet_v2_s": (670, 20_331_360), "mobilenet_v2": (260, 2_257_984),
        "mobilenet_v3_large": (262, 2_996_352), "mobilenet_v3_small": (206, 939_120),
        "swin_b": (351, 86_800_848), "swin_s": (351, 48_894_882), "swin_t": (183, 27_548_166),
        "swin_v2_b": (447, 87_014_952), "swin_v2_s": (447, 49_077_546),
        "swin_v2_t": (231, 27_637_122),
    },
    "features.0.weight": {
        "alexnet": (10, 2_469_696), "squeezenet1_0": (50, 735_424), "squeezenet1_1": (50, 722_496),
        "vgg11": (16, 9_220_480), "vgg11_bn": (48, 9_231_488), "vgg13": (20, 9_404_992),
        "vgg13_bn": (60, 9_416_768), "vgg16": (26, 14_714_688), "vgg16_bn": (78, 14_731_584),
        "vgg19": (32, 20_024_384), "vgg19_bn": (96, 20_046_400),
    },
    "features.conv0.weight": {
        "densenet121": (604, 7_037_504), "densenet161": (804, 26_691_936),
        "densenet169": (844, 12_642_880), "densenet201": (1004, 18_321_984),
    },
    "layers.0.weight": {
        "mnasnet0_5": (260, 958_136), "mnasnet0_75": (260, 1_919_016),
        "mnasnet1_0": (260, 3_140_232), "mnasnet1_3": (260, 5_050_072),
    },
    "stem.0.0.weight": {
        "maxvit_t": (543, 30_244_382),
    },
    "stem.0.weight": {
        "regnet_x_16gf": (355, 52_340_704), "regnet_x_1_6gf": (295, 8_320_640),
        "regnet_x_32gf": (370, 105_452_576), "regnet_x_3_2gf": (400, 14_350_112),
        "regnet_x_400mf": (355, 5_132_832), "regnet_x_800mf": (265, 6_623_968),
        "regnet_x_8gf": (370, 37_742_112), "regnet_y_128gf": (538, 637_834_966),
        "regnet_y_16gf": (367, 80_687_956), "regnet_y_1_6gf": (538, 10_366_102),
        "regnet_y_32gf": (405, 141_492_058), "regnet_y_3_2gf": (424, 17_989_498),
        "regnet_y_400mf": (329, 3_930_296), "regnet_y_800mf": (291, 5_677_944),
        "regnet_y_8gf": (348, 37_451_000),
    },
}
# fmt: on

_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
_HEADS = ("classifier.", "fc.", "head.", "heads.", *_AUXILIARY)
_INCEPTIONS = ("googlenet", "inception_v3")
_OLD_NAMES = (
    # DenseNet before torchvision 0.3 and its published weights to this day; ViT before 0.14.
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)"), r"\1"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)

# Entries of a training checkpoint under which the model is found, and parts of names there of what
# has no part in its prediction.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
_COPIES = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)", re.IGNORECASE)
_CRITERIA = re.compile(r"(^|[._])(criterion|loss|metrics?)([._]|$)", re.IGNORECASE)
# Arguments by which a constructor would fetch or open other files.
_FETCHING = re.compile(r"weights(_backbone)?|(cache|checkpoint|pretrained)(_.*)?")

_SAVE_WEIGHTS = "save its weights, torch.save({}, 'weights.pt'), where it can be loaded"
_DAMAGED = "is damaged, or no file of PyTorch weights: copy or download it again"
_PROGRAMS = {  # an archive is told by how the name of one of its members ends
    "/constants.pkl": ("a TorchScript program", "torch.jit.load(PATH).state_dict()"),
    "/archive_format": ("an exported program", "torch.export.load(PATH).state_dict"),
    "exported_program.json": ("an exported program", "torch.export.load(PATH).state_dict"),
}
_PASS_ARCH = "pass --arch NAME (torchvision), timm:NAME or package.module:factory"


@dataclass(frozen=True)
class LoadedModel:
    """What a weights file holds, and what had to be assumed beside it.

    Attributes:
        model: in eval mode, on the CPU, in the file's dtype.
        architecture: ``"torchvision:NAME"``, ``"timm:NAME"`` or ``"package.module:factory"``.
        arguments: of its constructor; with `architecture`, what `save_checkpoint` needs.
        classes: names in the order of the outputs, where the file carries them.
        preprocessing: what the file carries, or what its architecture implies (`notes` says so);
            ``None`` where neither is known.
        target_layer: where maps are taken.
        path: of the file.
        sha256: of the file's bytes, hexadecimal.
        notes: one line each on what the file could not tell.
    """

    model: nn.Module
    architecture: str
    arguments: dict[str, Any]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    target_layer: TargetLayer
    path: Path
    sha256: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Contents:
    """The parts of a file; all but the state are there in diffsal's own checkpoints alone."""

    state: State
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    target_layer: str | None = None


def load_model(
    path: str | Path, *, arch: str | None = None, target_layer: str | None = None
) -> LoadedModel:
    """Load a model from a file of weights.

    Args:
        path: a ``state_dict`` saved by ``torch.save`` or as safetensors, a training checkpoint that
            contains one, or a checkpoint of `save_checkpoint`.
        arch: the architecture, where the file does not tell, as for `build_model`; a factory is
            called with the checkpoint's arguments, else with ``num_classes`` if it takes that.
        target_layer: dotted name of the layer where maps are taken; found by itself if None.

    Raises:
        DiffsalError: the file is no file of weights, the architecture is not recognized or does not
            fit, a weight is not finite, or no target layer is found.
    """
    try:
        return _load(Path(path), arch, target_layer)
    except DiffsalError as error:
        raise DiffsalError(f"{path}: {error}") from error


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    architecture: str,
    arguments: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    target_layer: str | None = None,
    **extra: Any,
) -> None:
    """Write a checkpoint that `load_model` reads without further options.

    The file appears whole or not at all, and ``torch.load(weights_only=True)`` reads it.

    Args:
        path: of the file.
        model: whose ``state_dict`` is saved, as it is.
        architecture: as for `build_model`.
        arguments: of its constructor, made of numbers, strings, booleans, None, and lists, tuples
            and dicts of these.
        classes: names in the order of the outputs.
        preprocessing: of the model's input.
        target_layer: dotted name of the layer where maps are taken; None to have it found.
        extra: more entries of plain types and tensors, such as an optimizer's state.
    """
    arguments = dict(arguments)
    if hasattr(model, "transform_input"):  # no state, and published weights change its default
        arguments["transform_input"] = model.transform_input
    checkpoint = {
        **extra,
        "format": "diffsal",
        "format_version": FORMAT_VERSION,
        "architecture": {"name": _qualified(architecture), "arguments": arguments},
        "classes": None if classes is None else list(classes),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "target_layer": target_layer,
        "state_dict": model.state_dict(),
    }
    with replacing(Path(path)) as scratch:
        torch.save(checkpoint, scratch)


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
    """
    source, _, name = _qualified(architecture).partition(":")
    try:
        if source == "torchvision":
            return _torchvision_model(name, arguments, weights)
        if source == "timm":
            return _timm_model(name, arguments, weights)
        return _factory_model(architecture, arguments, weights)
    except DiffsalError:
        raise
    except Exception as error:  # whatever a constructor or a download raises
        raise DiffsalError(
            f"{architecture} cannot be built with {dict(arguments)}: {_one_line(error)}"
        ) from error


def redraw_fresh_layers(model: nn.Module, kept: Collection[str]) -> None:
    """Draw the linear layers that are not kept as torch does, whatever the architecture does.

    EfficientNets draw their last layer for thousands of classes: two rows are as wide as 0.7, their
    logits about 10, and the first steps of training undo what the other layers have learned.

    Args:
        model: changed in place.
        kept: names of the parameters that were loaded.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" not in kept:
            module.reset_parameters()


def check_class_order(loaded: LoadedModel, classes: Sequence[str], source: str | Path) -> None:
    """Refuse labels that name a model's classes in another order than its outputs.

    Args:
        loaded: the model; where its file names no classes, or others, every order is taken.
        classes: names in the order of the labels.
        source: where the labels are from, for the message.

    Raises:
        DiffsalError: the same names, in another order.
    """
    own = list(loaded.classes or ())
    if sorted(own) == sorted(classes) and own != list(classes):
        names = ",".join(own)
        raise DiffsalError(
            f"{source}: its classes are {','.join(classes)}, those of {loaded.path} are {names}: "
            f"read it with --classes {names}"
        )


def _load(path: Path, arch: str | None, target_layer: str | None) -> LoadedModel:
    loaded, sha256 = _read(path)
    contents = _contents(loaded)
    architecture = _qualified(arch or contents.architecture or _recognize(contents.state))
    recorded = contents.architecture is not None
    arguments = contents.arguments if recorded else _arguments(architecture, contents.state)
    _check_origin(architecture, arguments, chosen_by_user=arch is not None)
    is_torchvisions = architecture.startswith("torchvision:")
    with _without_initialization() if is_torchvisions else nullcontext():
        model = build_model(architecture, arguments)
    state, notes = _unwrap(contents.state, model)
    if is_torchvisions:
        state = _current_names(state, model)
        outputs, head_notes = _fit_head(model, state)
        arguments = {**arguments, "num_classes": outputs}
        notes += head_notes
    _assign(model, state, architecture)

    if is_torchvisions and not recorded:
        notes += _undecided(model)
    preprocessing = contents.preprocessing or _usual_preprocessing(model)
    if contents.preprocessing is None:
        notes.append(_assumed(preprocessing or Preprocessing()))
    if contents.classes is None:
        notes.append("the file does not name the classes (--classes)")
    layer = target_layer or contents.target_layer
    return LoadedModel(
        model=model.eval(),
        architecture=architecture,
        arguments=arguments,
        classes=contents.classes,
        preprocessing=preprocessing,
        target_layer=get_target_layer(model, layer) if layer else find_target_layer(model),
        path=path,
        sha256=sha256,
        notes=tuple(notes),
    )


# --- architectures --------------------------------------------------------------------------------


def _qualified(architecture: str) -> str:
    return architecture if ":" in architecture else f"torchvision:{architecture}"


def _is_factory(architecture: str) -> bool:
    return not architecture.startswith(("torchvision:", "timm:"))


def _check_origin(architecture: str, arguments: Mapping[str, Any], *, chosen_by_user: bool) -> None:
    """Refuse what a file may not choose: code to run, and other files to fetch."""
    if _is_factory(architecture):
        if not chosen_by_user:
            raise DiffsalError(
                f"its architecture is code that a file cannot have run: if you trust "
                f"{architecture}, pass --arch {architecture}"
            )
    elif fetching := [k for k, value in arguments.items() if value and _FETCHING.fullmatch(k)]:
        raise DiffsalError(f"its architecture's arguments would fetch files: {_some(fetching)}")


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
    if name in _INCEPTIONS:
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    if weights is None:
        return constructor(**arguments)

    published = torchvision_models.get_model_weights(name).__members__ if name in names else {}
    if weights not in published:
        known = ", ".join(published) or "none"
        raise DiffsalError(f"{name} has no weights {weights!r}; published are: {known}")
    chosen = published[weights]
    if name in _INCEPTIONS:
        arguments = {"transform_input": True, **arguments}
    model = constructor(**{"num_classes": len(chosen.meta["categories"]), **arguments})
    state = _current_names(chosen.get_state_dict(progress=True, check_hash=True), model)
    last = _last_layer(model)
    redraw_fresh_layers(model, [key for key in state if not key.startswith(f"{last}.")])
    fresh = {key: value for key, value in model.state_dict().items() if key.startswith(f"{last}.")}
    if any(state[key].shape != value.shape for key, value in fresh.items()):
        state.update(fresh)
    _assign(model, state, f"torchvision:{name}")
    return model


def _timm_model(name: str, arguments: Mapping[str, Any], weights: str | None) -> nn.Module:
    timm = _timm_with(name)
    if weights not in (None, "DEFAULT"):
        raise DiffsalError(f"timm names weights in the model's name: timm:{name}.{weights}")
    model: nn.Module = timm.create_model(name, pretrained=weights is not None, **arguments)
    theirs = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if weights is not None and arguments.get("num_classes", theirs) != theirs:
        fresh = {id(module) for module in _classifiers(model)}
        kept = [f"{name}.weight" for name, one in model.named_modules() if id(one) not in fresh]
        redraw_fresh_layers(model, kept)
    return model


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    """timm's heads: one, or two of a distilled model."""
    heads = model.get_classifier()
    return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def _factory_model(
    architecture: str, arguments: Mapping[str, Any], weights: str | None
) -> nn.Module:
    if weights is not None:
        raise DiffsalError(f"{architecture} has no published weights; let the factory load them")
    model = _factory(architecture)(**arguments)
    if not isinstance(model, nn.Module):
        raise DiffsalError(f"{architecture} returns {type(model).__name__}, not a torch.nn.Module")
    return model


def _timm_with(name: str) -> Any:
    """The module, if it has a model of that name; a name that it would fetch from a hub is none."""
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise DiffsalError("timm is not installed: pip install 'diffsal[timm]'") from error
    if not timm.is_model(name):
        raise DiffsalError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    return timm


def _factory(architecture: str) -> Callable[..., Any]:
    module, _, attribute = architecture.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not see it by itself
        sys.path.append(os.getcwd())
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the import of others' code raises
        raise DiffsalError(
            f"--arch {architecture} cannot be imported: {_one_line(error)}"
        ) from error
    if not callable(found):
        raise DiffsalError(f"--arch {architecture} is not callable: name a function or a class")
    factory: Callable[..., Any] = found
    return factory


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=4)
    return f"; near it are {', '.join(near)}" if near else ""


@contextmanager
def _without_initialization() -> Iterator[None]:
    """Have modules made here without memory for their parameters, and so without random numbers.

    Unlike on the meta device as a whole, buffers and what is computed on the way are real. That
    suits all of torchvision's models; some of timm's compute buffers from parameters.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


# --- from a state to its architecture -------------------------------------------------------------


def _recognize(state: State) -> str:
    """The torchvision classification model with a backbone of this many keys, nearest in size."""
    for stem, family in ARCHITECTURES.items():
        for prefix in _prefixes(state, stem):
            keys, elements = _backbone_size(_behind(state, prefix))
            off = {name: abs(n - elements) for name, (k, n) in family.items() if k == keys}
            if off:
                return min(off, key=off.__getitem__)
    raise DiffsalError(
        f"no torchvision classification model has these parameters ({_some(state)}): {_PASS_ARCH}"
    )


def _backbone_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers of keys and of elements, as in ``ARCHITECTURES``."""
    backbone = {
        key: 0 if key == "encoder.pos_embedding" else value.numel()
        for key, value in state.items()
        if not key.startswith(_HEADS) and not key.endswith("num_batches_tracked")
    }
    return len(backbone), sum(backbone.values())


def _arguments(architecture: str, state: State) -> dict[str, Any]:
    """The constructor's arguments as far as a plain state tells them before the model is built."""
    source, _, name = architecture.partition(":")
    if source == "timm":
        head = _timm_with(name).models.get_pretrained_cfg_value(name, "classifier")
        head = head[0] if isinstance(head, tuple) else head  # several, if distilled
        weight = _ending(state, f"{head}.weight")
        return {} if weight is None else {"num_classes": len(weight)}
    if source != "torchvision":
        weights = [
            value for key, value in state.items() if key.endswith("weight") and value.ndim > 1
        ]
        takes = weights and _takes_num_classes(_factory(architecture))
        return {"num_classes": len(weights[-1])} if takes else {}
    if name in _INCEPTIONS:
        return {"transform_input": True}  # as with the published weights; _undecided says so
    positions, patches = (
        _ending(state, key) for key in ("encoder.pos_embedding", "conv_proj.weight")
    )
    if name.startswith("vit_") and positions is not None and patches is not None:
        side = math.isqrt(positions.shape[1] - 1)  # one position is the class token's
        return {"image_size": side * patches.shape[-1]}
    return {}


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # built in C
        return False
    return any(
        parameter.name == "num_classes" or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


def _ending(state: State, suffix: str) -> Tensor | None:
    return next((v for k, v in state.items() if k == suffix or k.endswith(f".{suffix}")), None)


# --- from a state to a model's weights ------------------------------------------------------------


def _prefixes(state: State, key: str) -> list[str]:
    """What wrappers have put before a model's key; before those of averaged copies of it last."""
    prefixes = [name.removesuffix(key) for name in state if f".{name}".endswith(f".{key}")]
    return sorted(prefixes, key=lambda prefix: _COPIES.search(prefix) is not None)


def _behind(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _unwrap(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """The entries behind the prefix that makes most of them the model's, and what to note."""
    names = model.state_dict().keys()
    prefix = max(
        _prefixes(state, next(iter(names))),
        key=lambda prefix: len(names & _behind(state, prefix).keys()),
        default="",
    )
    beside = [key for key in state if not key.startswith(prefix)]
    layers = [
        key
        for key in beside
        if key.endswith("weight")
        and state[key].ndim > 1
        and not _COPIES.search(key)
        and not _CRITERIA.search(key)
    ]
    if layers:
        raise DiffsalError(
            f"beside the network {prefix.rstrip('.')!r} there are layers that it does not have "
            f"({_some(layers)}): pass --arch package.module:factory that builds them too"
        )
    notes = [f"passed over what stands beside the model: {_some(beside)}"] if beside else []
    return _behind(state, prefix), notes


def _current_names(state: State, model: nn.Module) -> State:
    """With torchvision's names of today, and without auxiliary heads if the model has none."""
    own = model.state_dict()
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _OLD_NAMES:
            key = pattern.sub(replacement, key)
        if key in own or not key.startswith(_AUXILIARY):
            renamed[key] = value
    return renamed


def _fit_head(model: nn.Module, state: State) -> tuple[int, list[str]]:
    """Give the model's last layer the place and the number of outputs that the state's has.

    Returns:
        The number of outputs, and what to note.

    Raises:
        DiffsalError: there is no head, or names and shapes do not tell what it computes.
    """
    last = _last_layer(model)
    root = last.partition(".")[0]
    before = model.state_dict()
    own, found = (
        {key.rpartition(".")[0] for key in keys if key.startswith(f"{root}.")}
        for keys in (before, state)
    )
    if not found:
        raise DiffsalError(f"there is no classification head ({root}.weight): {_PASS_ARCH}")
    place = _last_place(own, found, last)
    weight = state.get(f"{place}.weight")
    convolution = isinstance(model.get_submodule(last), nn.Conv2d)
    if (
        place is None
        or weight is None
        or weight.ndim != (4 if convolution else 2)
        or (convolution and not f"{place}.".startswith(f"{last}."))  # ReLU and pooling follow
    ):
        raise DiffsalError(
            f"the layers of its head ({_some(sorted(found))}) do not tell what stands between "
            "them: pass --arch package.module:factory that builds it"
        )

    if own - found <= {last}:
        width = before[f"{last}.weight"].shape[1]
        _place(model, last, nn.Identity())
    else:  # one layer for the whole head
        width = next(v for k, v in before.items() if k.startswith(f"{root}.")).shape[-1]
        setattr(model, root, _flattening(model.get_submodule(root)))
    with _without_initialization():
        make = partial(nn.Conv2d, kernel_size=1) if convolution else nn.Linear
        _place(model, place, make(width, len(weight), bias=f"{place}.bias" in state))
    note = f"taken as the head's last layer, with nothing but dropout before it: {place}"
    return len(weight), [] if place == last else [note]


def _last_layer(model: nn.Module) -> str:
    """Name of the last module with parameters: in torchvision's classifiers, the last layer."""
    return list(model.state_dict())[-1].rpartition(".")[0]


def _last_place(own: set[str], found: set[str], last: str) -> str | None:
    """Where the last layer is: the others must be where the family has them, or be none."""
    moved, gone = found - own, own - found
    if not moved and not gone:
        return last
    if len(moved) == 1 and gone == {last}:
        return min(moved)
    return min(found) if len(found) == 1 else None


def _flattening(head: nn.Module) -> nn.Sequential:
    """An empty head that flattens its input if the family's own head does."""
    flatten = nn.Sequential()
    if any(isinstance(module, nn.Flatten) for module in head.modules()):
        flatten.add_module("pool", nn.AdaptiveAvgPool2d(1))
        flatten.add_module("flatten", nn.Flatten())
    return flatten


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer at a dotted name; what is no container on the way becomes a Sequential."""
    parent = model
    *containers, leaf = name.split(".")
    for part in containers:
        child = parent._modules.get(part)
        if not isinstance(child, nn.Sequential):
            child = nn.Sequential()
            parent.add_module(part, child)
        parent = child
    parent.add_module(leaf, layer)


def _assign(model: nn.Module, state: State, architecture: str) -> None:
    """Make the state's tensors the model's parameters and buffers, in the state's dtype."""
    own = model.state_dict()
    problems = []
    if missing := [k for k in own if k not in state and not k.endswith("num_batches_tracked")]:
        problems.append(f"missing: {_some(missing)}")
    if unexpected := [key for key in state if key not in own]:
        problems.append(f"unexpected: {_some(unexpected)}")
    if differing := [k for k in own if k in state and not _fits(state[k], own[k])]:
        first = differing[0]
        problems.append(
            f"of another shape: {_some(differing)} ({first} is {_shape(state[first])} in the file, "
            f"{_shape(own[first])} in the model)"
        )
    if problems:
        raise DiffsalError(
            f"the weights do not fit {architecture} ({'; '.join(problems)}): pass the --arch that "
            "they were saved from"
        )
    for key, value in state.items():
        if not _finite(value):
            raise DiffsalError(
                f"{key} holds NaN or infinite values: take a checkpoint from before it diverged"
            )
        if not own[key].is_floating_point():  # counts and indices, where all was made float16
            state[key] = value.to(own[key].dtype)
    own.update(state)  # keeps the versions of the modules' formats, which MNASNet insists on
    model.load_state_dict(own, assign=True)


def _fits(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and value.is_floating_point() >= own.is_floating_point()


def _shape(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    return bool(torch.stack(value.aminmax()).isfinite().all())  # an eighth of isfinite's time


# --- what is assumed ------------------------------------------------------------------------------


def _undecided(model: nn.Module) -> list[str]:
    """What a torchvision model computes, and its state does not tell."""
    if hasattr(model, "transform_input"):
        return [
            "transform_input=True is assumed, as with torchvision's published weights; a model "
            "trained without it needs --arch package.module:factory"
        ]
    if isinstance(model, torchvision_models.ResNet) and isinstance(model.layer1[0], Bottleneck):
        return [
            "no dilation is assumed (replace_stride_with_dilation); a model trained with it needs "
            "--arch package.module:factory"
        ]
    return []


def _usual_preprocessing(model: nn.Module) -> Preprocessing | None:
    """What an architecture demands, or was published with; None if nothing else than usual."""
    if isinstance(model, torchvision_models.VisionTransformer):
        return Preprocessing(size=(model.image_size, model.image_size))
    if isinstance(model, torchvision_models.Inception3):
        return Preprocessing(size=(299, 299))
    match getattr(model, "pretrained_cfg", None):  # timm's
        case {"input_size": (3, height, width), "mean": mean, "std": std}:
            return Preprocessing(size=(height, width), mean=tuple(mean), std=tuple(std))
    return None


def _assumed(preprocessing: Preprocessing) -> str:
    height, width = preprocessing.size
    mean, std = (" ".join(map(str, v)) for v in (preprocessing.mean, preprocessing.std))
    return (
        f"the file does not tell the preprocessing; assumed unless given: {height} x {width} "
        f"pixels, mean {mean}, std {std} (--size, --mean, --std)"
    )


# --- reading --------------------------------------------------------------------------------------


class _Object:
    """Stands for whatever a pickle would have made that is no tensor and of no plain type."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _read(path: Path) -> tuple[Any, str]:
    """What a file holds, its objects replaced by `_Object`, and the SHA-256 of its bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
            if not start:
                raise DiffsalError("is empty: copy or download the file again")
            if start.startswith(b"version https://git-lfs"):
                raise DiffsalError("is a Git LFS pointer, not the weights: run git lfs pull")
            if re.match(rb"\s*<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
                raise DiffsalError("is a web page, not weights: download the file again")
            digest = hashlib.sha256(start)
            while block := file.read(1 << 20):
                digest.update(block)
            file.seek(0)
            loaded = _read_safetensors(path) if start[8:9] == b"{" else _read_torch(file)
    except OSError as error:
        raise DiffsalError(f"{error.strerror or error}: pass a file of weights") from error
    return loaded, digest.hexdigest()


def _read_safetensors(path: Path) -> Any:
    try:
        safetensors = import_module("safetensors.torch")
    except ImportError as error:
        raise DiffsalError(
            "safetensors is not installed: pip install 'diffsal[safetensors]'"
        ) from error
    try:
        return safetensors.load_file(path)
    except Exception as error:
        raise DiffsalError(f"{_DAMAGED} ({_one_line(error)})") from error


def _read_torch(file: IO[bytes]) -> Any:
    try:
        members = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
        for ending, (program, state) in _PROGRAMS.items():
            if any(member.endswith(ending) for member in members):
                raise DiffsalError(f"is {program}: {_SAVE_WEIGHTS.format(state)}")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except DiffsalError:
        raise
    except pickle.UnpicklingError as error:
        return _read_around_objects(file, error)
    except Exception as error:  # whatever the reading of other bytes leads to
        raise DiffsalError(f"{_DAMAGED} ({_one_line(error)})") from error


def _read_around_objects(file: IO[bytes], error: Exception) -> Any:
    """Read what torch refuses to, such as an argparse.Namespace beside the weights."""
    try:
        file.seek(0)
        names = get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        with safe_globals([(_Object, name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise DiffsalError(_DAMAGED) from error
        raise DiffsalError(
            f"holds pickled objects ({refused[1]}): {_SAVE_WEIGHTS.format('model.state_dict()')}"
        ) from error


def _contents(loaded: Any) -> _Contents:
    match loaded:
        case {"format": "diffsal", "format_version": int(version)} if version > FORMAT_VERSION:
            raise DiffsalError(f"was written by a later diffsal (format {version}): upgrade")
        case {
            "format": "diffsal",
            "architecture": {"name": str(name), "arguments": dict(arguments)},
            "classes": None | list() as classes,
            "preprocessing": None | dict() as preprocessing,
            "target_layer": None | str() as target_layer,
            "state_dict": dict(state),
        }:
            return _Contents(
                state=_tensors(state),
                architecture=name,
                arguments=arguments,
                classes=None if classes is None else tuple(map(str, classes)),
                preprocessing=Preprocessing.from_dict(preprocessing) if preprocessing else None,
                target_layer=target_layer,
            )
        case {"format": "diffsal"}:
            raise DiffsalError("is no whole diffsal checkpoint: write it with save_checkpoint")
    return _Contents(_state_dict(loaded))


def _state_dict(loaded: Any) -> State:
    """The weights in a plain state_dict, or in the one entry of a checkpoint that holds some."""
    pickled = f"is a pickled whole model: {_SAVE_WEIGHTS.format('model.state_dict()')}"
    if isinstance(loaded, _Object):
        raise DiffsalError(pickled)
    if not isinstance(loaded, dict):
        raise DiffsalError(f"holds a {type(loaded).__name__}, not a state_dict: save one")
    entries = {str(name): _tensors(value) for name, value in loaded.items()}
    entries = {name: state for name, state in entries.items() if _has_layers(state)}
    entries = {
        name: state for name, state in entries.items() if not _COPIES.search(name)
    } or entries
    for name in _CONTAINERS:
        if name in entries:
            return entries[name]
    if len(entries) > 1:
        raise DiffsalError(
            f"holds several models ({_some(entries)}): save one of them, "
            f"torch.save(torch.load(PATH)[{min(entries)!r}], 'weights.pt')"
        )
    for state in (*entries.values(), _tensors(loaded)):
        if _has_layers(state):
            return state
    if any(isinstance(value, _Object) for value in loaded.values()):
        raise DiffsalError(pickled)
    raise DiffsalError(f"holds no weights, but {_some(map(str, loaded)) or 'an empty dict'}")


def _has_layers(state: State) -> bool:
    return any(value.ndim > 1 for value in state.values())


def _tensors(value: Any) -> State:
    if not isinstance(value, dict):
        return {}
    return {
        key: tensor.detach()
        for key, tensor in value.items()
        if isinstance(key, str) and isinstance(tensor, Tensor)
    }


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
