"""A model in memory, as if it came of a file."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from torch import nn

from diffsal.errors import DiffsalError
from diffsal.maps.target_layers import TargetLayer, get_target_layer, in_copy
from diffsal.models.checkpoints import LoadedModel


def as_loaded(model: nn.Module | LoadedModel, layer: str | nn.Module | None = None) -> LoadedModel:
    """The model itself, with what files tell of models; of a bare one that is next to nothing.

    Args:
        model: in memory, or of :func:`diffsal.load_model`.
        layer: where maps are taken, a module or its dotted name; ``None``: as it was loaded, else
            it is found.

    Returns:
        With an empty ``sha256`` where there is no file, and so no architecture to build anew.

    Raises:
        DiffsalError: no model, or no layer of its.

    Example:
        >>> found = as_loaded(nn.Sequential(nn.Conv2d(1, 2, 1)), "0")
        >>> found.architecture, found.target_layer.name, found.sha256
        ('Sequential', '0', '')
    """
    if isinstance(model, LoadedModel):
        return replace(model, layer=_layer(model.model, layer) or model.layer)
    if not isinstance(model, nn.Module):
        raise DiffsalError(
            f"the model is a {type(model).__name__}: pass an nn.Module, or what load_model gives"
        )
    return LoadedModel(
        model=model,
        architecture=type(model).__name__,
        arguments={},
        classes=None,
        preprocessing=None,
        layer=_layer(model, layer),
        path=Path(type(model).__name__),
        sha256="",
        notes=(),
    )


def copied(loaded: LoadedModel) -> LoadedModel:
    """The same of a copy, to be moved and changed.

    Example:
        >>> loaded = as_loaded(nn.Sequential(nn.Conv2d(1, 2, 1)), "0")
        >>> copy = copied(loaded)
        >>> copy.model is loaded.model, copy.layer.module is copy.model[0]
        (False, True)
    """
    model = deepcopy(loaded.model)
    return replace(loaded, model=model, layer=loaded.layer and in_copy(model, loaded.layer))


def _layer(model: nn.Module, layer: str | nn.Module | None) -> TargetLayer | None:
    if layer is None:
        return None
    if isinstance(layer, str):
        return get_target_layer(model, layer)
    name = next((name for name, module in model.named_modules() if module is layer), "")
    if not name:
        raise DiffsalError(f"the layer {type(layer).__name__} is none of the model's modules")
    return get_target_layer(model, name)
