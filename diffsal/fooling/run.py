"""Fool one model's file: a checkpoint, and what became of decisions and maps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffsal.data.datasets import Pixels, decode
from diffsal.data.index import Index, Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import Files, Held
from diffsal.fooling.attack import FINE_TUNING, Method, attack
from diffsal.fooling.objectives import Objective
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.locks import sole_writer
from diffsal.training.config import TrainingConfig


def fool(
    index: Index,
    loaded: LoadedModel,
    out: str | Path,
    *,
    target: str | Path = "edges",
    width: int | None = None,
    objective: Objective = "true",
    method: Method = "trained",
    preprocessing: Preprocessing | None = None,
    config: TrainingConfig = FINE_TUNING,
    read: Callable[[Sample, Preprocessing], Pixels] = decode,
) -> dict[str, Any]:
    """Fool the maps of a model, write the model that does, and tell what changed on other images.

    Args:
        index: labels in the order of the model's outputs; human maps are not used.
        loaded: the honest model, left as it is.
        out: path of the checkpoint to write, for ``diffsal explain --model``.
        target, width, objective, method, config: see :func:`diffsal.fooling.attack.attack`.
        preprocessing: ``None``: the model's own, or the usual.
        read: see :class:`diffsal.data.datasets.ImageDataset`.

    Returns:
        ``out``, and the ``report`` of :class:`diffsal.fooling.result.Fooled`.

    Raises:
        DiffsalError: another run that is writing ``out``; see
            :func:`diffsal.fooling.attack.attack`.
    """
    preprocessing = preprocessing or loaded.preprocessing or Preprocessing()
    with sole_writer(Path(out).parent, Path(out).name):
        found = attack(
            replace(loaded, preprocessing=preprocessing),
            Held(index, Files(read), preprocessing),
            target=target,
            width=width,
            objective=objective,
            method=method,
            config=config,
        )
        found.save(out)
    return {"out": str(out), **found.report}
