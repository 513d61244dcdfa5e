"""What the tests of faithfulness share."""

import pytest
import torch
from torch import nn


@pytest.fixture
def convnet():
    """Makes a pooled-linear network with batch norm and dropout, whose logits spread widely."""

    def make(classes=2):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(4),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(6, classes),
        )
        with torch.no_grad():
            model[-1].weight.mul_(20)
        return model

    return make


@pytest.fixture
def images():
    """Makes (count, 3, height, width) images, each brighter than the one before."""

    def make(count=3, height=16, width=24):
        generator = torch.Generator().manual_seed(1)
        return torch.rand(count, 3, height, width, generator=generator) + torch.arange(count).view(
            -1, 1, 1, 1
        )

    return make


@pytest.fixture
def evidence_and_distraction():
    """Channel 0 decides (the margin is its mean); channel 1 is there, and no class minds it."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 4, stride=4, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None].expand(2, 2, 4, 4) / 16)
        model[3].weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    inputs = torch.rand(40, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    # One value to every 4 × 4 cell, so that cells differ widely.
    return model, inputs[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
