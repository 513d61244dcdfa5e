"""A folder as Hugging Face's hub has them: transformers' or timm's, read without its code."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffsal.data.preprocessing import CROP_SHARE, Preprocessing
from diffsal.errors import DiffsalError, one_line, some_of
from diffsal.models.architectures import transformers_module
from diffsal.models.reading import read_weights, state_dict_in
from diffsal.system.files import read_text

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"


def is_folder_of_hub(path: Path) -> bool:
    """Whether there is a ``config.json``.

    Raises:
        DiffsalError: it is another kind of folder.
    """
    if _is_file(path / "open_clip_config.json") and not _is_file(path / _CONFIG):
        raise DiffsalError(
            "is open_clip's, which compares images with texts and has no classes: put a linear "
            "layer on its visual tower in Python, and call diffsal.explain"
        )
    if os.path.isdir(path) and not _is_file(path / _CONFIG):
        raise DiffsalError(f"is a folder without a {_CONFIG}: name the file of weights in it")
    return os.path.isdir(path)


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # unlike the method, False for a name that is too long


def read_folder(path: Path) -> tuple[dict[str, Any], str]:
    """State, architecture, arguments, classes, preprocessing and notes; the weights' SHA-256.

    Raises:
        DiffsalError: a file is missing or damaged, or is no image classifier's.
    """
    for file in path.iterdir():
        if not _is_file(file) and not os.path.isdir(file):  # transformers opens what it finds
            raise DiffsalError(f"{file.name} is no file: remove it, or save the model there anew")
    config = _json(path / _CONFIG)
    weights = next((path / name for name in _WEIGHTS if _is_file(path / name)), None)
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
            "pretrained_cfg": {
                "input_size": [_, height, width],
                "mean": list(mean),
                "std": list(std),
            } as cfg,
        } if isinstance(config.get("model_args") or {}, dict):
            outputs = config.get("num_classes", cfg.get("num_classes"))
            counted = {} if outputs is None else {"num_classes": outputs}
            names = config.get("label_names") or cfg.get("label_names")
            share, scale = cfg.get("crop_pct"), {"mean": tuple(mean), "std": tuple(std)}
            preprocessing, notes = _cropping((height, width), scale, share, f"crop_pct {share}")
            return {
                "architecture": f"timm:{name}",
                "arguments": {**counted, **(config.get("model_args") or {})},
                "classes": tuple(map(str, names)) if isinstance(names, list) else None,
                "preprocessing": preprocessing,
                "notes": notes,
            }
    raise DiffsalError(
        f"its {_CONFIG} lacks input_size, mean or std, or has wrong ones: save it anew with timm"
    )


def _read_by_transformers(path: Path) -> dict[str, Any]:
    transformers = transformers_module()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        with _without_bars(transformers.utils.logging):
            model, found = transformers.AutoModelForImageClassification.from_pretrained(
                path, config=config, output_loading_info=True, **local
            )
    except Exception as error:  # whatever others' files lead to
        raise DiffsalError(f"is no image classifier of transformers: {one_line(error)}") from error
    if missing := sorted(map(str, found["missing_keys"])):
        raise DiffsalError(f"lacks weights ({some_of(missing)}): save the whole classifier there")
    arguments = json.loads(config.to_json_string(use_diff=True))
    names = tuple(str(config.id2label[output]) for output in range(config.num_labels))
    processor = path / "preprocessor_config.json"
    try:
        preprocessing, notes = _of_processor(processor)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DiffsalError(f"{processor.name} has wrong values: {one_line(error)}") from error
    return {
        "state": model.state_dict(),
        "architecture": f"transformers:{arguments.pop('model_type')}",
        "arguments": arguments,
        "classes": None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names,
        "preprocessing": preprocessing,
        "notes": notes,
    }


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _of_processor(path: Path) -> tuple[Preprocessing | None, list[str]]:
    """What the processor does, as near as `Preprocessing` can; the note says where it differs."""
    if not _is_file(path):
        return None, []
    told = _json(path)
    resized = told.get("size")
    cropped = told.get("crop_size") if told.get("do_center_crop") else None
    size = _height_and_width(cropped or resized, path.name)
    scale: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}
    if told.get("do_normalize", True) and "image_mean" in told and "image_std" in told:
        scale = {"mean": tuple(told["image_mean"]), "std": tuple(told["image_std"])}
    match resized:
        case {"shortest_edge": int(short)} if "crop_pct" in told:
            share = float(told["crop_pct"]) if short < 384 else None  # ConvNeXt's
        case {"shortest_edge": int(short)}:
            share = size[0] / short
        case _:
            share = None if cropped in (None, resized) else 0.0
    return _cropping(size, scale, share, f"resize {resized}, crop {cropped}")


def _cropping(
    size: tuple[int, int], scale: dict[str, Any], share: float | None, told: str
) -> tuple[Preprocessing, list[str]]:
    """Of the share of the shorter side that is kept; ``None`` where all is squashed."""
    made = Preprocessing(size, "crop" if share else "squash", **scale)
    if share is None or abs(share - CROP_SHARE) < 0.01:
        return made, []
    kept = f"the middle {CROP_SHARE} of the shorter side" if share else "the whole image, squashed"
    return made, [
        f"the folder's preprocessing ({told}) is not offered here; assumed unless given: {kept} "
        "(--size, --resize)"
    ]


def _height_and_width(size: object, name: str) -> tuple[int, int]:
    match size:
        case int():
            return size, size
        case {"height": int(height), "width": int(width)}:
            return height, width
        case {"shortest_edge": int(height)}:
            return height, height
    raise DiffsalError(f"{name}: size {size!r} is unknown; give height and width")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DiffsalError(f"{path.name} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise DiffsalError(f"{path.name} is no configuration: save the model there anew")
    return found
