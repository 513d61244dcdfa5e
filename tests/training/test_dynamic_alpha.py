"""The weight that the authors' script takes, against its formula in plain numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training.samples import tiny_maps

from diffsal.training.dynamic_alpha import DynamicAlphaLoss
from diffsal.training.losses import (
    BaselineSalienceLoss,
    ContrastSalienceLoss,
    CrossEntropyLoss,
    SalienceLoss,
)


@pytest.mark.parametrize("loss", [BaselineSalienceLoss(), ContrastSalienceLoss(0.1, 0.6, 0.2)])
def test_it_is_the_formula_of_the_terms(loss: SalienceLoss) -> None:
    _, maps = tiny_maps()
    human = torch.rand(len(maps.true), 9, 9)
    criterion = DynamicAlphaLoss(loss)
    terms = {name: term.item() for name, term in loss.terms(maps, human).items()}
    salience = terms["true"]
    if "contrast" in terms:
        salience = (0.6 * terms["true"] + 0.2 * terms["contrast"]) / 0.8
    entropy = terms["cross_entropy"]
    wanted = (entropy**2 + salience**2) / (entropy + salience)
    assert criterion(maps, human).item() == pytest.approx(wanted, rel=1e-7)
    assert criterion.terms(maps, human).keys() == terms.keys()


@pytest.mark.parametrize(("entropy", "sign"), [(0.40, -1), (0.43, 1)])
def test_cross_entropy_is_wanted_larger_below_its_share(entropy: float, sign: int) -> None:
    """As documented: the derivative changes its sign at (√2 - 1) of the salience term."""
    terms = {
        "cross_entropy": torch.tensor(entropy, dtype=torch.float64, requires_grad=True),
        "true": torch.tensor(1.0, dtype=torch.float64, requires_grad=True),
    }
    value = DynamicAlphaLoss(BaselineSalienceLoss()).weighted_sum(terms)
    entropy_slope, salience_slope = torch.autograd.grad(value, list(terms.values()))
    total = entropy + 1
    assert entropy_slope.item() == pytest.approx((entropy**2 + 2 * entropy - 1) / total**2)
    assert salience_slope.item() == pytest.approx((1 + 2 * entropy - entropy**2) / total**2)
    assert entropy_slope.sign() == sign


def test_nothing_left_to_learn_is_zero_with_finite_gradients() -> None:
    terms = {name: torch.zeros((), requires_grad=True) for name in ("cross_entropy", "true")}
    value = DynamicAlphaLoss(BaselineSalienceLoss()).weighted_sum(terms)
    assert value == 0
    for slope in torch.autograd.grad(value, list(terms.values())):
        assert slope.isfinite()


def test_a_loss_without_salience_is_refused(refused: Callable[[str], Any]) -> None:
    with refused("this loss has none: choose another method"):
        DynamicAlphaLoss(CrossEntropyLoss())
