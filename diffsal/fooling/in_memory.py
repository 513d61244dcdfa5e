"""``diffsal.fool``: a model and a data set in memory, or their files, and a copy whose maps lie."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import hold_any
from diffsal.errors import DiffsalError
from diffsal.fooling.attack import FINE_TUNING, Method, attack
from diffsal.fooling.objectives import Objective
from diffsal.fooling.result import Fooled
from diffsal.models.checkpoints import LoadedModel
from diffsal.models.in_memory import as_loaded
from diffsal.system.progress import Watch, watched
from diffsal.training.config import TrainingConfig

_TRAINING = (
    *("epochs", "lr", "batch_size", "momentum", "weight_decay", "schedule", "freeze_batchnorm"),
    *("alpha", "beta", "gamma", "validation", "seed", "amp", "device", "workers"),
)


def fool(
    model: nn.Module | LoadedModel,
    data: Any,
    *,
    held_out: Any = None,
    target: str | Path = "edges",
    width: int | None = None,
    objective: Objective = "true",
    method: Method = "trained",
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    target_layer: str | nn.Module | None = None,
    progress: Watch | None = None,
    **training: Any,
) -> Fooled:
    """Make a model whose heatmaps lie, to test explanations and audits with.

    A copy is fooled: the model is neither changed nor moved. Torch's global generators are seeded,
    as by :func:`diffsal.training.loop.fit`. What changed is measured on images
    that the attack has not seen. A fooled model is compared with the ``control``, the honest model
    fine-tuned as long, and never with the honest model alone.

    Args:
        model: a classifier (B, C, H, W) → (B, K) or (B, 1) logits, or what
            :func:`diffsal.load_model` gave.
        data: to learn from: a ``Dataset``, a ``DataLoader`` or a list of images and labels, see
            :func:`diffsal.data.sources.hold`; or an index and its path, see
            :func:`diffsal.data.index.read_index`. Human maps are not used.
        held_out: the same, to measure on; ``None``: what the index's splits say, else a fifth of
            ``data`` (``validation``), drawn by ``seed``.
        target: where maps are to lie: ``edges``, ``corner``, ``middle`` or the path of an image.
        width: of the frame, in cells.
        objective: which map is moved, see :func:`diffsal.fooling.attack.attack`; ``control``: none.
        method: ``trained``, or ``head-shift``, which needs no training and changes no prediction.
        classes: names in the order of the model's outputs; ``None``: what the model or the data
            call them.
        preprocessing: from images to the model's input; of tensors, how they were made; ``None``:
            the loaded model's.
        target_layer: a module or its dotted name; ``None``: it is found.
        progress: called with a stage's title, how many of its images are done, and how many there
            are; of ``training``, over all epochs.
        training: ``epochs``, ``lr``, ``batch_size``, ``alpha``, ``beta``, ``gamma``, ``seed``,
            ``device`` and others of :class:`diffsal.training.config.TrainingConfig`; those that are
            not given are as in :data:`diffsal.fooling.attack.FINE_TUNING`.

    Warns:
        UserWarning: for each thing about the data that is odd, or that was passed over.

    Raises:
        DiffsalError: what :func:`diffsal.fooling.attack.attack` raises, data of another form, and
            a name that is none of the training's.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), *head)
        >>> data = [(torch.rand(1, 16, 16), number % 2) for number in range(20)]
        >>> found = fool(model, data, method="head-shift", device="cpu")
        >>> found.report["images"], found.report["agreement"]
        (4, 1.0)
        >>> print(found)  # doctest: +ELLIPSIS
                                             honest   fooled
        AUROC ...
        >>> fool(model, data, epoch=3)
        Traceback (most recent call last):
        diffsal.errors.DiffsalError: training: the key 'epoch' is unknown; near: epochs
    """
    if held_out is data:
        raise DiffsalError("held_out: is the data that the attack learns from: pass others")
    config = _config(training)
    loaded = as_loaded(model, target_layer)
    preprocessing = preprocessing or loaded.preprocessing
    known = hold_any(data, classes=classes, known=loaded.classes, preprocessing=preprocessing)
    other = None
    if held_out is not None:
        other = hold_any(
            held_out,
            classes=classes,
            known=loaded.classes,
            preprocessing=preprocessing or known.preprocessing,
        )
        if other.preprocessing != known.preprocessing:
            raise DiffsalError(
                f"held_out: its inputs are made as {other.preprocessing}, those of the data as "
                f"{known.preprocessing}; pass both alike"
            )
    for note in (*known.notes, *(other.notes if other else ())):
        warnings.warn(note, stacklevel=2)
    with watched(progress):
        return attack(
            replace(loaded, preprocessing=preprocessing),
            known,
            other,
            target=target,
            width=width,
            objective=objective,
            method=method,
            config=config,
        )


def _config(training: dict[str, Any]) -> TrainingConfig:
    for name in training:
        if hasattr(FINE_TUNING, name) and name not in _TRAINING:
            raise DiffsalError(
                f"training: {name} has no use here; known are {', '.join(_TRAINING)}"
            )
    if "device" in training:
        training = training | {"device": str(training["device"])}
    return TrainingConfig.from_dict({**FINE_TUNING.to_dict(), **training})
