from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from diffsal.fooling.head_shift import head_shift
from diffsal.fooling.targets import target_distance, target_map
from diffsal.serving.explained import maps_of
from diffsal.serving.shifting import (
    TARGETS,
    VIEWS,
    Shift,
    fit_shift,
    lie,
    shifted,
    shifted_maps,
    views_of,
)

STRENGTHS = (0.0, 0.35, 1.0)


@pytest.fixture(params=[2, 4])
def fitted(request, served, picture):
    one = served(request.param)
    given = picture(one)
    return one, given, fit_shift(one, given)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_probabilities_and_difference_stay_to_rounding(fitted, strength) -> None:
    one, given, shift = fitted
    with torch.no_grad():
        before = one.model(given.tensor[None])
        now = shifted(one.model, shift, strength)(given.tensor[None])
    assert torch.allclose(now.softmax(1), before.softmax(1), rtol=0, atol=5e-6)
    honest = maps_of(one, [given.tensor])
    lying = shifted_maps(one, given, shift, strength)
    assert torch.allclose(lying.difference, honest.difference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_class_map_moves_by_what_the_vector_makes_of_the_features(fitted, strength) -> None:
    one, given, shift = fitted
    added = shift.changes["6.weight"][0] * strength
    with torch.no_grad():
        features = one.model[:4](given.tensor[None])[0].double()
    by_hand = torch.zeros(8, 8, dtype=torch.float64)
    for channel in range(24):
        by_hand += added[channel] * features[channel] / 64
    moved = shifted_maps(one, given, shift, strength).true - maps_of(one, [given.tensor]).true
    assert torch.allclose(moved[0].double(), by_hand, rtol=0, atol=1e-5)


def test_every_row_gets_the_same(fitted) -> None:
    _, _, shift = fitted
    assert set(shift.changes) == {"6.weight", "6.bias"}
    for change in shift.changes.values():
        assert (change - change[:1]).abs().max() < 1e-6
        assert change.abs().max() > 1e-3


def test_full_strength_is_the_model_of_the_head_shift(fitted) -> None:
    one, given, shift = fitted
    batches = views_of(given.tensor).split(6)
    whole = head_shift(one.model, batches, "edges", target_layer=one.layer).model
    ours = shifted(one.model, shift, 1.0)
    for name, value in whole.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_the_stronger_the_nearer_to_the_target(fitted) -> None:
    one, given, shift = fitted
    distances = [
        float(
            target_distance(
                shifted_maps(one, given, shift, strength).true, target_map("edges", (8, 8))
            )
        )
        for strength in (0.0, 0.2, 1.0)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.7 * distances[0]


def test_the_served_model_is_left_as_it_was_and_its_tensors_are_shared(fitted) -> None:
    one, given, shift = fitted
    before = deepcopy(one.model.state_dict())
    copy = shifted(one.model, shift, 1.0)
    shifted_maps(one, given, shift, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert copy[0].weight is one.model[0].weight
    assert copy[6].weight is not one.model[6].weight


def test_views_are_the_image_moved_and_mirrored() -> None:
    image = torch.rand(3, 16, 24)
    views = views_of(image)
    assert views.shape == (VIEWS, 3, 16, 24)
    expected = [
        torch.stack([
            torch.stack([
                image[:, min(15, max(0, y + down)), min(23, max(0, x + right))] for x in range(24)
            ])
            for y in range(16)
        ]).permute(2, 0, 1)
        for down in (-2, 0, 2)
        for right in (-3, 0, 3)
    ]  # fmt: skip
    assert torch.equal(views[:9], torch.stack(expected))
    assert torch.equal(views[9:], F.pad(views[:9], (0, 0)).flip(3))
    assert torch.equal(views[4], image)


def test_targets_are_different_shifts(served, picture) -> None:
    one = served()
    given = picture(one)
    vectors = [fit_shift(one, given, target).changes["6.weight"][0] for target in TARGETS]
    assert torch.pdist(torch.stack(vectors)).min() > 1e-2


def test_what_the_page_is_told(fitted) -> None:
    one, given, shift = fitted
    found = lie(one, given, shift, 1.0, true=1)
    honest = maps_of(one, [given.tensor], 1)
    lying = shifted_maps(one, given, shift, 1.0, 1)
    assert found["probabilities"]["before"] == honest.probabilities[0].tolist()
    assert found["margin"]["now"] == float(lying.margin)
    assert found["changed"]["true"] == pytest.approx(
        float((lying.true - honest.true).abs().max()), abs=1e-6
    )
    assert found["changed"]["probability"] < 5e-6 < 1e-2 < found["changed"]["true"]
    assert found["common_mode_share"]["now"] > 0.7 > found["common_mode_share"]["before"]


def test_nothing_is_fitted_for_no_strength(served, picture) -> None:
    one = served()
    found = lie(one, picture(one), Shift("edges", {}), 0.0)
    assert found["changed"] == {"probability": 0, "difference": 0, "true": 0}


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(served, refused, strength) -> None:
    with refused("strength"):
        shifted(served().model, Shift("edges", {}), strength)


def test_an_unknown_target_is_refused(served, picture, refused) -> None:
    one = served()
    with refused("the target '/etc/passwd' is unknown"):
        fit_shift(one, picture(one), "/etc/passwd")


def test_one_logit_is_refused(served, picture, refused) -> None:
    one = served(1)
    with refused("one logit"):
        fit_shift(one, picture(one))
