"""What the tests of models share."""

import re
import sys
from functools import cache

import pytest
import torch
from torchvision import models as torchvision_models

from diffsal.models import bounds
from diffsal.models.checkpoints import load_model
from diffsal.models.fitting import without_initialization

SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="session")
def hollow():
    """Makes a model whose parameters have shapes, but no memory and no values."""

    @cache
    def hollow(name, **arguments):
        if name in ("googlenet", "inception_v3"):
            arguments = {"init_weights": True, **arguments}
        with without_initialization():
            return torchvision_models.get_model(name, weights=None, **arguments)

    return hollow


@pytest.fixture
def zeros(hollow, monkeypatch):
    """Makes a state of a model's names and shapes, all zero, without memory and disk.

    Files that name the same zero everywhere are otherwise refused.
    """
    monkeypatch.setattr(bounds, "SPARE", 4 << 30)

    def zeros(name, **arguments):
        state = hollow(name, **arguments).state_dict()
        return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}

    return zeros


@pytest.fixture
def network(classifier):
    """Makes a torchvision classifier in which every weight and statistic is random."""
    return lambda name, **arguments: classifier(name, torch.float32, **arguments)


@pytest.fixture
def small(network):
    """A small torchvision classifier of two classes."""
    return network(SMALL, num_classes=2)


@pytest.fixture
def save(tmp_path):
    """Saves to a file and gives its path."""

    def save(content, name="weights.pt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def rejects(refused):
    """Loading fails with one line that names the file and matches a pattern."""

    def rejects(path, pattern, **options):
        with refused(f"^{re.escape(str(path))}: .*{pattern}"):
            load_model(path, **options)

    return rejects


@pytest.fixture
def same_outputs():
    """Whether two models compute the same to the bit, the first in evaluation mode."""

    def same_outputs(model, other, size=64):
        images = torch.randn(1, 3, size, size, dtype=next(model.parameters()).dtype)
        with torch.no_grad():
            expected, actual = model.eval()(images), other(images)
        return expected.shape == actual.shape and torch.equal(expected, actual)

    return same_outputs


@pytest.fixture
def prefixed():
    """Puts a wrapper's prefix before every name of a state."""
    return lambda state, prefix: {prefix + key: value for key, value in state.items()}


FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=7, width=4):
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.backbone(x).mean((2, 3)))

def binary():
    return Net(2)

def state():
    return Net().state_dict()

def broken():
    raise ZeroDivisionError("of the factory")

number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of factories in the working directory, which is not on the path."""
    (tmp_path / "own_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "own_factories"
    sys.modules.pop("own_factories", None)
