"""Localisation against numpy, scikit-learn and Quantus."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.localisation import (
    edge_frame,
    energy_inside,
    frame_mass,
    intersection_over_union,
    marked_share,
    pointing_game,
)
from diffsal.maps.salience_maps import normalize


def random_maps(count=3, height=4, width=6, seed=2):
    return torch.randn(count, height, width, generator=torch.Generator().manual_seed(seed))


def masks(count=4, size=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, size, size, generator=generator) > 0.7).float()


def test_localisation_equals_numpy_and_scikit_learn():
    maps, human = random_maps(4, 12, 12), masks()
    human[1] *= 0.2  # a faint mask is a mask
    found = pointing_game(maps, human), energy_inside(maps, human)
    overlap = intersection_over_union(maps, human, 0.6)
    for index in range(4):
        values = maps[index].double().numpy()
        inside = human[index].numpy() > 0
        scaled = (values - values.min()) / (values.max() - values.min())
        assert found[0][index] == inside[np.unravel_index(values.argmax(), values.shape)]
        assert float(found[1][index]) == pytest.approx(scaled[inside].sum() / scaled.sum())
        expected = jaccard_score(inside.ravel(), scaled.ravel() >= 0.6)
        assert float(overlap[index]) == pytest.approx(expected)


def test_marked_share_is_what_a_map_scores_that_knows_nothing():
    human = masks()
    human[1] *= 0.2
    human[3] = 0
    share = marked_share(human)
    assert share[:3].tolist() == pytest.approx(
        [float((one > 0).double().mean()) for one in human[:3]]
    )
    assert share[3].isnan()
    everywhere = random_maps(2000, 12, 12)
    hits = pointing_game(everywhere, human[:1].expand(2000, -1, -1)).mean()
    assert float(hits) == pytest.approx(float(share[0]), abs=0.04)


def test_localisation_equals_quantus():
    quantus = pytest.importorskip("quantus")
    maps, human = normalize(random_maps(4, 12, 12)), masks()
    arguments = {
        "model": None,
        "x_batch": np.zeros((4, 1, 12, 12)),
        "y_batch": np.zeros(4, int),
        "a_batch": maps[:, None].numpy(),
        "s_batch": human[:, None].numpy(),
    }
    settings = {"normalise": False, "abs": False, "disable_warnings": True}
    pointing = quantus.PointingGame(**settings)(**arguments)
    mass = quantus.RelevanceMassAccuracy(**settings)(**arguments)
    assert pointing_game(maps, human).tolist() == [float(hit) for hit in pointing]
    assert energy_inside(maps, human).tolist() == pytest.approx(mass)


@pytest.mark.parametrize("metric", [pointing_game, energy_inside, intersection_over_union])
def test_localisation_needs_a_map_and_a_mask(metric):
    maps, human = random_maps(4, 12, 12), masks()
    maps[0], human[1], maps[2] = 3, 0, torch.nan
    assert metric(maps, human).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("metric", [pointing_game, energy_inside, intersection_over_union])
def test_localisation_minds_neither_scale_nor_size_nor_type(metric):
    maps, human = random_maps(4, 6, 6), masks()
    expected = metric(maps, human)
    torch.testing.assert_close(metric(7 * maps - 3, human.bool()), expected)
    torch.testing.assert_close(metric(maps.numpy(), human.numpy()), expected)
    enlarged = nn.functional.interpolate(maps[:, None], (12, 12), mode="bilinear")[:, 0]
    torch.testing.assert_close(metric(enlarged, human), expected)


def test_graded_human_maps_count_from_half_their_maximum():
    human = torch.tensor([[[0.0, 0.19], [0.2, 0.4]]])
    maps = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    assert float(energy_inside(maps, human)) == pytest.approx(5 / 6)


def test_pointing_at_several_maxima_counts_their_share_inside():
    maps = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    human = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert float(pointing_game(maps, human)) == pytest.approx(1 / 3)


def test_frame_mass():
    frame = edge_frame((7, 9), 2)
    assert frame.sum() == 7 * 9 - 3 * 5
    assert frame[2:5, 2:7].sum() == 0
    maps = torch.stack([5 - 2 * frame, 2 * frame - 5, torch.ones(7, 9)])
    assert frame_mass(maps, 2).nan_to_num(nan=-1).tolist() == [0, 1, -1]
    noise = random_maps(1, 7, 9)
    scaled = normalize(noise)[0]
    expected = 1 - scaled[2:5, 2:7].sum() / scaled.sum()
    assert float(frame_mass(noise, 2)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: pointing_game(s, s[:1]), "do not fit 3 images"),
        (lambda s: frame_mass(s, 2), "from 1 to 1"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DiffsalError, match=message) as caught:
        call(random_maps())
    assert "\n" not in str(caught.value)
