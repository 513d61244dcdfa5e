"""Whether maps and decisions hold still: under small changes, and other batch-norm statistics."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffsal.auditing.batches import Batch, label_maps, read_batches
from diffsal.auditing.clusters import FEWEST
from diffsal.auditing.rows import Measured
from diffsal.auditing.settings import Settings
from diffsal.faithfulness.batch_norm import batch_norms, reestimate_batch_norms
from diffsal.faithfulness.sensitivity import max_sensitivity
from diffsal.faithfulness.statistics import rank_correlation
from diffsal.maps.target_layers import in_copy
from diffsal.models.checkpoints import LoadedModel

LEVELS = 4  # of 255, by which each pixel may change: about what saving as JPEG does
STEADY = 0.1  # share of the margin by which it may move
_DRAWS = 8


def sensitivity_columns(loaded: LoadedModel, settings: Settings, batch: Batch) -> dict[str, Tensor]:
    """Columns (B,) of Max-Sensitivity."""
    found = max_sensitivity(
        loaded.model,
        batch.inputs,
        batch.labels,
        radius=[LEVELS / 255 / std for std in settings.preprocessing.std],
        draws=_DRAWS,
        steady=STEADY,
        target_layers=loaded.target_layer,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return {"sensitivity": found.largest, "sensitivity_counted": found.counted}


@dataclass(frozen=True)
class Reestimated:
    """The model with its batch norms' statistics taken from the audited images.

    Attributes:
        layers: how many batch norms keep statistics.
        logits: (N, K) of the copy, in the order of the rows.
    """

    layers: int
    logits: Tensor


def measure_reestimated(
    measured: Measured, loaded: LoadedModel, settings: Settings
) -> Reestimated | str:
    """Add columns of what becomes of maps and margins; or why that cannot be tried."""
    if not batch_norms(loaded.model):
        return "the model has no batch norm that keeps statistics of its training"
    if len(measured.samples) < FEWEST:
        return f"{len(measured.samples)} images are too few to take statistics of: {FEWEST} are"
    copy = reestimate_batch_norms(loaded.model, _mixed(measured, loaded, settings))
    other = replace(loaded, model=copy, layer=in_copy(copy, loaded.target_layer))
    logits = []
    for batch in read_batches(measured.samples, loaded, settings, "batch norm", []):
        before = label_maps(loaded, batch)
        after = label_maps(other, batch, before.false_class)
        moved = (after.difference - before.difference).flatten(1).norm(dim=1)
        columns = {
            "reestimated_true": rank_correlation(before.true, after.true),
            "reestimated_difference": rank_correlation(before.difference, after.difference),
            "reestimated_change": moved / before.difference.flatten(1).norm(dim=1),
            "reestimated_margin": after.margin,
        }
        measured.add_columns(batch.samples, columns)
        logits.append(after.logits.cpu())
    return Reestimated(len(batch_norms(copy)), torch.cat(logits))


def _mixed(measured: Measured, loaded: LoadedModel, settings: Settings) -> Iterator[Tensor]:
    """All images, in random order, in batches of about one size, as each counts alike."""
    dataset = settings.source.items(measured.samples, settings.preprocessing)
    dtype = next(loaded.model.parameters()).dtype
    order = np.random.default_rng(settings.seed).permutation(len(measured.samples))
    batches = math.ceil(len(order) / max(settings.batch_size, FEWEST))
    for part in np.array_split(order, batches):
        images = torch.stack([dataset[int(position)][0] for position in part])
        yield images.to(settings.device, dtype)
