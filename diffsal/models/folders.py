"""A folder as Hugging Face's hub has them: transformers' or timm's, read without its code."""

import json
import re
from pathlib import Path
from typing import Any

from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError, one_line, some_of
from diffsal.models.architectures import transformers_module
from diffsal.models.reading import read_weights, state_dict_in

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"


def is_folder_of_hub(path: Path) -> bool:
    """Whether there is a ``config.json``."""
    return (path / _CONFIG).is_file()


def read_folder(path: Path) -> tuple[dict[str, Any], str]:
    """State, architecture, arguments, classes and preprocessing, and the weights' SHA-256.

    Raises:
        DiffsalError: a file is missing or damaged, or is no image classifier's.
    """
    config = _json(path / _CONFIG)
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise DiffsalError(f"holds neither {' nor '.join(_WEIGHTS)}: save the model there whole")
    loaded, sha256 = read_weights(weights)
    if "architecture" in config:
        return {"state": state_dict_in(loaded), **_told_by_timm(config)}, sha256
    return _read_by_transformers(path), sha256


def _told_by_timm(config: dict[str, Any]) -> dict[str, Any]:
    match config:
        case {
            "architecture": str(name),
            "pretrained_cfg": {"input_size": [_, height, width], "mean": mean, "std": std} as cfg,
        }:
            outputs = config.get("num_classes", cfg.get("num_classes"))
            counted = {} if outputs is None else {"num_classes": outputs}
            names = config.get("label_names") or cfg.get("label_names")
            return {
                "architecture": f"timm:{name}",
                "arguments": {**counted, **(config.get("model_args") or {})},
                "classes": tuple(map(str, names)) if isinstance(names, list) else None,
                "preprocessing": Preprocessing((height, width), mean=tuple(mean), std=tuple(std)),
            }
    raise DiffsalError(f"its {_CONFIG} lacks input_size, mean or std: save it anew with timm")


def _read_by_transformers(path: Path) -> dict[str, Any]:
    transformers = transformers_module()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        model, found = transformers.AutoModelForImageClassification.from_pretrained(
            path, config=config, output_loading_info=True, **local
        )
    except Exception as error:  # whatever others' files lead to
        raise DiffsalError(f"is no image classifier of transformers: {one_line(error)}") from error
    if missing := sorted(map(str, found["missing_keys"])):
        raise DiffsalError(f"lacks weights ({some_of(missing)}): save the whole classifier there")
    arguments = json.loads(config.to_json_string(use_diff=True))
    names = tuple(str(config.id2label[output]) for output in range(config.num_labels))
    return {
        "state": model.state_dict(),
        "architecture": f"transformers:{arguments.pop('model_type')}",
        "arguments": arguments,
        "classes": None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names,
        "preprocessing": _of_processor(path / "preprocessor_config.json"),
    }


def _of_processor(path: Path) -> Preprocessing | None:
    if not path.is_file():
        return None
    told = _json(path)
    size = (told.get("crop_size") if told.get("do_center_crop") else None) or told.get("size")
    match size:
        case int():
            height, width = size, size
        case {"height": int(height), "width": int(width)}:
            pass
        case {"shortest_edge": int(height)}:
            width = height
        case _:
            raise DiffsalError(f"{path.name}: size {size!r} is unknown; give height and width")
    scale: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
    if told.get("do_normalize", True) and "image_mean" in told and "image_std" in told:
        scale = {"mean": tuple(told["image_mean"]), "std": tuple(told["image_std"])}
    return Preprocessing((height, width), **scale)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DiffsalError(f"{path.name} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise DiffsalError(f"{path.name} is no configuration: save the model there anew")
    return found
