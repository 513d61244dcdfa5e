"""Attacks on class maps: models that decide as before and show what the attacker likes.

Softmax sees the difference of two logits only, so what their maps have in common can be anything.
:func:`head_shift` uses this without training; the losses here (:data:`OBJECTIVES`) and
:func:`diffsal.train.fit` train for it, as the paper does (Eq. 2 with a false human map: passive
fooling) and as Heo, Joo and Moon do (NeurIPS 2019). :func:`fool` does either to a weights file and
measures what became of decisions and maps on images that the attack has not seen.

The attacks exist to test explanations, and to test whether an audit notices them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from diffsal.contrast import class_count, predicted_class, probabilities
from diffsal.data import ImageDataset, Index, Item, Pixels, Sample, decode, with_validation
from diffsal.devices import choose_device
from diffsal.errors import DiffsalError
from diffsal.faithfulness import edge_frame
from diffsal.images import Preprocessing, read_map
from diffsal.losses import (
    BaselineSalienceLoss,
    CrossEntropyLoss,
    DifferenceSalienceLoss,
    SalienceLoss,
)
from diffsal.models import LoadedModel, check_class_order, save_checkpoint
from diffsal.salience import SalienceMaps, explain, normalize
from diffsal.target_layers import TargetLayer, find_target_layer
from diffsal.train import TrainingConfig, auroc, fit

__all__ = [
    "FINE_TUNING",
    "MEASURES",
    "OBJECTIVES",
    "BothMapsLoss",
    "CenterMassLoss",
    "HeadShift",
    "Method",
    "Objective",
    "TopKLoss",
    "as_table",
    "centroid_shift",
    "fool",
    "head_shift",
    "target_distance",
    "target_map",
    "top_cells",
]

Objective: TypeAlias = Literal["true", "difference", "both", "top-k", "center-mass"]
"""What training moves: see :data:`OBJECTIVES`."""
Method: TypeAlias = Literal["trained", "head-shift"]
Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]

FINE_TUNING = TrainingConfig(epochs=20, lr=0.02, batch_size=16, schedule="cosine")
"""How :func:`fool` trains unless told otherwise."""

_FITTING_IMAGES = 300
_RIDGES = tuple(10.0**exponent for exponent in range(-6, 2))
_GAINS = (3.0, 5.0, 10.0)


# ------------------------------------------------------------------------------- what is to be seen


def target_map(
    target: str | Path | Tensor, size: tuple[int, int], width: int | None = None
) -> Tensor:
    """What a fooled map is to show, on the grid of the model's maps.

    Args:
        target: ``"edges"``, a frame along the edges (the paper's); ``"corner"``, the top left one,
            a third of each side; the path of an image, bright where the map is to be high; or a
            map (H, W).
        size: (h, w), cells.
        width: of the frame, in cells; ``None``: a seventh of the shorter side, as in Heo et al.,
            but at least one.

    Returns:
        (h, w) float32 in [0, 1]; an image or a map is averaged over each cell, and normalised.

    Raises:
        DiffsalError: an image that cannot be read or is constant on the grid; a width without a
            frame, or one that does not fit.
    """
    if isinstance(target, str) and target == "edges":
        return edge_frame(size, max(1, min(size) // 7) if width is None else width)
    if width is not None:
        raise DiffsalError(f"the target {target} has no width: leave it out, or choose edges")
    if isinstance(target, str) and target == "corner":
        pixels = torch.zeros(size)
        pixels[: -(-size[0] // 3), : -(-size[1] // 3)] = 1
    else:
        if not isinstance(target, Tensor):
            target = torch.from_numpy(read_map(Path(target)))
        pixels = F.adaptive_avg_pool2d(target[None].float(), size)[0]
    pixels = normalize(pixels[None])[0]
    if not pixels.any():
        raise DiffsalError(
            f"the target is constant on a map of {size[0]} × {size[1]} cells: choose an image "
            "whose parts differ"
        )
    return pixels


def target_distance(maps: Tensor, target: Tensor) -> Tensor:
    """(B,): mean squared distance of each normalised map (B, h, w) to a target (h, w) in [0, 1]."""
    return (normalize(maps) - target).square().flatten(1).mean(1)


def top_cells(maps: Tensor, reference: Tensor) -> Tensor:
    """(B,): the normalised maps' mean over the cells where a reference was highest.

    These are a tenth of the cells, at least one (Heo et al.: the top l // 10 of l).

    Args:
        maps: (B, h, w), of any unit.
        reference: as many, usually the honest model's.
    """
    cells = reference.flatten(1)
    highest = cells.topk(max(1, cells.shape[1] // 10)).indices
    return normalize(maps).flatten(1).gather(1, highest).mean(1)


def centroid_shift(maps: Tensor, reference: Tensor) -> Tensor:
    """(B,): how far the normalised maps' centroids lie from a reference's (Heo et al.).

    The distances along both axes are added, in shares of the sides. A constant map has its
    centroid in the centre. Arguments as for :func:`top_cells`.
    """
    return (_centroid(maps) - _centroid(reference)).abs().sum(1)


def _centroid(maps: Tensor) -> Tensor:
    """(B, 2), from 0 to 1 along each axis."""
    mass = normalize(maps)
    mass = mass + (mass.flatten(1).amax(1) == 0)[:, None, None]
    centres = [(torch.arange(cells).to(mass) + 0.5) / cells for cells in mass.shape[1:]]
    moments = torch.stack([mass.sum(2) @ centres[0], mass.sum(1) @ centres[1]], dim=1)
    return moments / mass.sum((1, 2))[:, None]


# ------------------------------------------------------------------------------------ for training


class BothMapsLoss(SalienceLoss):
    """Both classes' maps are to look like the target: α·CE + β·(MSE(h, norm t) + MSE(h, norm f)).

    Terms: ``cross_entropy``, ``true``, ``false``.

    Shape:
        maps of (B, h, w), targets as the human maps of the other losses; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of each map's term.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__(cross_entropy=alpha, true=beta, false=beta)
        self.baseline = BaselineSalienceLoss()

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``, ``true`` and ``false``."""
        swapped = replace(maps, true=maps.false, false=maps.true)
        return {
            **self.baseline.terms(maps, human_maps),
            "false": self.baseline.terms(swapped, human_maps)["true"],
        }


class _ReferenceLoss(SalienceLoss):
    """Cross-entropy, and a measure between the true map and the honest model's."""

    def __init__(self, name: str, measure: Measure, alpha: float, weight: float) -> None:
        super().__init__(cross_entropy=alpha, **{name: weight})
        self.name, self.measure = name, measure
        self.cross_entropy = CrossEntropyLoss()

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy`` and the measure's mean over the batch."""
        if human_maps is None or human_maps.shape != maps.true.shape:
            raise DiffsalError(
                f"{type(self).__name__} needs the honest model's maps of shape "
                f"{tuple(maps.true.shape)} in the place of human maps"
            )
        away = self.measure(maps.true, human_maps.to(maps.true.dtype)).mean()
        return {**self.cross_entropy.terms(maps, None), self.name: away}


class TopKLoss(_ReferenceLoss):
    """Heo et al.'s top-k fooling: α·CE + β·mean of norm t over the honest map's highest cells.

    Terms: ``cross_entropy``, ``top_cells``, see :func:`top_cells`.

    Shape:
        maps of (B, h, w), and as human maps the honest model's (B, h, w); the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the highest cells.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__("top_cells", top_cells, alpha, beta)


class CenterMassLoss(_ReferenceLoss):
    """Heo et al.'s center-mass fooling: α·CE - β·distance of the centroids of t and the honest map.

    Terms: ``cross_entropy``, ``centroid_shift``, see :func:`centroid_shift`.

    Shape:
        maps of (B, h, w), and as human maps the honest model's (B, h, w); the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the distance.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__("centroid_shift", centroid_shift, alpha, -beta)


OBJECTIVES: dict[Objective, type[SalienceLoss]] = {
    "true": BaselineSalienceLoss,
    "difference": DifferenceSalienceLoss,
    "both": BothMapsLoss,
    "top-k": TopKLoss,
    "center-mass": CenterMassLoss,
}
"""Objective to loss: bring the true map (the paper), the difference map (an attacker who knows this
package) or both classes' maps to the target; or the true map away from what it was."""

MEASURES: dict[Objective, Measure] = {
    **dict.fromkeys(get_args(Objective)[:3], target_distance),
    "top-k": top_cells,
    "center-mass": centroid_shift,
}
"""Objective to what tells of each map how far the attack got."""


# -------------------------------------------------------------------------------------- closed form


class HeadShift(NamedTuple):
    """A model whose decisions are the original's, and whose class maps are not.

    Attributes:
        model: a copy, another in its last linear layer alone.
        shift: (C,) float64, what was added to every row of its weight.
        ridge: of the regression, in units of the features' mean variance.
        gain: spread of the fitted map, in units of the spread of what the class maps show
            of the decision (half the difference, for two classes).
    """

    model: nn.Module
    shift: Tensor
    ridge: float
    gain: float


def head_shift(
    model: nn.Module,
    batches: Iterable[Tensor],
    target: str | Path | Tensor = "edges",
    *,
    target_layer: TargetLayer | None = None,
    bound: float = 5e-6,
) -> HeadShift:
    """Have every class map show a target, by one vector added to all rows of the last layer.

    All logits move by the same amount, so every probability stays, up to rounding. The vector is
    the ridge regression from the features of a cell to the target's value there. The rows' mean,
    which softmax cannot see either, is taken out first, and the biases take back what the vector
    adds on average, so that the logits stay small. Of some ridges and gains those are taken that
    bring the maps nearest to the target on a quarter of the images, which the regression does not
    see, among those that keep to the bound on all of them.

    Args:
        model: with a head of global pooling and a linear layer, and two or more logits; left
            untouched.
        batches: of images (B, C, H, W) on the model's device; a few hundred images in all, whose
            features at the target layer must fit in memory.
        target: see :func:`target_map`.
        target_layer: where maps are taken; ``None``: it is found.
        bound: on the change of any probability of any of the images.

    Raises:
        DiffsalError: a head of another kind, one logit, too few images, features that do not
            vary, or no shift within the bound; see :func:`target_map`.
    """
    layer = target_layer or find_target_layer(model)
    with torch.inference_mode(False):
        fooled = deepcopy(model)
        frozen = deepcopy(model).eval().requires_grad_(False)
        name, cells, pooled = _features(frozen, _within(frozen, layer), batches)
        pixels = target_map(target, (cells.shape[2], cells.shape[3])).cpu()
        linear = frozen.get_submodule(name).cpu()
        assert isinstance(linear, nn.Linear)
        kept = [one for one in _shifts(linear, cells, pooled, pixels) if one.change <= bound]
        if not kept:
            raise DiffsalError(
                f"every head-shift changes a probability by more than {bound:g}: pass the model in "
                "float32 or float64, or a larger bound"
            )
        best = min(kept, key=lambda one: one.distance)
        fooled.get_submodule(name).load_state_dict(best.linear.state_dict())
    return HeadShift(fooled, best.vector, best.ridge, best.gain)


def _features(
    model: nn.Module, layer: TargetLayer, batches: Iterable[Tensor]
) -> tuple[str, Tensor, Tensor]:
    """The head's name, what each cell adds to its input (N, C, h, w), and its input (N, C)."""
    name, parts = "", []
    for images in batches:
        name = name or _linear_head(model, layer, images)
        parts.append(_contributions(model, layer, name, images))
    if sum(len(pooled) for _, pooled in parts) < 2:
        raise DiffsalError("head-shift is fitted on some images: pass a few hundred, at least two")
    cells, pooled = map(torch.cat, zip(*parts, strict=True))
    return name, cells, pooled


def _linear_head(model: nn.Module, layer: TargetLayer, images: Tensor) -> str:
    """The name of the linear layer whose output is the logits, of a model that has maps."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if type(module) is nn.Linear:  # a parametrised one computes its weight
                hook = partial(_record, outputs, name)
                stack.callback(module.register_forward_hook(hook).remove)
        logits = explain(model, images, target_layers=layer).logits
    if logits.shape[1] == 1:
        raise DiffsalError(
            "the model has one logit, whose map has no part that the decision does not see: "
            "head-shift needs two logits or more"
        )
    for name, output in outputs.items():
        if output.shape == logits.shape and torch.allclose(output, logits.to(output.dtype)):
            return name
    raise _not_pooled(model)


def _record(
    outputs: dict[str, Tensor], name: str, _module: nn.Module, _inputs: Any, output: Tensor
) -> None:
    outputs[name] = output.detach()


def _contributions(
    model: nn.Module, layer: TargetLayer, head: str, images: Tensor
) -> tuple[Tensor, Tensor]:
    """What each cell adds to the head's input (B, C, h, w), and that input (B, C); on the CPU.

    Where channels are pooled one by one, activation times gradient of the inputs' sum is what the
    elementwise maps are made of, whether the pooling takes the mean, the sum or the maximum, and
    whether a ReLU stands before it. That it adds up, channel by channel, is checked.
    """
    activations: list[Tensor] = []
    inputs: list[Tensor] = []

    def begin(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        activations.append(output.detach().requires_grad_())
        return activations[-1].clone()

    with ExitStack() as stack, torch.enable_grad():
        stack.callback(layer.module.register_forward_hook(begin).remove)
        keep = model.get_submodule(head).register_forward_pre_hook(
            lambda _module, given: inputs.append(given[0])
        )
        stack.callback(keep.remove)
        model(images)
    activation, pooled = activations[0], inputs[0]
    if not pooled.requires_grad:
        raise _not_pooled(model)
    (gradient,) = torch.autograd.grad(pooled.sum(), activation)
    if layer.reshape is not None:
        activation, gradient = layer.reshape(activation), layer.reshape(gradient)
    cells, pooled = (activation * gradient).detach(), pooled.detach()
    if cells.ndim != 4 or cells.shape[:2] != pooled.shape:
        raise _not_pooled(model)
    if not torch.allclose(cells.sum((2, 3)), pooled, 1e-3, 1e-4 * float(pooled.abs().max())):
        raise _not_pooled(model)
    return cells.cpu(), pooled.cpu()


def _not_pooled(model: nn.Module) -> DiffsalError:
    return DiffsalError(
        f"head-shift needs global pooling and one linear layer behind the target layer, and "
        f"{type(model).__name__} has another head: fool it by training"
    )


@dataclass(frozen=True)
class _Shift:
    linear: nn.Linear
    vector: Tensor
    ridge: float
    gain: float
    distance: float
    change: float


def _shifts(linear: nn.Linear, cells: Tensor, pooled: Tensor, target: Tensor) -> Iterator[_Shift]:
    """Every ridge with every gain, and how the shifted layer does."""
    judging = torch.arange(len(cells)) % 4 == 0
    judges, logits = cells[judging].double(), linear(pooled)
    vectors = _ridge_regressions(cells[~judging], target)
    fitted = torch.einsum("rc,nchw->rnhw", vectors, judges)
    weight = linear.weight.double()
    predicted = (weight - weight.mean(0))[predicted_class(logits)[judging]]
    decisive = torch.einsum("nc,nchw->nhw", predicted, judges)
    for ridge, vector, map_ in zip(_RIDGES, vectors, fitted, strict=True):
        for gain in _GAINS:
            scale = gain * (_spread(decisive) or 1) / _spread(map_)
            shifted = _shifted(linear, scale * vector, pooled.double().mean(0))
            yield _Shift(
                linear=shifted,
                vector=scale * vector - weight.mean(0),
                ridge=ridge,
                gain=gain,
                distance=float(target_distance(decisive + scale * map_, target).mean()),
                change=float((probabilities(shifted(pooled)) - probabilities(logits)).abs().max()),
            )


def _ridge_regressions(cells: Tensor, target: Tensor) -> Tensor:
    """(R, C) float64: for each of the ridges, the weights from centred features to the target."""
    features = cells.double().movedim(1, -1).flatten(0, 2)
    size = features.square().sum()
    features = features - features.mean(0)
    wanted = (target.double() - target.double().mean()).expand(len(cells), -1, -1).flatten()
    variances, directions = torch.linalg.eigh(features.T @ features)
    if variances.max() <= 1e-12 * size:  # float32's rounding
        raise DiffsalError("the features at the target layer are constant: no map can be fitted")
    moments = directions.T @ (features.T @ wanted)
    ridges = torch.tensor(_RIDGES, dtype=torch.float64)[:, None] * variances.mean()
    weights: Tensor = (moments / (variances.clamp(min=0) + ridges)) @ directions.T
    return weights


def _spread(maps: Tensor) -> float:
    return float(maps.flatten(1).var(1, correction=0).mean().sqrt())


def _shifted(linear: nn.Linear, vector: Tensor, mean: Tensor) -> nn.Linear:
    """The layer without the mean of its rows and biases, with the vector added to each row.

    The bias takes back what the vector makes of the mean input.
    """
    shifted = deepcopy(linear)
    weight = linear.weight.double()
    shifted.weight.copy_(weight - weight.mean(0) + vector)
    if linear.bias is not None:
        bias = linear.bias.double()
        shifted.bias.copy_(bias - bias.mean() - vector @ mean)
    return shifted


# ----------------------------------------------------------------------------------- a weights file


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

    The attack learns from the index's training samples and is measured on its ``test`` samples;
    where there are none, on ``val``, which are held out where the index has none either.

    Args:
        index: labels in the order of the model's outputs; human maps are not used.
        loaded: the honest model, left as it is. A float32 copy is fooled, so the checkpoint is
            float32 whatever the model's precision.
        out: path of the checkpoint to write, for ``diffsal explain --model``.
        target: see :func:`target_map`; ``top-k`` and ``center-mass`` have none.
        width: of the frame, see there.
        objective: see :data:`OBJECTIVES`; ``head-shift`` moves both maps, and so fits ``true`` and
            ``both``.
        method: ``trained``, by :func:`diffsal.train.fit`, or ``head-shift``, see
            :func:`head_shift`; it is fitted on at most 300 images.
        preprocessing: ``None``: the model's own, or the usual.
        config: of the training all but model, data and method; ``alpha`` and ``beta`` weigh the
            objective's terms. Of a head-shift: ``seed``, ``validation``, ``batch_size``,
            ``device``, ``workers``.
        read: see :class:`diffsal.data.ImageDataset`.

    Returns:
        Plain JSON types: ``out``, ``method``, ``objective``, ``target``; ``measure``, the name of
        the objective's in :data:`MEASURES`; ``images``, how many it was measured on; ``honest`` and
        ``fooled``, each with ``auroc``, ``accuracy``, means over the images of the ``measure`` of
        the ``true``, ``false`` and ``difference`` map, and of their ``common_mode_share`` (``None``
        for one logit); ``agreement``, the share of equal predictions; and
        ``largest_probability_change``.

    Raises:
        DiffsalError: classes that do not fit the index's; a class without a held-out sample; a
            head-shift with an objective that it cannot reach; a target or a width for an objective
            that has none; see :func:`target_map`, :func:`head_shift`, :func:`diffsal.train.fit` and
            :func:`diffsal.data.with_validation`.
    """
    _check(objective, method, target, width)
    check_class_order(loaded, index.classes, index.source)
    honest = deepcopy(loaded.model).float().to(choose_device(config.device))
    layer = _within(honest, loaded.target_layer)
    preprocessing = preprocessing or loaded.preprocessing or Preprocessing()
    parts = _parts(index, config)
    plain = ImageDataset([*parts[0], *parts[1]], preprocessing, read=read)
    first, _ = next(_explained(honest, layer, plain, config))
    _check_classes(class_count(first.logits), index, parts[1])
    if MEASURES[objective] is target_distance:
        pixels = target_map(target, (first.true.shape[1], first.true.shape[2]), width)
        references = dict.fromkeys((sample.path for sample in plain.samples), pixels.numpy())
    else:
        references = _true_maps(honest, layer, plain, config)
    training, held_out = (
        ImageDataset(part, preprocessing, read=partial(_with_reference, read, references))
        for part in parts
    )

    before = _observe(honest, layer, held_out, MEASURES[objective], config)
    summary = before.summary(held_out)  # before the work, so that what it refuses costs none
    if method == "trained":
        fooled = _trained(honest, layer, training, objective, config)
    else:
        fooled = _head_shifted(honest, layer, training, config)
    after = _observe(fooled, layer, held_out, MEASURES[objective], config)

    attack = {"method": method, "objective": objective, "target": str(target)}
    save_checkpoint(
        out,
        fooled,
        architecture=loaded.architecture,
        arguments=loaded.arguments,
        classes=index.classes,
        preprocessing=preprocessing,
        target_layer=layer.name,
        fooling=attack,
    )
    agree = predicted_class(after.logits) == predicted_class(before.logits)
    changes = probabilities(after.logits) - probabilities(before.logits)
    return {
        "out": str(out),
        **attack,
        "images": len(held_out),
        "measure": MEASURES[objective].__name__,
        "honest": summary,
        "fooled": after.summary(held_out),
        "agreement": float(agree.double().mean()),
        "largest_probability_change": float(changes.abs().max()),
    }


def as_table(report: Mapping[str, Any]) -> str:
    """What :func:`fool` returns, for people to read."""
    measure = report["measure"].replace("_", " ")
    names = {
        "auroc": "AUROC",
        "accuracy": "accuracy",
        "common_mode_share": "common-mode share",
        **{map_: f"{map_} map, {measure}" for map_ in ("true", "false", "difference")},
    }
    lines = [f"{'':34}{'honest':>9}{'fooled':>9}"]
    for key, name in names.items():
        pair = [report[model][key] for model in ("honest", "fooled")]
        lines.append(
            f"{name:34}" + "".join("        -" if x is None else f"{x:9.4f}" for x in pair)
        )
    return "\n".join(
        [
            *lines,
            f"{'agreement of predictions':43}{report['agreement']:9.4f}",
            f"{'largest change of a probability':43}{report['largest_probability_change']:9.2g}",
        ]
    )


def _check(objective: Objective, method: Method, target: str | Path, width: int | None) -> None:
    if method == "head-shift" and objective not in ("true", "both"):
        raise DiffsalError(
            f"head-shift moves both classes' maps alike and cannot reach {objective}: fool by "
            "training, or choose the objective true or both"
        )
    if MEASURES[objective] is not target_distance and (target != "edges" or width is not None):
        raise DiffsalError(
            f"the objective {objective} has no target: leave out target and width, or choose "
            "another objective"
        )


def _check_classes(count: int, index: Index, held_out: list[Sample]) -> None:
    if count != len(index.classes):
        raise DiffsalError(
            f"the model tells {count} classes apart, {index.source} has {len(index.classes)}: pass "
            "the index that it was trained for"
        )
    missing = set(range(count)) - {sample.label for sample in held_out}
    if missing:
        split = "test" if index.split("test") else "val"
        raise DiffsalError(
            f"{index.source}: AUROC is undefined, no sample of the class "
            f"{index.classes[min(missing)]} has the split {split}; mark some"
        )


def _parts(index: Index, config: TrainingConfig) -> tuple[list[Sample], list[Sample]]:
    """The samples to learn from and to measure on, without their human maps."""
    if not index.split("test"):
        index = with_validation(index, config.validation, config.seed)
    training, held_out = (
        [replace(sample, map=None) for sample in part]
        for part in (index.split("train"), index.split("test") or index.split("val"))
    )
    if not training:
        raise DiffsalError(f"{index.source}: no sample has the split train; mark some")
    return training, held_out


def _with_reference(
    read: Callable[[Sample, Preprocessing], Pixels],
    references: Mapping[Path, NDArray[np.float32]],
    sample: Sample,
    preprocessing: Preprocessing,
) -> Pixels:
    """The sample with the map that the attack compares to, in the place of the human's."""
    return read(sample, preprocessing)[0], references[sample.path]


def _batches(dataset: Dataset[Item], config: TrainingConfig, title: str) -> Iterator[Any]:
    loader = DataLoader(dataset, config.batch_size, num_workers=config.workers)
    return iter(tqdm(loader, title, leave=False, disable=None))


def _explained(
    model: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> Iterator[tuple[SalienceMaps, Tensor]]:
    """The maps of each batch, the labels taken as true, and its references; on the CPU."""
    device = next(model.parameters()).device
    for images, labels, references, _ in _batches(dataset, config, "maps"):
        maps = explain(model, images.to(device), labels, target_layers=_within(model, layer))
        yield maps.to("cpu"), references


def _within(model: nn.Module, layer: TargetLayer) -> TargetLayer:
    """The same layer of a copy of its model."""
    return replace(layer, module=model.get_submodule(layer.name))


def _true_maps(
    model: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> dict[Path, NDArray[np.float32]]:
    maps = [maps.true.float() for maps, _ in _explained(model, layer, dataset, config)]
    paths = [sample.path for sample in dataset.samples]
    return dict(zip(paths, torch.cat(maps).numpy(), strict=True))


@dataclass(frozen=True)
class _Observed:
    """A model on N images: logits (N, K); and (N, 4), of each map the measure, and the share."""

    logits: Tensor
    measured: Tensor

    def summary(self, dataset: ImageDataset) -> dict[str, float | None]:
        labels = [sample.label for sample in dataset.samples]
        right = predicted_class(self.logits) == torch.tensor(labels)
        means = self.measured.double().nanmean(0).tolist()
        true, false, difference, share = (None if isnan(mean) else mean for mean in means)
        return {
            "auroc": auroc(self.logits, labels),
            "accuracy": float(right.double().mean()),
            "true": true,
            "false": false,
            "difference": difference,
            "common_mode_share": share,
        }


def _observe(
    model: nn.Module,
    layer: TargetLayer,
    dataset: ImageDataset,
    measure: Measure,
    config: TrainingConfig,
) -> _Observed:
    logits, measured = [], []
    for maps, references in _explained(model, layer, dataset, config):
        each = [measure(one, references) for one in (maps.true, maps.false, maps.difference)]
        measured.append(torch.stack([*each, maps.common_mode_share], dim=1))
        logits.append(maps.logits.float())
    return _Observed(torch.cat(logits), torch.cat(measured))


def _head_shifted(
    honest: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> nn.Module:
    device = next(honest.parameters()).device
    count = min(_FITTING_IMAGES, len(dataset))
    some = Subset(dataset, Random(config.seed).sample(range(len(dataset)), count))
    images = (batch[0].to(device) for batch in _batches(some, config, "features"))
    return head_shift(honest, images, dataset[0][2], target_layer=layer).model


def _trained(
    honest: nn.Module,
    layer: TargetLayer,
    dataset: ImageDataset,
    objective: Objective,
    config: TrainingConfig,
) -> nn.Module:
    fooled = deepcopy(honest)
    weights = {"alpha": config.alpha, "beta": config.beta}
    given: dict[str, Any] = {name: value for name, value in weights.items() if value is not None}
    criterion = OBJECTIVES[objective](**given)
    deque(fit(fooled, criterion, dataset, None, config, target_layer=_within(fooled, layer)), 0)
    return fooled.eval()
