"""Losses that fool; what they share with the others is in ``tests/training/test_uniform.py``."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffsal.fooling.objectives import BothMapsLoss, CenterMassLoss, TopKLoss
from diffsal.fooling.targets import centroid_shift, top_cells
from diffsal.maps.salience_maps import SalienceMaps, normalize


def frame(height: int, width: int) -> Tensor:
    pixels = torch.ones(height, width)
    pixels[1:-1, 1:-1] = 0
    return pixels


def made_maps(true: Tensor, false: Tensor | None = None) -> SalienceMaps:
    logits = torch.zeros(len(true), 2, dtype=true.dtype)
    false = -true if false is None else false
    zeros = torch.zeros(len(true), dtype=torch.int64)
    return SalienceMaps(
        true, false, logits, logits[:, 0], logits[:, 1], zeros, 1 - zeros, true_from="label"
    )


def test_terms_and_their_signs() -> None:
    true, false, references = torch.rand(3, 3, 4, 5)
    maps, target = made_maps(true, false), frame(4, 5).expand(3, -1, -1)
    both = BothMapsLoss(beta=0.25)
    terms = both.terms(maps, target)
    torch.testing.assert_close(terms["true"], F.mse_loss(normalize(true), target))
    torch.testing.assert_close(terms["false"], F.mse_loss(normalize(false), target))
    wanted = 0.5 * np.log(2) + 0.25 * (terms["true"] + terms["false"]).item()
    assert both(maps, target).item() == pytest.approx(wanted)

    away = centroid_shift(true, references).mean().item()
    top = top_cells(true, references).mean().item()
    assert CenterMassLoss(0, 1)(maps, references).item() == pytest.approx(-away)
    assert TopKLoss(0, 1)(maps, references).item() == pytest.approx(top)


@pytest.mark.parametrize("references", [None, torch.rand(3, 8, 8)])
def test_losses_of_references_need_them(
    references: Tensor | None, refused: Callable[[str], Any]
) -> None:
    with refused("TopKLoss needs the honest model's maps of shape"):
        TopKLoss()(made_maps(torch.rand(3, 4, 5)), references)
