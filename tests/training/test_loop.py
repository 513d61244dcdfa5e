"""The loop: its gradients, samplers and records."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from training.samples import TINY

from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Index
from diffsal.data.preprocessing import Preprocessing
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.models.architectures import build_model
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import EpochSampler, Look, auroc, fit, is_best, predict
from diffsal.training.losses import (
    LOSSES,
    BaselineSalienceLoss,
    CrossEntropyLoss,
    cross_entropy,
)

Refused = Callable[[str], AbstractContextManager[None]]


@pytest.mark.parametrize(("samples", "batch_size", "world"), [(23, 7, 1), (23, 7, 2), (8, 20, 3)])
def test_every_sample_is_drawn_once_by_one_process(
    samples: int, batch_size: int, world: int
) -> None:
    samplers = [EpochSampler(samples, batch_size, 5, rank, world) for rank in range(world)]
    single = EpochSampler(samples, batch_size, 5)
    orders = []
    for epoch in (1, 2):
        for sampler in (single, *samplers):
            sampler.epoch = epoch
        assert list(single) == list(single)
        joined = [list(chain(*parts)) for parts in zip(*samplers, strict=True)]
        assert joined == list(single)
        sizes = [len(batch) for batch in joined]
        assert sizes == single.sizes
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        orders.append(list(chain(*joined)))
        assert sorted(position for position, _ in orders[-1]) == list(range(samples))
    assert orders[0] != orders[1]
    assert dict(orders[0]) != dict(orders[1])  # the seeds
    for step in range(len(single)):
        assert sum(sampler.shares[step] for sampler in samplers) == pytest.approx(1)


def plain_model(folder: Path) -> nn.Module:
    torch.manual_seed(3)
    namespace: dict[str, Any] = {}
    exec((folder / "plain.py").read_text(), namespace)
    model: nn.Module = namespace["net"]()
    return model


def dataset_of(index: Index, samples: slice = slice(None)) -> ImageDataset:
    return ImageDataset(index.samples[samples], Preprocessing(size=(32, 32)))


def test_fit_is_sgd_on_the_loss(index: Index, folder: Path) -> None:
    """Against a loop written here, with cross-entropy and no capture."""
    config = replace(TINY, schedule="step", epochs=14, weight_decay=0.01, batch_size=20)
    dataset = dataset_of(index, slice(23))
    model, other = plain_model(folder), plain_model(folder)
    history = list(fit(model, CrossEntropyLoss(), dataset, None, config))

    velocity = [torch.zeros_like(parameter) for parameter in other.parameters()]
    sampler = EpochSampler(23, 20, config.seed)
    for epoch in range(1, 15):
        sampler.epoch = epoch
        total = 0.0
        for batch in sampler:
            images = torch.stack([dataset[position][0] for position, _ in batch])
            labels = torch.tensor([dataset[position][1] for position, _ in batch])
            loss = F.cross_entropy(other(images), labels)
            total += loss.item() * len(batch) / 23
            gradients = torch.autograd.grad(loss, list(other.parameters()))
            with torch.no_grad():
                for parameter, gradient, speed in zip(
                    other.parameters(), gradients, velocity, strict=True
                ):
                    speed.mul_(0.9).add_(gradient + 0.01 * parameter)
                    parameter -= (0.05 if epoch <= 12 else 0.005) * speed
        assert history[epoch - 1]["loss"] == pytest.approx(total, rel=1e-5)
        assert history[epoch - 1]["lr"] == pytest.approx(0.05 if epoch <= 12 else 0.005)
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "amp"),
    [
        pytest.param(method, amp, marks=() if is_quick else pytest.mark.slow)
        for method in LOSSES
        for amp in ("none", "bf16", "fp16")
        for is_quick in [amp == "none" or method == "contrast"]
    ],
)
def test_every_method_logs_its_terms_and_learns(index: Index, method: str, amp: str) -> None:
    config = TrainingConfig.from_dict(
        {**TINY.to_dict(), "method": method, "amp": amp, "epochs": 5, "lr": 0.1, "arguments": {}}
    )
    torch.manual_seed(1)
    model = build_model("torchvision:DenseNet", {**TINY.arguments, "num_classes": 2})
    criterion, dataset = config.criterion(), dataset_of(index)
    history = list(fit(model, criterion, dataset, dataset, config))
    for number, record in enumerate(history, start=1):
        assert record["epoch"] == number
        weighted = sum(weight * record[name] for name, weight in criterion.weights.items())
        assert record["loss"] == pytest.approx(weighted, rel=1e-5)
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    assert history[-1]["auroc"] > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_further_terms_of_no_weight_leave_training_as_it_was(index: Index, folder: Path) -> None:
    dataset, states = dataset_of(index), []
    for further in (None, lambda *_: {}, lambda *batch: {"margin": (0.0, batch[3].margin.sum())}):
        model = plain_model(folder)
        list(fit(model, LOSSES["difference"](), dataset, None, TINY, further=further))
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_further_terms_look_at_the_model_and_are_added_by_weight(
    index: Index, folder: Path, amp: Any
) -> None:
    """A further cross-entropy, of a second look at the same images, weighs as the first does."""
    config, seen = replace(TINY, amp=amp, epochs=2), []

    def further(
        look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps
    ) -> dict[str, tuple[float, Tensor]]:
        again = look(images, labels)
        assert torch.equal(again.difference, maps.difference)
        assert torch.equal(maps.true_class, labels)
        assert maps.logits.dtype == (torch.float32 if amp == "none" else torch.bfloat16)
        seen.append(len(images))
        return {"again": (0.5, cross_entropy(again)), "unweighed": (0.0, maps.margin.mean())}

    model, other = plain_model(folder), plain_model(folder)
    history = list(
        fit(model, BaselineSalienceLoss(0.5, 0), dataset_of(index), None, config, further=further)
    )
    wanted = list(fit(other, BaselineSalienceLoss(1, 0), dataset_of(index), None, config))
    for record, expected in zip(history, wanted, strict=True):
        assert list(record)[2:7] == ["loss", "cross_entropy", "true", "again", "unweighed"]
        assert record["again"] == record["cross_entropy"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert sum(seen) == 2 * 48
    for parameter, one in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, one, rtol=1e-3, atol=1e-5 if amp == "none" else 1e-3)
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_batch_normalisation_keeps_its_statistics(index: Index) -> None:
    model = build_model("torchvision:DenseNet", {**TINY.arguments, "num_classes": 2})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for freezes in (True, False):
        config = replace(TINY, freeze_batchnorm=freezes, epochs=1)
        list(fit(model, CrossEntropyLoss(), dataset_of(index), None, config))
        same = [torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()]
        assert all(same) is freezes


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_predictions_and_their_auroc(index: Index, outputs: int) -> None:
    model = build_model("torchvision:DenseNet", {**TINY.arguments, "num_classes": outputs}).train()
    dataset = dataset_of(index)
    logits = predict(model, dataset, replace(TINY, workers=1))
    assert model.training
    with torch.no_grad():
        expected = model.eval()(torch.stack([dataset[n][0] for n in range(len(dataset))]))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)

    labels = np.arange(48) % max(outputs, 2)
    if outputs == 3:
        parts = [roc_auc_score(labels == k, logits.softmax(1)[:, k]) for k in range(3)]
        assert auroc(logits, labels.tolist()) == pytest.approx(np.mean(parts))
    else:
        scores = logits.sigmoid()[:, 0] if outputs == 1 else logits.softmax(1)[:, 1]
        assert auroc(logits, labels.tolist()) == pytest.approx(roc_auc_score(labels, scores))


def test_auroc_needs_every_class(refused: Refused) -> None:
    with refused("AUROC is undefined"):
        auroc(torch.randn(4, 2), [1, 1, 1, 1])


def test_the_first_of_the_best_epochs_is_selected() -> None:
    values = [0.5, 0.7, 0.6, 0.7, 0.8]
    history = [{"auroc": value, "accuracy": 1 - value} for value in values]
    prefixes = [history[: stop + 1] for stop in range(5)]
    for select, expected in (("last", 4), ("best-auroc", 4), ("best-accuracy", 0)):
        assert max(n for n in range(5) if is_best(prefixes[n], select)) == expected  # type: ignore[arg-type]
    assert [is_best(prefix, "best-auroc") for prefix in prefixes] == [
        True,
        True,
        False,
        False,
        True,
    ]
