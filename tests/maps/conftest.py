"""What the tests of maps share."""

from collections.abc import Callable

import pytest
from torch import nn


@pytest.fixture
def on_features() -> Callable[..., nn.Sequential]:
    """Makes a classifier whose input is its feature map, so that features can be chosen."""

    def make(channels: int, *head: nn.Module) -> nn.Sequential:
        pool, fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 2)
        return nn.Sequential(nn.Identity(), *head, pool, nn.Flatten(), fc).double().eval()

    return make
