"""From an honest model to a fooled one, and what became of decisions and maps; no files.

Measured on images that the attack has not seen. The attacks exist to test explanations, and to test
whether an audit notices them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from inspect import signature
from math import isnan
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from diffsal.data.datasets import ImageDataset, Pixels
from diffsal.data.index import Index, Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import Held
from diffsal.data.splits import with_validation
from diffsal.errors import DiffsalError
from diffsal.fooling.head_shift import head_shift
from diffsal.fooling.objectives import MEASURES, OBJECTIVES, TESTS, Objective
from diffsal.fooling.result import Fooled
from diffsal.fooling.skill import composite_skills
from diffsal.fooling.targets import Measure, target_distance, target_map
from diffsal.maps.contrast import class_count, predicted_class, probabilities
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer, in_copy
from diffsal.models.checkpoints import LoadedModel, check_class_order
from diffsal.system.devices import choose_device
from diffsal.system.progress import stage
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import Further, Look, auroc, fit
from diffsal.training.losses import SalienceLoss

Method: TypeAlias = Literal["trained", "head-shift"]
FINE_TUNING = TrainingConfig(epochs=20, lr=0.02, batch_size=16, schedule="cosine")
"""How :func:`attack` and :func:`fine_tuned` train unless told otherwise."""

_FITTING_IMAGES = 300
_GAMMA = 0.1  # from 0.03 to 0.3, passing the test costs more and more of the target


def attack(
    loaded: LoadedModel,
    data: Held,
    held_out: Held | None = None,
    *,
    target: str | Path = "edges",
    width: int | None = None,
    objective: Objective = "true",
    method: Method = "trained",
    config: TrainingConfig = FINE_TUNING,
) -> Fooled:
    """Fool the maps of a model, and tell what changed on images that the attack has not seen.

    Args:
        loaded: the honest model, left as it is. A float32 copy is fooled, so the fooled model is
            float32 whatever the model's precision.
        data: labels in the order of the model's outputs; human maps are not used. The attack learns
            from the samples marked ``train`` and is measured on those marked ``test``; where there
            are none, on ``val``, which are held out where there are none either.
        held_out: other data to measure on; then it learns from all of ``data``, and neither names
            splits.
        target: see :func:`target_map`; ``top-k`` and ``center-mass`` have none.
        width: of the frame, see there.
        objective: see :data:`OBJECTIVES`; ``head-shift`` moves both maps, and so fits ``true`` and
            ``both``. ``control``: the honest model fine-tuned as long, which every fooled one is to
            be compared with; measured against the target, and not brought to it.
        method: ``trained``, by :func:`diffsal.training.loop.fit`, or ``head-shift``, see
            :func:`head_shift`; it is fitted on at most 300 images.
        config: of the training all but model, data and method; ``alpha``, ``beta`` and, of
            objectives in :data:`TESTS`, ``gamma`` weigh the objective's terms, 0.5, 0.5 and 0.1
            where they are ``None``. Of a head-shift: ``seed``, ``validation``, ``batch_size``,
            ``device``, ``workers``.

    Raises:
        DiffsalError: an objective, a method or a target of another kind; classes that do not fit
            the data's, or that ``held_out`` has otherwise; a class without a held-out sample; a
            head-shift with an objective that it cannot reach; a target, a width or a weight for an
            objective that has none; see :func:`target_map`, :func:`head_shift`,
            :func:`diffsal.training.loop.fit` and :func:`diffsal.data.splits.with_validation`.

    Example:
        See :func:`diffsal.fool`, which makes the first two arguments of what is in memory.
    """
    _check(objective, method, target, width)
    _criterion(objective, config)
    index = data.index
    check_class_order(loaded, index.classes, index.source)
    if held_out is not None and held_out.index.classes != index.classes:
        raise DiffsalError(
            f"held_out: its classes are {', '.join(held_out.index.classes)}, those of the data "
            f"{', '.join(index.classes)}: name both alike, in the order of the model's outputs"
        )
    parts = _parts(data, held_out, config)
    honest = deepcopy(loaded.model).float().to(choose_device(config.device)).eval()
    layer = in_copy(honest, loaded.target_layer)
    image = parts[0][0][0].to(next(honest.parameters()).device)
    first = explain(honest, image[None], target_layers=layer)
    _check_classes(class_count(first.logits), index, parts[1])
    if MEASURES[objective] is target_distance:
        pixels = target_map(target, (first.true.shape[1], first.true.shape[2]), width).numpy()
        training, measured = (_with_references(one, [pixels] * len(one)) for one in parts)
    else:
        training, measured = (
            _with_references(one, _true_maps(honest, layer, one, config)) for one in parts
        )
    fooled, outcome = _attacked(honest, layer, training, measured, method, objective, config)
    told = {"method": method, "objective": objective, "target": str(target)}
    description = {
        "classes": index.classes,
        "preprocessing": data.preprocessing,
        "target_layer": str(layer),
        "fooling": told,
    }
    if loaded.sha256:  # of what was never a file, nobody knows how it is built
        description |= {"architecture": loaded.architecture, "arguments": loaded.arguments}
    return Fooled(fooled, {**told, **outcome}, description)


def fine_tuned(
    honest: nn.Module,
    training: ImageDataset,
    objective: Objective = "control",
    config: TrainingConfig = FINE_TUNING,
    *,
    target_layer: TargetLayer | None = None,
) -> nn.Module:
    """A copy of a model, trained as by :func:`attack`; without an objective, the attacks' control.

    With an attack's configuration, ``beta`` and ``gamma`` included, the control sees the same
    batches in the same order, for as many steps of the same optimizer, and its cross-entropy weighs
    as much: what differs between the two is what the attack did.

    Args:
        honest: on its device; left as it is.
        training: samples to learn from; in the place of human maps, what the objective compares to,
            which is nothing for the ``control``.
        objective: see :data:`OBJECTIVES`.
        config: see :func:`attack`.
        target_layer: where maps are taken; ``None``: it is found.

    Returns:
        The copy, in evaluation mode.

    Raises:
        DiffsalError: a weight that the objective does not have; a model whose parameters are all
            frozen; see :func:`diffsal.training.loop.fit` and :mod:`diffsal.fooling.consistency`.

    Example:
        >>> from diffsal.demo import PREPROCESSING, digits, train_digits
        >>> train, _ = digits()
        >>> samples = [Sample(Path(str(n)), int(train.labels[n])) for n in range(16)]
        >>> read = lambda sample, _: (train.images[int(sample.path.name)], None)
        >>> honest = train_digits(train, epochs=1)
        >>> config = replace(FINE_TUNING, epochs=1)
        >>> dataset = ImageDataset(samples, PREPROCESSING, read=read)
        >>> control = fine_tuned(honest, dataset, config=config)
        >>> control.training, torch.equal(control.classifier.bias, honest.classifier.bias)
        (False, False)
    """
    criterion, gamma = _criterion(objective, config)

    model = deepcopy(honest)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DiffsalError(
            "none of the model's parameters requires a gradient: unfreeze some, or choose the "
            "method head-shift"
        )
    layer = target_layer and in_copy(model, target_layer)
    further: Further | None = None
    if objective in TESTS:
        test = TESTS[objective](deepcopy(honest).eval())

        def further(look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps) -> Any:
            return {objective: (gamma, test(look, images, labels, maps))}

    epochs = fit(model, criterion, training, None, config, target_layer=layer, further=further)
    with stage("training", config.epochs * len(training)) as advance:
        for _ in epochs:
            advance(len(training))
    return model.eval()


def _check(objective: Objective, method: Method, target: str | Path, width: int | None) -> None:
    for name, given, known in (("objective", objective, Objective), ("method", method, Method)):
        if given not in get_args(known):
            raise DiffsalError(
                f"the {name} {given!r} is unknown: choose one of {', '.join(get_args(known))}"
            )
    if not isinstance(target, str | Path):
        raise DiffsalError(
            f"the target is a {type(target).__name__}: pass edges, corner, middle or the path of "
            "an image"
        )
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


def _check_classes(count: int, index: Index, held_out: ImageDataset) -> None:
    if count != len(index.classes):
        raise DiffsalError(
            f"the model tells {count} classes apart, {index.source} has {len(index.classes)}: pass "
            "the index that it was trained for"
        )
    missing = set(range(count)) - {sample.label for sample in held_out.samples}
    if missing:
        split = held_out.samples[0].split
        raise DiffsalError(
            f"{index.source}: AUROC is undefined, no sample of the class "
            f"{index.classes[min(missing)]} "
            + (f"has the split {split}; mark some" if split else "is held out; add some")
        )


def _parts(
    data: Held, held_out: Held | None, config: TrainingConfig
) -> tuple[ImageDataset, ImageDataset]:
    """The samples to learn from and to measure on, without their human maps."""
    if held_out is not None:
        for one in (data, held_out):
            if any(sample.split for sample in one.index.samples):
                raise DiffsalError(f"{one.index.source}: names splits itself: leave out held_out")
        return _dataset(data, data.index.samples), _dataset(held_out, held_out.index.samples)
    index = data.index
    if not index.split("test"):
        index = with_validation(index, config.validation, config.seed)
    if not index.split("train"):
        raise DiffsalError(f"{index.source}: no sample has the split train; mark some")
    measured = index.split("test") or index.split("val")
    return _dataset(data, index.split("train")), _dataset(data, measured)


def _dataset(data: Held, samples: Sequence[Sample]) -> ImageDataset:
    plain = [replace(sample, map=None) for sample in samples]
    return data.source.items(plain, data.preprocessing)


def _with_references(dataset: ImageDataset, maps: Iterable[NDArray[np.float32]]) -> ImageDataset:
    """The samples with the maps that the attack compares to, in the place of the humans'."""
    references = dict(zip((sample.path for sample in dataset.samples), maps, strict=True))
    compared = copy(dataset)
    compared.read = partial(_with_reference, dataset.read, references)
    return compared


def _with_reference(
    read: Callable[[Sample, Preprocessing], Pixels],
    references: Mapping[Path, NDArray[np.float32]],
    sample: Sample,
    preprocessing: Preprocessing,
) -> Pixels:
    return read(sample, preprocessing)[0], references[sample.path]


def _explained(
    model: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig, title: str
) -> Iterator[tuple[SalienceMaps, Tensor]]:
    """The maps of each batch, the labels taken as true, and its references; on the CPU."""
    device = next(model.parameters()).device
    loader = DataLoader(dataset, config.batch_size, num_workers=config.workers)
    with stage(title, len(dataset)) as advance:
        for images, labels, references, _ in loader:
            maps = explain(model, images.to(device), labels, target_layers=in_copy(model, layer))
            yield maps.to("cpu"), references
            advance(len(images))


def _true_maps(
    model: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> NDArray[np.float32]:
    """(N, h, w)"""
    parts = _explained(model, layer, dataset, config, "references")
    return torch.cat([maps.true.float() for maps, _ in parts]).numpy()


def _attacked(
    honest: nn.Module,
    layer: TargetLayer,
    training: ImageDataset,
    held_out: ImageDataset,
    method: Method,
    objective: Objective,
    config: TrainingConfig,
) -> tuple[nn.Module, dict[str, Any]]:
    """The fooled model, and what became of decisions and maps of the held-out images."""
    measure = MEASURES[objective]
    # Before the work, so that what is refused costs none.
    logits, summary = _observe(honest, layer, held_out, measure, config, "honest model")
    if method == "trained":
        fooled = fine_tuned(honest, training, objective, config, target_layer=layer)
    else:
        fooled = _head_shifted(honest, layer, training, config).eval()
    fooled_logits, fooled_summary = _observe(
        fooled, layer, held_out, measure, config, "fooled model"
    )
    agree = predicted_class(fooled_logits) == predicted_class(logits)
    changes = probabilities(fooled_logits) - probabilities(logits)
    return fooled, {
        "images": len(held_out),
        "measure": measure.__name__,
        "honest": summary,
        "fooled": fooled_summary,
        "agreement": float(agree.double().mean()),
        "largest_probability_change": float(changes.abs().max()),
    }


def _observe(
    model: nn.Module,
    layer: TargetLayer,
    dataset: ImageDataset,
    measure: Measure,
    config: TrainingConfig,
    title: str,
) -> tuple[Tensor, dict[str, float | None]]:
    """Logits (N, K) of a model on N images, and what the report says of it."""
    parts, measured = [], []
    for maps, references in _explained(model, layer, dataset, config, title):
        each = [measure(one, references) for one in (maps.true, maps.false, maps.difference)]
        measured.append(torch.stack([*each, maps.common_mode_share], dim=1))
        parts.append(maps.logits.float())
    logits, labels = torch.cat(parts), [sample.label for sample in dataset.samples]
    right = predicted_class(logits) == torch.tensor(labels)
    names = ("true", "false", "difference", "common_mode_share")
    means = dict(zip(names, torch.cat(measured).double().nanmean(0).tolist(), strict=True))
    skills = composite_skills(
        model, in_copy(model, layer), dataset, config.batch_size, seed=config.seed
    )
    means["composite_skill"] = skills["rectangles"]
    return logits, {
        "auroc": auroc(logits, labels),
        "accuracy": float(right.double().mean()),
        **{name: None if isnan(mean) else mean for name, mean in means.items()},
    }


def _head_shifted(
    honest: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> nn.Module:
    count = min(_FITTING_IMAGES, len(dataset))
    some = Subset(dataset, Random(config.seed).sample(range(len(dataset)), count))
    images = _images(some, next(honest.parameters()).device, config)
    return head_shift(honest, images, dataset[0][2], target_layer=layer).model


def _images(some: Subset[Any], device: torch.device, config: TrainingConfig) -> Iterator[Tensor]:
    loader = DataLoader(some, config.batch_size, num_workers=config.workers)
    with stage("features", len(some)) as advance:
        for images, *_ in loader:
            yield images.to(device)
            advance(len(images))


def _criterion(objective: Objective, config: TrainingConfig) -> tuple[SalienceLoss, float]:
    """The objective's loss, and the weight of its test."""
    if config.gamma is not None and objective not in (*TESTS, "control"):
        raise DiffsalError(
            f"the objective {objective} has no gamma: leave it out, or choose one of "
            f"{', '.join(TESTS)}"
        )
    loss, given = OBJECTIVES[objective], {"alpha": config.alpha, "beta": config.beta}
    weights: dict[str, Any] = {
        name: value
        for name, value in given.items()
        if value is not None and name in signature(loss).parameters
    }
    return loss(**weights), _GAMMA if config.gamma is None else config.gamma
