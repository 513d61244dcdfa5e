"""The README's Python runs as it is written there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from diffsal import save_checkpoint
from diffsal.data.preprocessing import Preprocessing

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What a reader has: a model, its file, images, labels, human maps."""
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    model = resnet18(num_classes=2).eval()
    small = Preprocessing(size=(64, 64))
    save_checkpoint(
        folder / "weights.pt",
        model,
        architecture="resnet18",
        arguments={"num_classes": 2},
        classes=("intact", "worn"),
        preprocessing=small,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    images = torch.rand(6, 3, 64, 64)
    labels = torch.tensor([0, 1] * 3)
    return folder, {
        "model": model,
        "x": images,
        "images": images,
        "labels": labels,
        "human_maps": torch.rand(6, 64, 64),
        "dataset": list(zip(images, labels, strict=True)),
    }


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_as_it_is_written(block, prepared, monkeypatch) -> None:
    folder, names = prepared
    monkeypatch.chdir(folder)
    exec(compile(block, "README.md", "exec"), dict(names))
