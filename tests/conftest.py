"""What several test modules share: small networks, torchvision's classifiers, the slow tests."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.regnet import BlockParams

from diffsal.errors import DiffsalError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


def pytest_collection_finish() -> None:
    """What is imported by now is not looked through again at each collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start_and_grad_mode_as_before() -> Iterator[None]:
    """Every test draws the same random numbers, and none leaks its grad mode into the next."""
    torch.manual_seed(0)
    yield
    leaked = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert not leaked, "the test left another grad mode behind"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are then in one order, in this process and in those that the test starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, this process is told what torchrun tells the first of two."""

    def tell() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": "0"}
            told["MASTER_PORT"] = str(free.getsockname()[1])
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        join = partial(torch.distributed.init_process_group, timeout=timedelta(minutes=2))
        monkeypatch.setattr(torch.distributed, "init_process_group", join)

    return tell


@pytest.fixture
def beside(first_of_two: Callable[[], None]) -> Callable[..., AbstractContextManager[Any]]:
    """``with beside(work):`` runs it as the second of two processes, a fork; this is the first."""

    @contextmanager
    def started(work: Callable[[], object]) -> Iterator[Any]:
        first_of_two()

        def other() -> None:
            os.environ["RANK"] = "1"
            work()

        process = multiprocessing.get_context("fork").Process(target=other)
        process.start()
        yield process
        process.join(60)
        assert process.exitcode is not None

    return started


@pytest.fixture(scope="module")
def few_draws() -> Iterator[None]:
    """Audits compare their kinds of evidence with 2 draws without kinds, instead of 38."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffsal.auditing.clusters._DRAWS", 1)
        yield


@pytest.fixture
def refused() -> Callable[[str], AbstractContextManager[None]]:
    """``with refused(pattern):`` expects the error that users see: our own, and one line."""

    @contextmanager
    def expect(pattern: str) -> Iterator[None]:
        with pytest.raises(DiffsalError, match=pattern) as error:
            yield
        assert "\n" not in str(error.value)

    return expect


class PooledNet(nn.Module):
    """Two convolutions, a ReLU in place, global average pooling, a linear layer.

    ``first`` gives (B, 4, 8, 8) and ``features`` (B, 5, 4, 4) for a (B, 3, 8, 8) image.
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.features = nn.Conv2d(4, 5, 3, padding=1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(5, classes)

    def backbone(self, images: Tensor) -> Tensor:
        return self.features(torch.tanh(self.first(images)))

    def head(self, features: Tensor) -> Tensor:
        return self.fc(self.dropout(self.relu(features).mean((2, 3))))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


@pytest.fixture
def pooled_net() -> Callable[..., PooledNet]:
    """Makes a :class:`PooledNet` in float64 and evaluation mode."""

    def make(classes: int = 2) -> PooledNet:
        return PooledNet(classes).double().eval()

    return make


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Makes a torchvision classifier in which nothing is at its initial value.

    Weights, biases and batch-norm statistics are random, so that nothing vanishes from an equation
    because it is zero or one. Torchvision's own initialisation is skipped: it takes most of the
    time.
    """

    def make(name: str, dtype: torch.dtype = torch.float64, **arguments: object) -> nn.Module:
        with monkeypatch.context() as patch:
            for initialiser in vars(nn.init):
                if initialiser.endswith("_") and not initialiser.startswith("_"):
                    patch.setattr(nn.init, initialiser, lambda tensor, *_, **__: tensor)
            model = models.get_model(name, weights=None, **_quick(name), **arguments)
        return _randomise(model.to(dtype)).eval()

    return make


def _quick(name: str) -> dict[str, bool]:
    """Arguments that skip an initialisation that takes half a minute, and the warning about it."""
    return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}


def _randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0, 0.1)
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.BatchNorm3d):
                module.weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def meta_classifier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    """Makes a torchvision classifier without memory for its parameters."""
    block_widths = BlockParams.from_init_params.__func__

    def on_cpu(cls: type[BlockParams], **arguments: object) -> BlockParams:
        with torch.device("cpu"):  # RegNet computes its widths with tensors
            return block_widths(cls, **arguments)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_cpu))

    def make(name: str) -> nn.Module:
        with torch.device("meta"):
            return models.get_model(name, weights=None, **_quick(name))

    return make
