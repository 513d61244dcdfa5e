"""A quick configuration; a network small enough to differentiate numerically, and its maps."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffsal import SalienceMaps, capture
from diffsal.training.config import TrainingConfig
from diffsal.training.losses import (
    baseline_salience_loss,
    contrast_salience_loss,
    cross_entropy_loss,
    difference_salience_loss,
    per_class_salience_loss,
)

TINY = TrainingConfig(
    architecture="torchvision:DenseNet",
    arguments={"growth_rate": 4, "block_config": [1, 1], "num_init_features": 8, "drop_rate": 0.2},
    weights="none",
    size=32,
    augment=("horizontal-flip",),
    epochs=4,
    batch_size=7,
    lr=0.05,
    schedule="cosine",
    device="cpu",
)
FUNCTIONS = {
    "cross-entropy": cross_entropy_loss,
    "baseline": baseline_salience_loss,
    "difference": difference_salience_loss,
    "per-class": per_class_salience_loss,
    "contrast": contrast_salience_loss,
}
TERMS = {  # and the paper's weights
    "cross-entropy": {"cross_entropy": 1.0},
    "baseline": {"cross_entropy": 0.5, "true": 0.5},
    "difference": {"cross_entropy": 0.5, "difference": 0.5},
    "per-class": {"cross_entropy": 0.3, "true": 0.3, "false": 0.3},
    "contrast": {"cross_entropy": 0.3, "true": 0.3, "contrast": 0.3},
}
LABELS = torch.tensor([0, 1, 1, 0, 1])


def write_config(path: Path, config: TrainingConfig) -> None:
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    table = given.pop("arguments")
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
    lines += ["[arguments]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    path.write_text("\n".join(lines))


def norm(maps: Tensor) -> Tensor:
    """min-max per sample, of maps known not to be constant"""
    return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in maps])


def overlap_average(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Area averaging in whole steps: cut every pixel into as many pieces as there are cells."""
    for axis, new in enumerate(size, start=1):
        old = maps.shape[axis]
        pieces = np.moveaxis(np.repeat(maps, new, axis=axis), axis, -1)
        maps = np.moveaxis(pieces.reshape(*pieces.shape[:-1], new, old).mean(-1), -1, axis)
    return maps


def tiny(outputs: int = 2, volumes: bool = False) -> nn.Sequential:
    """A smooth network without batch norm, on (B, 1, 9, 9), or (B, 1, 6, 6, 6)."""
    conv, pool = (nn.Conv3d, nn.AdaptiveAvgPool3d) if volumes else (nn.Conv2d, nn.AdaptiveAvgPool2d)
    layers = conv(1, 3, 3, stride=2), nn.Softplus(), pool(1), nn.Flatten(), nn.Linear(3, outputs)
    return nn.Sequential(*layers).double()


def take_maps(model: nn.Module, images: Tensor, labels: Tensor = LABELS) -> SalienceMaps:
    with capture(model) as captured:
        return captured.maps(model(images), true=labels)


def tiny_maps(outputs: int = 2) -> tuple[nn.Sequential, SalienceMaps]:
    torch.manual_seed(0)
    model = tiny(outputs)
    return model, take_maps(model, torch.randn(5, 1, 9, 9, dtype=torch.float64))


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
    )


def assert_same_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(gradient.abs().max() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(scale))


def label_maps(true: Tensor, false: Tensor, logits: Tensor) -> SalienceMaps:
    classes = torch.arange(len(true), device=true.device) % 2
    score = logits[:, 0]
    return SalienceMaps(true, false, logits, score, score, classes, 1 - classes, "label")


def no_maps() -> dict[str, Tensor]:
    """Human maps (1, 20, 20) that hold nothing, whichever way they are pooled."""
    plain = torch.ones(1, 20, 20)
    one_pixel = plain.clone()
    one_pixel[0, 3, 5] = torch.nan
    return {
        "nan": plain * torch.nan,
        "one nan": one_pixel,
        "infinite": plain * torch.inf,
        "zero": plain * 0,
        "constant": plain * 0.3,
        "constant 255": plain * 255,
        "vast": plain * 3e38,
    }
