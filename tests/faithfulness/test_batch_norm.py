"""Re-estimated batch norms against torch's own, and the model that they are a copy of."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from diffsal.faithfulness.batch_norm import batch_norms, reestimate_batch_norms


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.BatchNorm1d(5), nn.Linear(5, 2)),
    )


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(6, 3, 8, 8, generator=generator) * (1 + n) for n in range(count)]


def states_equal(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_statistics_are_those_of_torch():
    model = network()
    expected = deepcopy(model)
    update_bn(batches(), expected)
    copy = reestimate_batch_norms(model, batches())
    assert states_equal(copy, expected)
    assert not any(module.training for module in copy.modules())


def test_dropout_takes_no_part():
    model = network(dropout=0.9)
    with_, without = (reestimate_batch_norms(one, batches()) for one in (model, network()))
    assert states_equal(with_, without)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_bit_for_bit(training):
    model = network().train(training)
    before = deepcopy(model)
    reestimate_batch_norms(model, batches())
    assert states_equal(model, before)
    assert all(module.training == training for module in model.modules())
    assert all(norm.momentum == 0.1 for norm in batch_norms(model))


def test_statistics_of_these_images_stay():
    model = reestimate_batch_norms(network(), batches())
    again = reestimate_batch_norms(model, batches())
    for norm, other in zip(batch_norms(model), batch_norms(again), strict=True):
        torch.testing.assert_close(norm.running_mean, other.running_mean)
        torch.testing.assert_close(norm.running_var, other.running_var)


def test_an_input_that_the_model_changes_is_copied():
    images = batches(1)[0]
    before = images.clone()
    model = nn.Sequential(nn.Hardtanh(0.2, 0.3, inplace=True), nn.BatchNorm2d(3))
    reestimate_batch_norms(model, [images])
    assert torch.equal(images, before)


def test_where_there_is_nothing_to_estimate(refused):
    with refused("no batch norm that keeps statistics"):
        reestimate_batch_norms(nn.Sequential(nn.GroupNorm(1, 3)), batches())
    with refused("no images to take the statistics of"):
        reestimate_batch_norms(network(), [])
