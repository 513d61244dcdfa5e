"""Other libraries' classifiers: the layer is found, maps add up, cells lie over what moves them."""

from dataclasses import replace

import pytest
import torch
from models.zoo.families import FAMILIES, QUICK, Family
from models.zoo.observing import IN_PLACE, complaints, in_place, observe
from torch import nn

_FAMILIES = [
    pytest.param(one, id=str(one), marks=() if str(one) in QUICK else pytest.mark.slow)
    for one in FAMILIES
]


@pytest.mark.parametrize("family", _FAMILIES)
def test_family(family):
    pytest.importorskip(family.library)
    assert complaints(family, observe(family)) == []


def test_what_runs_by_default_exists():
    assert {str(one) for one in FAMILIES} >= QUICK
    assert len(QUICK) == 16


class _Net(nn.Module):
    """A pooled head, with ways in which maps can go wrong."""

    def __init__(self, skips: bool = False, bends: bool = False) -> None:
        super().__init__()
        self.skips, self.bends = skips, bends
        self.features = nn.Conv2d(3, 8, 8, 8)
        self.fc = nn.Linear(8, 2)
        self.around = nn.Linear(3, 2)

    def forward(self, images):
        features = self.features(images)
        logits = self.fc(features.mean((2, 3)))
        logits = logits.square() if self.bends else logits
        return logits + self.around(images.mean((2, 3))) if self.skips else logits


@pytest.mark.parametrize(
    ("flaw", "complaint"),
    [
        ({}, []),
        ({"bends": True}, ["the residual varies"]),
    ],
)
def test_the_measures_see_what_is_wrong(flaw, complaint):
    family = Family("own", "net", lambda: _Net(**flaw), "pooled", shape=(3, 64, 64))
    found = complaints(family, observe(family))
    assert len(found) == len(complaint)
    assert all(part in one for part, one in zip(complaint, found, strict=True))


def test_what_goes_around_every_layer_is_refused():
    family = Family("own", "net", lambda: _Net(skips=True), "refused", "name the layer")
    seen = observe(family)
    assert complaints(family, seen) == []
    assert complaints(replace(family, head="pooled"), seen) == [f"refused: {seen.message}"]


def test_a_transposed_grid_is_out_of_place():
    features = torch.zeros(5, 2, 6, 6)
    for index, (top, left) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        features[1 + index, :, top : top + 3, left : left + 3] = 1
    assert in_place(features) == 1
    assert in_place(features.mT) == 0.5 < IN_PLACE
