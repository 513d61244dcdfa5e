"""``diffsal.audit``: a model and a data set in memory, or their files, and an audit of them."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffsal.auditing.evidence import gather
from diffsal.auditing.result import Audit
from diffsal.auditing.settings import Occluders, Settings, usual_batch_size
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import FILES, hold_any
from diffsal.errors import DiffsalError
from diffsal.models.checkpoints import LoadedModel
from diffsal.models.in_memory import as_loaded, copied
from diffsal.system.devices import choose_device
from diffsal.system.progress import Watch, watched


def audit(
    model: nn.Module | LoadedModel,
    data: Any,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    target_layer: str | nn.Module | None = None,
    reference: nn.Module | LoadedModel | None = None,
    limit: int | None = None,
    precision: float = 0.15,
    occluders: Sequence[Occluders] = ("blur", "transplant"),
    batch_size: int | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: Watch | None = None,
) -> Audit:
    """Tell whether a model's heatmaps can be believed.

    The audit works on copies: neither model is changed or moved.

    Args:
        model: a classifier (B, C, H, W) → (B, K) or (B, 1) logits, or what
            :func:`diffsal.load_model` gave.
        data: a ``Dataset``, a ``DataLoader`` or a list of images and labels, see
            :func:`diffsal.data.sources.hold`; or an index and its path, see
            :func:`diffsal.data.index.read_index`.
        classes: names in the order of the model's outputs; ``None``: what the model or the data
            call them.
        preprocessing: from images to the model's input; of tensors, how they were made; ``None``:
            the loaded model's.
        target_layer: a module or its dotted name; ``None``: it is found.
        reference: a second model, measured on the same images and set beside the first.
        limit, precision, occluders, batch_size, seed: see
            :class:`diffsal.auditing.settings.Settings`; ``None`` for 64, on a CPU 8.
        device: where the audit runs, ``auto`` for a GPU where there is one.
        progress: called with a stage's title, how many of its images are done, and how many there
            are.

    Warns:
        UserWarning: for each thing about the data that is odd, or that was passed over.

    Raises:
        DiffsalError: what :func:`diffsal.auditing.run.audit` raises, and data of another form.

    Example:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), *head)
        >>> data = [(torch.rand(1, 16, 16), number % 2) for number in range(12)]
        >>> found = audit(model, data, classes=("intact", "worn"), device="cpu")
        >>> found.numbers["correct"]["n"], found.table is not None
        (12, True)
        >>> found.save("audited")  # doctest: +SKIP
    """
    loaded = copied(as_loaded(model, target_layer))
    other = None if reference is None else copied(as_loaded(reference))
    held = hold_any(
        data,
        classes=classes,
        known=loaded.classes,
        preprocessing=preprocessing or loaded.preprocessing,
    )
    for note in held.notes:
        warnings.warn(note, stacklevel=2)
    if held.source is not FILES and other is not None:
        other = _of_one_input(other, held.preprocessing)
    on = choose_device(device) if isinstance(device, str) else device
    settings = Settings(
        held.preprocessing,
        on,
        limit,
        precision,
        tuple(occluders),
        batch_size or usual_batch_size(on),
        seed,
        held.source,
    )
    with watched(progress):
        return Audit(gather(held.index, loaded, settings, other))


def _of_one_input(other: LoadedModel, preprocessing: Preprocessing) -> LoadedModel:
    """The reference, which gets the same inputs; none that was made for others."""
    if other.preprocessing not in (None, preprocessing):
        raise DiffsalError(
            f"{other.path}: expects inputs made as {other.preprocessing}, the data's are made as "
            f"{preprocessing}; audit it by itself"
        )
    return replace(other, preprocessing=preprocessing)
