"""Every image measured with what one forward pass gives; the rest is :mod:`slow`'s."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffsal.auditing.batches import Batch, label_maps, lay_out, read_batches
from diffsal.auditing.clusters import decision_maps
from diffsal.auditing.rows import MAPS, Measured
from diffsal.auditing.settings import Settings
from diffsal.auditing.slow import occlusion_grid
from diffsal.data.index import Index, Sample
from diffsal.errors import DiffsalError
from diffsal.explaining.records import NOT_FINITE, class_names, failure
from diffsal.faithfulness.localisation import (
    energy_inside,
    frame_mass,
    intersection_over_union,
    marked_share,
    pointing_game,
)
from diffsal.faithfulness.statistics import rank_correlation
from diffsal.maps.contrast import class_count, predicted_class
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.devices import running


def measure_samples(
    samples: Sequence[Sample], index: Index, loaded: LoadedModel, settings: Settings, title: str
) -> Measured:
    """Every number that is taken of every image, in one pass.

    Raises:
        DiffsalError: none that can be measured, a model that does not run on them.
    """
    loaded.model.to(settings.device)
    measured = Measured(settings.seed)
    for batch in read_batches(samples, loaded, settings, title, measured.failed):
        with running(settings.device, settings.preprocessing.size, settings.batch_size):
            if not measured.names:
                lay_out(loaded.model, batch.inputs[:1])
                outputs = explain(loaded.model, batch.inputs[:1], target_layers=loaded.target_layer)
                measured.cells = (outputs.true.shape[1], outputs.true.shape[2])
                measured.squash = outputs.squash
                measured.names = class_names(index.classes, class_count(outputs.logits))
            maps = label_maps(loaded, batch)
            numbers = _measures(maps, batch, loaded.model, measured.frame_width)
        _append(measured, batch, maps, numbers)
    if not measured.rows:
        first = measured.failed[0]
        raise DiffsalError(f"{first['path']}: {first['error']} (so with every image)")
    return measured


def _measures(
    maps: SalienceMaps, batch: Batch, model: nn.Module, frame_width: int | None
) -> dict[str, Tensor]:
    """Columns (B,) that one forward pass gives."""
    human = batch.human
    columns = {
        "margin": maps.margin,
        "residual": maps.residual,
        "unexplained": (maps.residual - _bias_difference(model, maps)).abs(),
        "common_mode_share": maps.common_mode_share,
        "true_difference": rank_correlation(maps.true, maps.difference),
        "true_false": rank_correlation(maps.true, maps.false),
        "marked": marked_share(human),
    }
    for kind in MAPS:
        map_ = getattr(maps, kind)
        columns |= {
            f"pointing_{kind}": pointing_game(map_, human),
            f"energy_{kind}": energy_inside(map_, human),
            f"iou_{kind}": intersection_over_union(map_, human),
        }
        if frame_width is not None:
            columns[f"frame_{kind}"] = frame_mass(map_, frame_width)
    return columns


def _append(
    measured: Measured, batch: Batch, maps: SalienceMaps, numbers: dict[str, Tensor]
) -> None:
    finite = (maps.true + maps.false).isfinite().flatten(1).all(1) & maps.logits.isfinite().all(1)
    logits = maps.logits.cpu()
    share = maps.probabilities.cpu()
    predicted = predicted_class(logits)
    evidence = decision_maps(maps, occlusion_grid(maps.true.shape[1:]))
    columns = {name: values.double().cpu() for name, values in numbers.items()}
    for row, sample in enumerate(batch.samples):
        if not finite[row]:
            measured.failed.append(failure(sample.path, NOT_FINITE))
            continue
        measured.samples.append(sample)
        measured.logits.append(logits[row])
        measured.evidence.append(evidence[row])
        measured.rows.append(
            {
                "path": str(sample.path),
                "label": measured.names[sample.label],
                "predicted": measured.names[int(predicted[row])],
                "correct": float(predicted[row] == sample.label),
                "probability": float(share[row, sample.label]),
                **{name: float(values[row]) for name, values in columns.items()},
            }
        )


def _bias_difference(model: nn.Module, maps: SalienceMaps) -> Tensor:
    """(B,): what the last layer's biases add to the margin; 0 where there is no such layer."""
    outputs = maps.logits.shape[1]
    last = [
        module.bias
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == outputs
    ]
    if not last or last[-1] is None:
        return torch.zeros_like(maps.margin)
    bias = last[-1].detach().to(maps.margin)
    if outputs == 1:
        return torch.where(maps.true_class == 1, bias, -bias)
    return bias[maps.true_class] - bias[maps.false_class]
