"""Images as they come to the model, batch by batch, and the maps of their labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffsal.auditing.settings import Settings
from diffsal.data.index import Sample
from diffsal.errors import DiffsalError
from diffsal.explaining.records import failure
from diffsal.faithfulness.variants import read_logits
from diffsal.maps.modes import evaluated
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.progress import stage


@dataclass(frozen=True)
class Batch:
    """Images on the device: inputs (B, 3, H, W), labels (B,), human maps (B, H, W)."""

    inputs: Tensor
    labels: Tensor
    human: Tensor
    samples: list[Sample]


def draw_samples(samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    """At most ``count`` samples, drawn at random, in the order that they had.

    Example:
        >>> from pathlib import Path
        >>> samples = [Sample(Path(f"{number}.png"), 0) for number in range(9)]
        >>> [sample.path.stem for sample in draw_samples(samples, 3, seed=0)]
        ['4', '5', '7']
    """
    if count is None or count >= len(samples):
        return samples
    drawn = np.random.default_rng(seed).choice(len(samples), count, replace=False)
    return [samples[position] for position in np.sort(drawn)]


def read_batches(
    samples: Sequence[Sample],
    loaded: LoadedModel,
    settings: Settings,
    title: str,
    failed: list[dict[str, Any]],
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Batches of what can be read; what cannot goes to ``failed``.

    Of several processes each reads every ``share[1]``-th batch, from the ``share[0]``-th on; the
    others' count as done.
    """
    dataset = settings.source.items(samples, settings.preprocessing)
    dtype = next(loaded.model.parameters()).dtype
    # Each is perturbed into a hundred: few at a time, and progress is seen.
    step = min(settings.batch_size, max(8, settings.batch_size // 8))
    with stage(title, len(samples)) as advance:
        for number, start in enumerate(range(0, len(samples), step)):
            items = []
            is_own = number % share[1] == share[0]
            for position in range(start, min(start + step, len(samples)) if is_own else start):
                try:
                    items.append(dataset[position])
                except DiffsalError as error:
                    failed.append(failure(samples[position].path, error))
            if items:
                images, labels, human, positions = zip(*items, strict=True)
                yield Batch(
                    torch.stack(images).to(settings.device, dtype),
                    torch.tensor(labels, device=settings.device),
                    torch.stack(human).to(settings.device),
                    [samples[position] for position in positions],
                )
            advance(min(step, len(samples) - start))


@torch.no_grad()
def lay_out(model: nn.Module, inputs: Tensor) -> None:
    """On a CPU, lay weights of convolutions out channels last, where logits stay what they are.

    Convolutions take a third less time then. A model whose forward pass asks for one layout, as
    ``view`` does, stays as it was.

    Args:
        model: on the inputs' device.
        inputs: (B, C, H, W), what logits are compared on.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
        >>> lay_out(model, torch.rand(1, 3, 8, 8))
        >>> model[0].weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    if inputs.device.type != "cpu":
        return
    with evaluated(model) as run:
        before = read_logits(run, inputs)
        try:
            model.to(memory_format=torch.channels_last)
            after = read_logits(run, inputs)
            same = torch.allclose(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
        except RuntimeError:
            same = False
    if not same:
        model.to(memory_format=torch.contiguous_format)


def label_maps(loaded: LoadedModel, batch: Batch, false: Tensor | None = None) -> SalienceMaps:
    """Of the labels, against the strongest other classes or ``false`` (B,)."""
    return explain(
        loaded.model, batch.inputs, batch.labels, false, target_layers=loaded.target_layer
    )
