"""Whether the content of files of results is what a protocol and its jobs write."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffsal.protocol.configuration import Job
from diffsal.protocol.scores import FOOLING

COLUMNS = (
    *("pointing_true", "energy_true", "pointing_difference", "energy_difference"),
    *("marked_share", "common_mode_share"),
)
"""Of every model, a number for each sample; those of experiment (a) have :data:`FURTHER`."""
FURTHER = (
    *("edges_true", "edges_difference", "occlusion_true", "occlusion_difference"),
    "smoothgrad_difference",
)
_MAPS = ("true", "false", "difference")
_SKILLS = {"rectangles", "marked"}


def is_plan(protocol: Any) -> bool:
    """Whether a frozen protocol has what names its jobs, of the types that it is made of.

    Example:
        >>> tasks = {"tiles": {"subsets": ["crack"]}}
        >>> is_plan({"seeds": [0], "tasks": tasks, "methods": {"contrast": {}}})
        True
        >>> is_plan({"seeds": 10**9, "tasks": tasks, "methods": {"contrast": {}}})
        False
    """
    if not isinstance(protocol, dict):
        return False
    seeds, tasks, methods = (protocol.get(name) for name in ("seeds", "tasks", "methods"))
    return (
        isinstance(seeds, list)
        and all(type(seed) is int for seed in seeds)
        and isinstance(tasks, dict)
        and all(
            isinstance(task, dict) and _are_names(task.get("subsets")) for task in tasks.values()
        )
        and isinstance(methods, dict)
        and bool(methods)
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_whole(content: dict[str, Any], job: Job) -> bool:
    """Whether all is there that tables and plots need, of the types and lengths that they need.

    Args:
        content: of the job's file.
        job: whose it should be.

    Example:
        >>> models = {"contrast": {"logits": [[0.5, 1]], **dict.fromkeys(COLUMNS, [None])}}
        >>> samples = {"path": ["a.png"], "label": [1], "subset": [""]}
        >>> job = Job("tiles", "contrast", "", 0)
        >>> content = {**vars(job), "samples": samples, "models": models}
        >>> is_whole(content, job), is_whole({**content, "samples": None}, job)
        (True, False)
    """
    if {name: content.get(name) for name in vars(job)} != vars(job):
        return False
    samples, models = content.get("samples"), content["models"]
    if not isinstance(samples, dict) or not isinstance(models, dict) or not models:
        return False
    labels = samples.get("label")
    if not isinstance(labels, list):
        return False
    count = len(labels)
    kinds = {"path": str, "label": int, "subset": str}
    if not all(_is_list(samples.get(name), count, kind) for name, kind in kinds.items()):
        return False
    if not {*labels} <= {0, 1} or not all(isinstance(one, dict) for one in models.values()):
        return False
    if job.method == FOOLING:
        return (
            _is_list(content.get("classes"), 2, str)
            and _has_pictures(content, count)
            and all(_is_fooled(model, count, len(content["pictured"])) for model in models.values())
        )
    return all(_is_model(model, count, COLUMNS) for model in models.values())


def _is_list(column: Any, count: int, kind: type) -> bool:
    return (
        isinstance(column, list)
        and len(column) == count
        and all(type(value) is kind for value in column)
    )


def _is_model(model: dict[str, Any], count: int, names: Sequence[str]) -> bool:
    logits = _numbers(model.get("logits"), 2)
    if logits is None or len(logits) != count or logits.shape[1] not in (1, 2):
        return False
    columns = [model.get(name) for name in names]
    return all(
        isinstance(column, list) and len(column) == count and all(map(_is_number, column))
        for column in columns
    )


def _is_fooled(model: dict[str, Any], count: int, shown: int) -> bool:
    maps, skills = model.get("maps"), model.get("composite_skill")
    if not isinstance(maps, dict) or not isinstance(skills, dict):
        return False
    drawn = [_numbers(maps.get(kind), 3) for kind in _MAPS]
    return (
        _is_model(model, count, (*COLUMNS, *FURTHER))
        and skills.keys() == _SKILLS
        and all(map(_is_number, skills.values()))
        and all(one is not None and len(one) == shown for one in drawn)
    )


def _has_pictures(content: dict[str, Any], count: int) -> bool:
    pictured, pictures = content.get("pictured"), content.get("pictures")
    return (
        isinstance(pictured, list)
        and all(type(one) is int and 0 <= one < count for one in pictured)
        and _is_list(pictures, len(pictured), str)
    )


def _numbers(values: Any, axes: int) -> Any:
    """A rectangular array of finite numbers, or ``None``."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if array.ndim == axes and array.size and np.isfinite(array).all() else None


def _is_number(value: Any) -> bool:
    """A finite number, or none."""
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)
