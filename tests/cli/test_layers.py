"""``diffsal layers``, and what a user says of layers and outputs."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from diffsal.cli.main import main
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import save_checkpoint

SMALL = {"growth_rate": 4, "block_config": [1, 1], "num_init_features": 8, "num_classes": 2}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    model = build_model("torchvision:DenseNet", SMALL).eval()
    save_checkpoint(path, model, architecture="torchvision:DenseNet", arguments=SMALL)
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_table_marks_the_layer_that_is_chosen(weights: Path) -> None:
    rows = json.loads(run("layers", "--model", weights, "--size", 64, "--json"))
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["name"] == "features"
    assert chosen["grid"] == [8, 8]
    assert all(row["exactness"] is not None for row in rows)
    text = run("layers", "--model", weights, "--size", 64)
    assert sum(line.startswith("→ features ") for line in text.splitlines()) == 1


def test_a_listed_layer_can_be_named(weights: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "grey").save(tmp_path / "a.png")
    for row in json.loads(run("layers", "--model", weights, "--json")):
        out = tmp_path / row["name"]
        options = ("--target-layer", row["name"], "--out", out, "--no-figure", "--size", 64)
        run("explain", tmp_path / "a.png", "--model", weights, *options)
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        assert manifest["model"]["target_layer"] == row["name"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reshape", "tokens:1"), "--reshape is for a layer that --target-layer names"),
        (("--reshape", "rows", "--target-layer", "features"), "the reshape 'rows' is unknown"),
        (("--outputs", "percent"), "'percent' is not one of"),
    ],
)
def test_what_cannot_be_said(weights: Path, options: tuple[str, ...], words: str) -> None:
    code = 1 if "rows" in options else 2
    assert words in run("layers", "--model", weights, *options, code=code)


def test_what_the_user_says_of_outputs_goes_before(weights: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "grey").save(tmp_path / "a.png")
    torch.manual_seed(0)
    options = ("--outputs", "probabilities", "--out", tmp_path / "out", "--no-figure")
    words = run("explain", tmp_path / "a.png", "--model", weights, *options, code=1)
    assert "not all within 0 and 1" in words
