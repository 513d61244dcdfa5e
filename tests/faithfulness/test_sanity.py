"""Randomisation goes from the top down, on a copy, and the map is watched."""

from functools import partial

import pytest
import torch
from torch import nn

from diffsal.faithfulness.sanity import cascading_randomization
from diffsal.faithfulness.statistics import rank_correlation
from diffsal.maps.salience import explain


def test_randomisation_goes_from_the_top_down_on_a_copy(convnet, images):
    model, inputs = convnet().train(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def weights(model, inputs):
        assert not model.training
        seen.append({name: value.clone() for name, value in model.named_parameters()})
        return explain(model, inputs, 1).difference

    result = cascading_randomization(model, inputs, weights)
    assert result.layers == ("9", "4", "1", "0")
    assert result.correlation.shape == (3, 4)
    for stage in range(5):
        touched = {name.split(".")[0] for name in before if name in seen[stage]
                   and not torch.equal(seen[stage][name], before[name])}  # fmt: skip
        # batch norm's weights are all 1 before training: they have no spread to be drawn from
        assert touched == {"9", "4", "0"} & set(result.layers[:stage])
    again = weights_map(convnet(), seen[2], inputs)
    expected = rank_correlation(explain(model, inputs, 1).difference, again)
    torch.testing.assert_close(result.correlation[:, 1], expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def weights_map(model, parameters, inputs):
    model.load_state_dict(parameters, strict=False)
    return explain(model, inputs, 1).difference


def test_randomisation_keeps_a_parameters_mean_and_spread(images):
    model = nn.Sequential(nn.Conv2d(3, 200, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(200, 2))  # fmt: skip
    with torch.no_grad():
        model[0].weight.mul_(7).add_(3)
    drawn = []

    def remember(copy, inputs):
        drawn.append(copy[0].weight.detach().clone())
        return inputs[:, 0]

    cascading_randomization(model, images(), remember)
    for statistic in (torch.mean, torch.std):
        assert float(statistic(drawn[-1])) == pytest.approx(
            float(statistic(model[0].weight.detach())), rel=0.05
        )


def test_randomisation_is_seeded_and_spaces_its_stages(convnet, images):
    model, inputs = convnet(), images()
    run = partial(
        cascading_randomization, model, inputs, lambda m, x: explain(m, x, 1).true, stages=2
    )
    state = torch.get_rng_state()
    assert run(seed=1).layers == ("9", "0")
    assert torch.equal(run(seed=1).correlation, run(seed=1).correlation)
    assert not torch.equal(run(seed=1).correlation, run(seed=2).correlation)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_that_ignores_the_model_survives_randomisation(convnet, images):
    result = cascading_randomization(convnet(), images(), lambda model, x: x.mean(1).numpy())
    assert (result.correlation == 1).all()


def test_a_shifted_head_makes_the_map_insensitive_to_the_class(evidence_and_distraction):
    model, inputs = evidence_and_distraction
    maps = explain(model, inputs, 1)
    assert rank_correlation(maps.true, maps.false).max() < -0.99
    with torch.no_grad():
        model[3].weight.add_(torch.tensor([0.0, 50.0]))
    maps = explain(model, inputs, 1)
    assert rank_correlation(maps.true, maps.false).min() > 0.99
