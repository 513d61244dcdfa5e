"""The Python of README and docs runs as it is written there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

import diffsal
from diffsal.data.preprocessing import Preprocessing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    )
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What a reader has: a model, its file, images, labels, human maps."""
    folder = tmp_path_factory.mktemp("documents")
    torch.manual_seed(0)
    model = resnet18(num_classes=2).eval()
    diffsal.save_checkpoint(
        folder / "weights.pt",
        model,
        architecture="resnet18",
        arguments={"num_classes": 2},
        classes=("intact", "worn"),
        preprocessing=Preprocessing(size=(64, 64)),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1] * 2)
    return folder, {
        "diffsal": diffsal,
        "torch": torch,
        "model": model,
        "x": images,
        "images": images,
        "labels": labels,
        "human_maps": torch.rand(4, 64, 64),
        "dataset": list(zip(images, labels, strict=True)),
    }


def test_there_are_blocks() -> None:
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_as_it_is_written(block, prepared, monkeypatch) -> None:
    folder, names = prepared
    monkeypatch.chdir(folder)
    exec(compile(block, "block", "exec"), dict(names))
