"""A small network that is served, and images as files."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsal import find_target_layer
from diffsal.data.preprocessing import Preprocessing
from diffsal.serving.explained import Picture, Served, read_picture

HALVES = (0.5, 0.5, 0.5)


@pytest.fixture
def served() -> Callable[..., Served]:
    """Makes a served network with maps of 8 × 8 cells."""

    def make(outputs: int = 2, names: tuple[str, ...] | None = None) -> Served:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 24, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, outputs),
        ).eval()
        preprocessing = Preprocessing(size=(32, 32), mean=HALVES, std=HALVES)
        layer = find_target_layer(model)
        return Served(model, layer, preprocessing, torch.device("cpu"), names)

    return make


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Makes the content of a file: an image of noise."""

    def make(seed: int = 0, height: int = 40, width: int = 60) -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(file, "PNG")
        return file.getvalue()

    return make


@pytest.fixture
def picture(png) -> Callable[..., Picture]:
    """Makes what a served network keeps of such an image."""

    def make(served: Served, seed: int = 0) -> Picture:
        return read_picture(served, png(seed), f"{seed}.png")

    return make
