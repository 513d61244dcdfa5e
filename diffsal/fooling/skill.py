"""How well difference maps foretell composites of the images of a data set."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from diffsal.data.datasets import ImageDataset
from diffsal.faithfulness.composites import run_composites
from diffsal.faithfulness.pasting import Regions
from diffsal.maps.contrast import class_count
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import TargetLayer

_PER_IMAGE = 4  # composites that an image receives of either kind, a forward pass each
_Position = TypeVar("_Position")


def composite_skills(
    model: nn.Module,
    layer: TargetLayer,
    held_out: ImageDataset,
    batch_size: int,
    *,
    kinds: Sequence[Regions] = ("rectangles",),
    of_each: int = 30,
    seed: int = 0,
) -> dict[Regions, float]:
    """Composite skill of the difference map by kind of region, of some samples of each class.

    All models that are given the same samples are asked about composites of the same images, and of
    the same rectangles; see :func:`diffsal.faithfulness.composites.run_composites`.

    Args:
        model: in evaluation mode, on its device.
        layer: where its maps are taken.
        held_out: the samples.
        batch_size: images, or composites, at once.
        kinds: what is pasted.
        of_each: images of each class at most; each gets four composites of each kind.
        seed: of donors and regions.

    Returns:
        NaN where the composites' margins tell nothing, and where none can be made: of one image of
        a class, a map of a single cell, or more than two classes.

    Example:
        Where each cell sees one pixel, maps foretell every composite:

        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> from diffsal.maps.target_layers import get_target_layer
        >>> noise = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8)
        >>> read = lambda sample, _: (noise[int(sample.path.name)], None)
        >>> samples = [Sample(Path(str(number)), number % 2) for number in range(4)]
        >>> test = ImageDataset(samples, Preprocessing(size=(4, 4)), read=read)
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(4), nn.Flatten()).eval()
        >>> found = composite_skills(model, get_target_layer(model, "0"), test, batch_size=2)
        >>> round(found["rectangles"], 3)
        1.0
    """
    undefined = dict.fromkeys(kinds, float("nan"))
    device = next(model.parameters()).device
    labels = np.array([sample.label for sample in held_out.samples])
    if np.bincount(labels, minlength=2).min() < 2:
        return undefined
    chosen = [
        position
        for label in (0, 1)
        for position in spread(np.flatnonzero(labels == label).tolist(), of_each)
    ]
    images = torch.stack([held_out[position][0] for position in chosen]).to(device)
    maps = [
        explain(model, part, true=1, false=0, target_layers=layer).to("cpu")
        for part in images.split(batch_size)
    ]
    difference = torch.cat([one.difference for one in maps])
    if difference[0].numel() < 2 or class_count(maps[0].logits) != 2:
        return undefined
    margin = torch.cat([one.margin for one in maps])
    of_chosen = torch.from_numpy(labels[chosen])
    return {
        kind: run_composites(
            model,
            images,
            difference,
            margin,
            of_chosen,
            regions=kind,
            per_image=_PER_IMAGE,
            batch_size=batch_size,
            seed=seed,
        ).skill
        for kind in kinds
    }


def spread(positions: Sequence[_Position], most: int) -> list[_Position]:
    """At most so many of them, evenly spaced, both ends included.

    Example:
        >>> spread(range(9), 3)
        [0, 4, 8]
    """
    count = min(most, len(positions))
    places = np.linspace(0, len(positions) - 1, count).astype(int)
    return [positions[place] for place in places]
