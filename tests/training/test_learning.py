"""What the losses are for: evidence moves into the human map, at equal accuracy."""

from functools import cache

import pytest
import torch

from diffsal import capture, explain
from diffsal.demo import ARCHITECTURE, ARGUMENTS, digits
from diffsal.models.architectures import build_model
from diffsal.training.losses import LOSSES

EPOCHS = 10
METHODS = ("baseline", "difference", "per-class", "contrast")


@cache
def trained(method):
    """Accuracy, and the share of the normalised difference map inside the human map; held out."""
    torch.manual_seed(0)
    training, held_out = (part.tensors() for part in digits())
    human_maps = torch.zeros(len(training[0]), 64, 64)
    human_maps[:, :, :32] = 1  # the left half
    model, criterion = build_model(ARCHITECTURE, ARGUMENTS), LOSSES[method]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(human_maps)).split(16):
            with capture(model) as captured:
                maps = captured.maps(model(training[0][batch]), true=training[1][batch])
            loss = criterion(maps, human_maps[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    maps = explain(model, held_out[0], true=held_out[1])
    accuracy = (maps.logits.argmax(1) == held_out[1]).float().mean()
    difference = maps.normalized().difference
    inside = difference[:, :, :4].sum((1, 2)) / difference.sum((1, 2))
    return float(accuracy), float(inside.mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_evidence_moves_into_the_human_map(method, record_property):
    (plain_accuracy, plain_share), (accuracy, share) = trained("cross-entropy"), trained(method)
    record_property("share inside the human map", f"{plain_share:.3f} -> {share:.3f}")
    print(f"{method}: {plain_share:.3f} -> {share:.3f}, accuracy {accuracy:.3f}")
    assert accuracy > plain_accuracy - 0.02
    assert share > plain_share + 0.03
