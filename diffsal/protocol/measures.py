"""A trained model on the held-out samples: logits, map measures, pictures."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Index
from diffsal.faithfulness.input_level import smoothgrad, smoothgrad_agreement
from diffsal.faithfulness.localisation import energy_inside, marked_share, pointing_game
from diffsal.faithfulness.pasting import Regions
from diffsal.faithfulness.perturbation import occlusion_drops, occlusion_faithfulness
from diffsal.fooling.skill import composite_skills, spread
from diffsal.fooling.targets import target_distance, target_map
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer

Columns: TypeAlias = dict[str, list[Any]]
"""Measure to a value for each sample; ``None``: it has none."""
_OCCLUDED = 40  # images; each costs a forward pass for every cell of its map
_PASTED = 60  # images of each class


def measured_columns(
    model: nn.Module,
    layer: TargetLayer,
    test: ImageDataset,
    batch_size: int,
    with_edges: bool = False,
) -> Columns:
    """Of every sample: logits; where the true and the difference map lie; their common part.

    Args:
        model: of one or two logits, in evaluation mode.
        layer: where its maps are taken.
        test: the samples.
        batch_size: how many at once.
        with_edges: tell the maps' distances to a frame along the edges, too.

    Example:
        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> from diffsal.maps.target_layers import get_target_layer
        >>> read = lambda *_: (np.ones((4, 4, 3), np.uint8), np.eye(4, dtype=np.float32))
        >>> samples = Sample(Path("a.png"), 0), Sample(Path("b.png"), 1)
        >>> test = ImageDataset(samples, Preprocessing(size=(4, 4)), read=read)
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(4), nn.Flatten()).eval()
        >>> layer = get_target_layer(model, "0")
        >>> measured_columns(model, layer, test, batch_size=2)["marked_share"]
        [0.25, 0.25]
    """
    parts: list[dict[str, Tensor]] = []
    for images, labels, human, _ in DataLoader(test, batch_size):
        maps = _explained(model, layer, images, labels)
        columns = {"logits": maps.logits}
        for name in ("true", "difference"):
            one = getattr(maps, name)
            columns[f"pointing_{name}"] = pointing_game(one, human)
            columns[f"energy_{name}"] = energy_inside(one, human)
            if with_edges:
                frame = target_map("edges", (one.shape[1], one.shape[2]))
                columns[f"edges_{name}"] = target_distance(one, frame)
        columns["marked_share"] = marked_share(human)
        columns["common_mode_share"] = maps.common_mode_share
        parts.append(columns)
    return {name: _column(torch.cat([part[name] for part in parts])) for name in parts[0]}


def occluded_columns(model: nn.Module, layer: TargetLayer, test: ImageDataset) -> Columns:
    """Of some samples, spread over the index: does what the maps mark move the margin?

    ``occlusion_*`` asks it by occluding cells, ``smoothgrad_difference`` by gradients to the pixels
    (:func:`diffsal.faithfulness.input_level.smoothgrad_agreement`).

    Example:
        Where each cell sees one pixel, what it says is what it does:

        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> from diffsal.maps.target_layers import get_target_layer
        >>> noise = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
        >>> read = lambda sample, _: (noise[sample.label], None)
        >>> samples = Sample(Path("a.png"), 0), Sample(Path("b.png"), 1)
        >>> test = ImageDataset(samples, Preprocessing(size=(4, 4)), read=read)
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(4), nn.Flatten()).eval()
        >>> layer = get_target_layer(model, "0")
        >>> found = occluded_columns(model, layer, test)["occlusion_difference"]
        >>> [round(correlation, 3) for correlation in found]
        [1.0, 1.0]
    """
    device = next(model.parameters()).device
    names = ("occlusion_true", "occlusion_difference", "smoothgrad_difference")
    columns = {name: torch.full((len(test),), torch.nan) for name in names}
    for position in spread(range(len(test)), _OCCLUDED):
        image, label, _, _ = test[position]
        inputs, labels = image[None].to(device), torch.tensor([label]).to(device)
        maps = _explained(model, layer, inputs, labels)
        grid = maps.true.shape[1:]
        drops = occlusion_drops(model, inputs, labels, grid=grid).cpu()
        gradients = smoothgrad(model, inputs, labels, grid=grid).cpu()
        values = (
            occlusion_faithfulness(maps.true, drops),
            occlusion_faithfulness(maps.difference, drops),
            smoothgrad_agreement(maps.difference, gradients),
        )
        for name, value in zip(names, values, strict=True):
            columns[name][position] = value[0]
    return {name: _column(column) for name, column in columns.items()}


def composite_columns(
    model: nn.Module, layer: TargetLayer, test: ImageDataset, batch_size: int
) -> dict[str, float | None]:
    """Composite skill by kind of region, see :func:`diffsal.fooling.skill.composite_skills`.

    Returns:
        ``rectangles`` and ``marked``; ``None`` where it is undefined.

    Example:
        Of one image there are no composites:

        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> from diffsal.maps.target_layers import get_target_layer
        >>> test = ImageDataset([Sample(Path("a.png"), 0)], Preprocessing(size=(4, 4)))
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(4), nn.Flatten()).eval()
        >>> composite_columns(model, get_target_layer(model, "0"), test, batch_size=2)
        {'rectangles': None, 'marked': None}
    """
    kinds: tuple[Regions, ...] = ("rectangles", "marked")
    found = composite_skills(model, layer, test, batch_size, kinds=kinds, of_each=_PASTED)
    return dict(zip(kinds, _column(torch.tensor([found[kind] for kind in kinds])), strict=True))


def typical_samples(logits: Sequence[Sequence[float]], index: Index) -> list[int]:
    """Of each class, the tested sample whose margin is the median.

    Example:
        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> labels = 0, 0, 0, 1
        >>> samples = tuple(Sample(Path("image"), label, split="test") for label in labels)
        >>> index = Index(Path("index.csv"), ("intact", "worn"), samples)
        >>> typical_samples([[0, -1], [0, -5], [0, -3], [0, 2]], index)
        [2, 3]
    """
    labels = np.array([sample.label for sample in index.split("test")])
    margins = np.array(logits) @ ([1.0] if len(logits[0]) == 1 else [-1.0, 1.0])
    chosen = []
    for label in range(len(index.classes)):
        (positions,) = np.nonzero(labels == label)
        order = positions[np.argsort(margins[positions], kind="stable")]
        chosen.append(int(order[len(order) // 2]))
    return chosen


def maps_of(
    model: nn.Module, layer: TargetLayer, test: ImageDataset, chosen: Sequence[int]
) -> dict[str, list[Any]]:
    """Raw maps (h, w) of some samples, logits per cell.

    Example:
        >>> from pathlib import Path
        >>> from diffsal.data.index import Sample
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> from diffsal.maps.target_layers import get_target_layer
        >>> noise = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
        >>> read = lambda sample, _: (noise[sample.label], None)
        >>> samples = Sample(Path("a.png"), 0), Sample(Path("b.png"), 1)
        >>> test = ImageDataset(samples, Preprocessing(size=(4, 4)), read=read)
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(4), nn.Flatten()).eval()
        >>> layer = get_target_layer(model, "0")
        >>> {name: np.shape(maps) for name, maps in maps_of(model, layer, test, [1]).items()}
        {'true': (1, 4, 4), 'false': (1, 4, 4), 'difference': (1, 4, 4)}
    """
    images, labels, _, _ = zip(*(test[position] for position in chosen), strict=True)
    maps = _explained(model, layer, torch.stack(images), torch.tensor(labels))
    return {name: _column(getattr(maps, name)) for name in ("true", "false", "difference")}


def _explained(
    model: nn.Module, layer: TargetLayer, images: Tensor, labels: Tensor
) -> SalienceMaps:
    """The maps of a batch with its labels taken as true, in float32 on the CPU."""
    device = next(model.parameters()).device
    return explain(model, images.to(device), labels.to(device), target_layers=layer).to("cpu")


def _column(values: Tensor) -> list[Any]:
    """Numbers as short as tells float32 values apart; ``None`` for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return float(str(np.float32(value))) if math.isfinite(value) else None

    column: list[Any] = plain(values.tolist())
    return column
