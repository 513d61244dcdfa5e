"""What the tests of hostile files share."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from hostile.samples import write_index

from diffsal.data.index import Index, read_index
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import save_checkpoint
from diffsal.models.fitting import without_initialization

PATIENCE = 120  # seconds; what hangs would hang for ever
SHAPE = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8}


@pytest.fixture(autouse=True)
def _hangs_are_failures() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"nothing happened for {PATIENCE} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)


@pytest.fixture
def own_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of diffsal's own, of a DenseNet with one layer in each of two blocks.

    Entries that are named replace its own.
    """

    def own_file(**entries: object) -> Path:
        path = tmp_path / "own.pt"
        model = build_model("DenseNet", {**SHAPE, "num_classes": 2})
        save_checkpoint(path, model, architecture="DenseNet", arguments=SHAPE)
        torch.save(torch.load(path, weights_only=True) | entries, path)
        return path

    return own_file


@pytest.fixture(scope="session")
def plain_state() -> dict[str, torch.Tensor]:
    """A state of torchvision's smallest classifier, all ones."""
    from torchvision import models

    with without_initialization():
        model = models.shufflenet_v2_x0_5(num_classes=2)
    return {key: torch.ones(value.shape) for key, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 noisy images, bright at the top or at the bottom, each with a human map."""
    folder = tmp_path_factory.mktemp("data")
    write_index(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return read_index(folder / "index.csv")
