"""From a weights file to a fooled one, and what became of decisions and maps.

Measured on images that the attack has not seen. The attacks exist to test explanations, and to test
whether an audit notices them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from inspect import signature
from math import isnan
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from diffsal.data.datasets import ImageDataset, Item, Pixels, decode
from diffsal.data.index import Index, Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.splits import with_validation
from diffsal.errors import DiffsalError
from diffsal.fooling.head_shift import head_shift
from diffsal.fooling.objectives import MEASURES, OBJECTIVES, TESTS, Objective
from diffsal.fooling.targets import Measure, target_distance, target_map
from diffsal.maps.contrast import class_count, predicted_class, probabilities
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer, in_copy
from diffsal.models.checkpoints import LoadedModel, check_class_order, save_checkpoint
from diffsal.system.devices import choose_device
from diffsal.system.locks import sole_writer
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import Further, Look, auroc, fit
from diffsal.training.losses import SalienceLoss

Method: TypeAlias = Literal["trained", "head-shift"]
FINE_TUNING = TrainingConfig(epochs=20, lr=0.02, batch_size=16, schedule="cosine")
"""How :func:`fool` and :func:`fine_tuned` train unless told otherwise."""

_FITTING_IMAGES = 300
_GAMMA = 0.1  # from 0.03 to 0.3, passing the test costs more and more of the target


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
            ``both``. ``control``: the honest model fine-tuned as long, which every fooled one is to
            be compared with; measured against the target, and not brought to it.
        method: ``trained``, by :func:`diffsal.training.loop.fit`, or ``head-shift``, see
            :func:`head_shift`; it is fitted on at most 300 images.
        preprocessing: ``None``: the model's own, or the usual.
        config: of the training all but model, data and method; ``alpha``, ``beta`` and, of
            objectives in :data:`TESTS`, ``gamma`` weigh the objective's terms, 0.5, 0.5 and 0.1
            where they are ``None``. Of a head-shift: ``seed``, ``validation``, ``batch_size``,
            ``device``, ``workers``.
        read: see :class:`diffsal.data.datasets.ImageDataset`.

    Returns:
        Plain JSON types: ``out``, ``method``, ``objective``, ``target``; ``measure``, the name of
        the objective's in :data:`MEASURES`; ``images``, how many it was measured on; ``honest`` and
        ``fooled``, each with ``auroc``, ``accuracy``, means over the images of the ``measure`` of
        the ``true``, ``false`` and ``difference`` map, and of their ``common_mode_share`` (``None``
        for one logit); ``agreement``, the share of equal predictions; and
        ``largest_probability_change``.

    Raises:
        DiffsalError: classes that do not fit the index's; a class without a held-out sample; a
            head-shift with an objective that it cannot reach; a target, a width or a weight for an
            objective that has none; another run that is writing ``out``; see
            :func:`target_map`, :func:`head_shift`,
            :func:`diffsal.training.loop.fit` and :func:`diffsal.data.splits.with_validation`.
    """
    _check(objective, method, target, width)
    _criterion(objective, config)
    check_class_order(loaded, index.classes, index.source)
    with sole_writer(Path(out).parent, Path(out).name):
        honest = deepcopy(loaded.model).float().to(choose_device(config.device))
        layer = in_copy(honest, loaded.target_layer)
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
        fooled, outcome = _attacked(honest, layer, training, held_out, method, objective, config)
        attack = {"method": method, "objective": objective, "target": str(target)}
        save_checkpoint(
            out,
            fooled,
            architecture=loaded.architecture,
            arguments=loaded.arguments,
            classes=index.classes,
            preprocessing=preprocessing,
            target_layer=str(layer),
            fooling=attack,
        )
    return {"out": str(out), **attack, **outcome}


def fine_tuned(
    honest: nn.Module,
    training: ImageDataset,
    objective: Objective = "control",
    config: TrainingConfig = FINE_TUNING,
    *,
    target_layer: TargetLayer | None = None,
) -> nn.Module:
    """A copy of a model, trained as :func:`fool` does; without an objective, the attacks' control.

    With an attack's configuration, ``beta`` and ``gamma`` included, the control sees the same
    batches in the same order, for as many steps of the same optimizer, and its cross-entropy weighs
    as much: what differs between the two is what the attack did.

    Args:
        honest: on its device; left as it is.
        training: samples to learn from; in the place of human maps, what the objective compares to,
            which is nothing for the ``control``.
        objective: see :data:`OBJECTIVES`.
        config: see :func:`fool`.
        target_layer: where maps are taken; ``None``: it is found.

    Returns:
        The copy, in evaluation mode.

    Raises:
        DiffsalError: a weight that the objective does not have; see
            :func:`diffsal.training.loop.fit` and :mod:`diffsal.fooling.consistency`.

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
    layer = target_layer and in_copy(model, target_layer)
    further: Further | None = None
    if objective in TESTS:
        test = TESTS[objective](deepcopy(honest).eval())

        def further(look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps) -> Any:
            return {objective: (gamma, test(look, images, labels, maps))}

    epochs = fit(model, criterion, training, None, config, target_layer=layer, further=further)
    deque(epochs, 0)
    return model.eval()


def as_table(report: Mapping[str, Any]) -> str:
    """What :func:`fool` returns, for people to read.

    Example:
        >>> maps = dict.fromkeys(("true", "false", "difference", "common_mode_share"), 0.4)
        >>> honest = {"auroc": 0.9, "accuracy": 0.8, **maps}
        >>> fooled = honest | {"true": 0.1}
        >>> report = {"measure": "target_distance", "honest": honest, "fooled": fooled}
        >>> report |= {"agreement": 1.0, "largest_probability_change": 1e-7}
        >>> print(as_table(report).splitlines()[4])
        true map, target distance            0.4000   0.1000
    """
    measure = report["measure"].replace("_", " ")
    names = {
        "auroc": "AUROC",
        "accuracy": "accuracy",
        "common_mode_share": "common-mode share",
        **{map_: f"{map_} map, {measure}" for map_ in ("true", "false", "difference")},
    }
    trained = "control" if report.get("objective") == "control" else "fooled"
    lines = [f"{'':34}{'honest':>9}{trained:>9}"]
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
        maps = explain(model, images.to(device), labels, target_layers=in_copy(model, layer))
        yield maps.to("cpu"), references


def _true_maps(
    model: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> dict[Path, NDArray[np.float32]]:
    maps = [maps.true.float() for maps, _ in _explained(model, layer, dataset, config)]
    paths = [sample.path for sample in dataset.samples]
    return dict(zip(paths, torch.cat(maps).numpy(), strict=True))


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
    logits, summary = _observe(honest, layer, held_out, measure, config)
    if method == "trained":
        fooled = fine_tuned(honest, training, objective, config, target_layer=layer)
    else:
        fooled = _head_shifted(honest, layer, training, config)
    fooled_logits, fooled_summary = _observe(fooled, layer, held_out, measure, config)
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
) -> tuple[Tensor, dict[str, float | None]]:
    """Logits (N, K) of a model on N images, and what the report says of it."""
    parts, measured = [], []
    for maps, references in _explained(model, layer, dataset, config):
        each = [measure(one, references) for one in (maps.true, maps.false, maps.difference)]
        measured.append(torch.stack([*each, maps.common_mode_share], dim=1))
        parts.append(maps.logits.float())
    logits, labels = torch.cat(parts), [sample.label for sample in dataset.samples]
    right = predicted_class(logits) == torch.tensor(labels)
    means = torch.cat(measured).double().nanmean(0).tolist()
    names = ("true", "false", "difference", "common_mode_share")
    return logits, {
        "auroc": auroc(logits, labels),
        "accuracy": float(right.double().mean()),
        **{name: None if isnan(mean) else mean for name, mean in zip(names, means, strict=True)},
    }


def _head_shifted(
    honest: nn.Module, layer: TargetLayer, dataset: ImageDataset, config: TrainingConfig
) -> nn.Module:
    device = next(honest.parameters()).device
    count = min(_FITTING_IMAGES, len(dataset))
    some = Subset(dataset, Random(config.seed).sample(range(len(dataset)), count))
    images = (batch[0].to(device) for batch in _batches(some, config, "features"))
    return head_shift(honest, images, dataset[0][2], target_layer=layer).model


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
