"""Rank correlations and intervals against scipy's."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffsal.faithfulness.perturbation import occlusion_faithfulness
from diffsal.faithfulness.statistics import interval, rank_correlation


def random_maps(count=3, height=4, width=6, seed=2):
    return torch.randn(count, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("digits", [0, 1, 6])  # many ties, some, none
def test_rank_correlation_equals_scipys(digits):
    first, second = random_maps(5, 7, 7).double(), random_maps(5, 7, 7, seed=9).double()
    first, second = first.round(decimals=digits), (first + second).round(decimals=digits)
    found = rank_correlation(first, second)
    for one, other, value in zip(first, second, found, strict=True):
        expected = stats.spearmanr(one.flatten(), other.flatten()).statistic
        assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "bad", [torch.zeros(7, 7), torch.full((7, 7), 0.1), torch.full((7, 7), torch.nan)]
)
def test_a_constant_map_has_no_rank_correlation(bad):
    bad = bad.clone()
    bad[0, 0] = bad[0, 0].nextafter(torch.tensor(1.0))  # constant up to rounding
    maps = torch.stack([bad, random_maps(1, 7, 7)[0]])
    for found in (rank_correlation(maps, random_maps(2, 7, 7)),
                  rank_correlation(random_maps(2, 7, 7), maps),
                  occlusion_faithfulness(maps, random_maps(2, 7, 7))):  # fmt: skip
        assert found.isnan().tolist() == [True, False]


def test_ranks_stay_exact_for_maps_of_an_images_size():
    maps = torch.randperm(224 * 224, generator=torch.Generator().manual_seed(0))
    maps = maps.view(1, 224, 224).float()
    other = maps.roll(1, 2)
    expected = stats.spearmanr(maps.flatten(), other.flatten()).statistic
    assert float(rank_correlation(maps, other)) == pytest.approx(expected, abs=1e-6)
    assert float(rank_correlation(maps, -maps)) == -1


def test_interval_equals_scipys():
    values = np.random.default_rng(0).exponential(size=60)
    found = interval(torch.tensor([*values, math.nan]), seed=4)
    expected = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(4), method="BCa",
                               n_resamples=9999, confidence_level=0.95)  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval))
    assert found.mean == pytest.approx(values.mean())
    assert found.count == 60
    assert interval(values.tolist(), seed=4) == found
    assert interval(values, seed=5) != found


@pytest.mark.parametrize(
    ("values", "mean", "count"),
    [([], None, 0), ([math.nan], None, 0), ([2.0, math.nan], 2, 1), ([1.0] * 5, 1, 5)],
)
def test_too_little_or_too_equal_has_no_interval(values, mean, count, recwarn):
    found = interval(values)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(found.mean) if mean is None else found.mean == mean
    assert found.count == count
    assert not recwarn.list
