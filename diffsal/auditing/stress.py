"""What this model's heatmaps could be made to show with no prediction changed."""

from dataclasses import replace

from torch import Tensor

from diffsal.auditing.batches import draw_samples, label_maps, read_batches
from diffsal.auditing.rows import Measured
from diffsal.auditing.settings import Settings
from diffsal.data.index import Index
from diffsal.errors import DiffsalError
from diffsal.fooling.head_shift import head_shift
from diffsal.fooling.targets import target_distance, target_map
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import in_copy
from diffsal.models.checkpoints import LoadedModel

_FITTED = 256  # images at most from which the stress test is built


def stress_test(
    index: Index, split: str, measured: Measured, loaded: LoadedModel, settings: Settings
) -> tuple[LoadedModel | None, str]:
    """Apply the head shift to a copy, and add what it did to rows that it was not made from.

    Returns:
        The fooled copy; or ``None``, and why there is none.
    """
    shown = measured.samples
    fitting = list(index.split("train")) if split == "test" else []
    if not fitting:
        fitting = draw_samples(shown, len(shown) // 2, settings.seed)
        used = {sample.path for sample in fitting}
        shown = [sample for sample in shown if sample.path not in used]
    fitting = draw_samples(fitting, _FITTED, settings.seed)
    batches = read_batches(fitting, loaded, settings, "stress test: fitting", [])
    try:
        target = target_map("edges", measured.cells)
        shifted = head_shift(
            loaded.model,
            (batch.inputs for batch in batches),
            target,
            target_layer=loaded.target_layer,
        )
    except DiffsalError as error:
        return None, str(error)
    layer = in_copy(shifted.model, loaded.target_layer)
    fooled = replace(loaded, model=shifted.model, layer=layer)
    for batch in read_batches(shown, loaded, settings, "stress test", []):
        before = label_maps(loaded, batch)
        after = label_maps(fooled, batch, before.false_class)
        measured.add_columns(batch.samples, _effects(before, after, target.to(before.true)))
    return fooled, ""


def _effects(before: SalienceMaps, after: SalienceMaps, target: Tensor) -> dict[str, Tensor]:
    """(B,) each: what became of maps and decisions."""
    was, now = (maps.probabilities for maps in (before, after))
    moved = (after.difference - before.difference).flatten(1).norm(dim=1)
    return {
        "target_before": target_distance(before.true, target),
        "target_after": target_distance(after.true, target),
        "share_after": after.common_mode_share,
        "probability_change": (now - was).abs().amax(1),
        "difference_change": moved / before.difference.flatten(1).norm(dim=1),
        "prediction_changed": (now.argmax(1) != was.argmax(1)).double(),
    }
