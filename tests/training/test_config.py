"""How training is configured, and what is refused."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from training.samples import TINY, write_config

from diffsal.training.config import TrainingConfig
from diffsal.training.dynamic_alpha import DynamicAlphaLoss
from diffsal.training.losses import BaselineSalienceLoss, ContrastSalienceLoss

Refused = Callable[[str], AbstractContextManager[None]]


def test_a_configuration_goes_through_toml_and_the_overrides_win(tmp_path: Path) -> None:
    config = replace(TINY, alpha=0.4, mean=(0.5, 0.5, 0.5), amp="bf16")
    write_config(tmp_path / "config.toml", config)
    assert TrainingConfig.from_toml(tmp_path / "config.toml") == config
    changed = TrainingConfig.from_toml(tmp_path / "config.toml", epochs=9, augment=())
    assert changed == replace(config, epochs=9, augment=())
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "config.toml: the key 'epoch' is unknown; near: epochs"),
        ("epochs = '3'", "epochs must be int, not '3'"),
        ("epochs = true", "epochs must be int, not True"),
        ("epochs = 0", "epochs must be from 1"),
        ("lr = nan", "lr must be from 0"),
        ("alpha = -0.1", "alpha must be from 0"),
        ("schedule = 'linear'", "schedule must be one of none, step, cosine, not 'linear'"),
        ("method = 'contrst'", "must be one of cross-entropy, baseline.*, not 'contrst'"),
        ("augment = ['flip']", "must be one of horizontal-flip.*, not 'flip'"),
        ("augment = 'flip'", "augment must be"),
        ("mean = [0.5, 0.5]", "mean must be"),
        ("std = [0.5, 0.5, 0.0]", "std must be three positive"),
        ("method = 'difference'\ngamma = 0.3", "difference has no gamma"),
        ("method = 'cross-entropy'\nalpha = 0.3", "cross-entropy has no alpha"),
        ("method = 'cross-entropy'\ndynamic_alpha = true", "this loss has none: choose another"),
        ("method = 'baseline'\ndynamic_alpha = true\nalpha = 0.5", "leave out one"),
        ("method = 'difference'\nmap_of = 'predicted'", "difference has no map_of"),
        ("method = 'baseline'\nmap_of = 'both'", "map_of must be"),
        ("epochs: 3", "config.toml: is no TOML"),
    ],
)
def test_bad_configurations(tmp_path: Path, refused: Refused, text: str, words: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with refused(words):
        TrainingConfig.from_toml(tmp_path / "config.toml")


def test_weights_and_pooling_reach_the_loss() -> None:
    criterion = TrainingConfig(alpha=0.5, pool="max").criterion()
    assert isinstance(criterion, ContrastSalienceLoss)
    assert criterion.weights == {"cross_entropy": 0.5, "true": 0.3, "contrast": 0.3}
    assert criterion.pool == "max"


def test_what_the_authors_newest_script_does_reaches_the_loss(tmp_path: Path) -> None:
    text = "method = 'baseline'\ndynamic_alpha = true\nmap_of = 'predicted'"
    (tmp_path / "config.toml").write_text(text)
    criterion = TrainingConfig.from_toml(tmp_path / "config.toml").criterion()
    assert isinstance(criterion, DynamicAlphaLoss)
    assert isinstance(criterion.loss, BaselineSalienceLoss)
    assert criterion.loss.map_of == "predicted"
