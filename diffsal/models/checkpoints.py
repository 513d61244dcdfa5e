"""From a weights file to a model, its classes, its preprocessing and its target layer.

A weights file can name no code but torchvision's and timm's own architectures."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from diffsal.data.index import check_distinct
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.maps.target_layers import TargetLayer, find_target_layer, get_target_layer
from diffsal.models.architectures import (
    SOURCES,
    build_model,
    check_confirmed,
    check_origin,
    qualified,
)
from diffsal.models.bounds import building_for, check_numbers, check_plain, check_tensors
from diffsal.models.equal_bytes import save_equal
from diffsal.models.fitting import (
    assign,
    current_names,
    fit_head,
    fit_stem,
    input_channels,
    strip_wrappers,
    without_initialization,
)
from diffsal.models.folders import is_folder_of_hub, read_folder
from diffsal.models.reading import State, read_weights, state_dict_in, tensors_in
from diffsal.models.recognition import (
    constructor_arguments,
    preprocessing_note,
    recognize,
    undecided,
    usual_preprocessing,
)
from diffsal.system.files import replacing

FORMAT_VERSION = 1
UNNAMED = "the file does not name the classes (--classes)"
"""The note where it does not."""


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
        layer: where maps are taken, if it was named; see `target_layer`.
        path: of the file.
        sha256: of the file's bytes, hexadecimal.
        notes: one line each on what the file could not tell.
    """

    model: nn.Module
    architecture: str
    arguments: dict[str, Any]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    layer: TargetLayer | None
    path: Path
    sha256: str
    notes: tuple[str, ...]

    @cached_property
    def target_layer(self) -> TargetLayer:
        """Where maps are taken; looked for on first use, since that may run the model.

        Raises:
            DiffsalError: none is found.
        """
        try:
            return self.layer or find_target_layer(self.model)
        except DiffsalError as error:
            raise DiffsalError(f"{self.path}: {error}") from error


def load_model(
    path: str | Path,
    *,
    arch: str | None = None,
    target_layer: str | None = None,
    trust_arguments: bool | Mapping[str, Any] = False,
) -> LoadedModel:
    """Load a model from a file or folder of weights.

    Args:
        path: a ``state_dict`` saved by ``torch.save`` or as safetensors, a training checkpoint that
            contains one, or a checkpoint of `save_checkpoint`; or a folder of transformers' or
            timm's ``save_pretrained``, whose ``config.json`` tells the rest.
        arch: the architecture, where the file does not tell, as for `build_model`; a factory is
            called with the checkpoint's arguments, else with ``num_classes`` if it takes that.
        target_layer: dotted name of the layer where maps are taken; found by itself if None.
        trust_arguments: whether a factory may be called with what arguments a checkpoint holds;
            a mapping: with these.

    Raises:
        DiffsalError: the file is no file of weights, the architecture is not recognized or does not
            fit, a weight is not finite, or there is no layer of that name.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> shape = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8}
        >>> model = build_model("torchvision:DenseNet", {**shape, "num_classes": 2})
        >>> with TemporaryDirectory() as folder:
        ...     save_checkpoint(
        ...         Path(folder, "own.pt"), model, architecture="DenseNet", arguments=shape
        ...     )
        ...     loaded = load_model(Path(folder, "own.pt"))
        >>> loaded.architecture, loaded.arguments["num_classes"], loaded.target_layer.name
        ('torchvision:DenseNet', 2, 'features')
        >>> loaded.notes[-1]
        'the file does not name the classes (--classes)'
    """
    try:
        return _load(Path(path), arch, target_layer, trust_arguments)
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

    The file appears whole or not at all, and ``torch.load(weights_only=True)`` reads it. Equal
    content gives equal bytes.

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

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path, made_by = Path(folder, "weights.pt"), {"architecture": "own.networks:make"}
        ...     save_checkpoint(path, nn.Linear(3, 2), **made_by, arguments={}, epoch=7)
        ...     checkpoint = torch.load(path, weights_only=True)
        >>> checkpoint["architecture"], checkpoint["epoch"], list(checkpoint["state_dict"])
        ({'name': 'own.networks:make', 'arguments': {}}, 7, ['weight', 'bias'])
    """
    arguments = dict(arguments)
    if hasattr(model, "transform_input"):  # no state, and published weights change its default
        arguments["transform_input"] = model.transform_input
    checkpoint = {
        **extra,
        "format": "diffsal",
        "format_version": FORMAT_VERSION,
        "architecture": {"name": qualified(architecture), "arguments": arguments},
        "classes": None if classes is None else list(classes),
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
        "target_layer": target_layer,
        "state_dict": model.state_dict(),
    }
    with replacing(Path(path)) as scratch:
        save_equal(checkpoint, scratch)


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


@dataclass(frozen=True)
class _Contents:
    """The parts of a file; all but the state are there in diffsal's own checkpoints alone."""

    state: State
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    target_layer: str | None = None
    notes: list[str] = field(default_factory=list)


def _contents_of(loaded: Any) -> _Contents:
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
            told = {"arguments": arguments, "classes": classes, "preprocessing": preprocessing}
            for entry, value in told.items():
                check_plain(entry, value)
            check_distinct([str(name) for name in classes or ()], "its classes")
            return _Contents(
                state=tensors_in(state),
                architecture=name,
                arguments=arguments,
                classes=None if classes is None else tuple(map(str, classes)),
                preprocessing=Preprocessing.from_dict(preprocessing) if preprocessing else None,
                target_layer=target_layer,
            )
        case {"format": "diffsal"}:
            raise DiffsalError("is no whole diffsal checkpoint: write it with save_checkpoint")
    return _Contents(state_dict_in(loaded))


def _load(
    path: Path, arch: str | None, target_layer: str | None, trusted: bool | Mapping[str, Any]
) -> LoadedModel:
    if is_folder_of_hub(path):
        parts, sha256 = read_folder(path)
        contents = _Contents(**parts)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    else:
        loaded, sha256 = read_weights(path)
        contents = _contents_of(loaded)
        size = path.stat().st_size
    check_tensors(contents.state, size)
    architecture = qualified(arch or contents.architecture or recognize(contents.state))
    recorded = contents.architecture is not None
    arguments = (
        contents.arguments if recorded else constructor_arguments(architecture, contents.state)
    )
    check_origin(architecture, arguments, chosen_by_user=arch is not None)
    check_confirmed(architecture, arguments, trusted)
    is_torchvisions = architecture.startswith("torchvision:")
    with ExitStack() as bounds:
        if recorded and architecture.startswith(SOURCES):
            check_numbers(architecture, arguments)
            bounds.enter_context(building_for(contents.state))
        if is_torchvisions:
            bounds.enter_context(without_initialization())
        model = build_model(architecture, arguments)
    if not model.state_dict():
        raise DiffsalError(f"{architecture} has no parameters: name the network that was saved")
    state, notes = strip_wrappers(contents.state, model)
    if is_torchvisions:
        state = current_names(state, model)
        fit_stem(model, state)
        outputs, head_notes = fit_head(model, state)
        arguments = {**arguments, "num_classes": outputs}
        notes += head_notes
    assign(model, state, architecture)
    notes += contents.notes

    if is_torchvisions and not recorded:
        notes += undecided(model)
    channels = input_channels(model)
    preprocessing = contents.preprocessing or usual_preprocessing(model)
    if channels != 3:
        preprocessing = replace(preprocessing or Preprocessing(), channels=channels)
    if contents.preprocessing is None:
        notes.append(preprocessing_note(preprocessing or Preprocessing()))
    if contents.classes is None:
        notes.append(UNNAMED)
    layer = target_layer or contents.target_layer
    return LoadedModel(
        model=model.eval(),
        architecture=architecture,
        arguments=arguments,
        classes=contents.classes,
        preprocessing=preprocessing,
        layer=get_target_layer(model, layer) if layer else None,
        path=path,
        sha256=sha256,
        notes=tuple(notes),
    )
