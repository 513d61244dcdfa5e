"""Composites against plain loops, and a network for which the map has to be exactly right."""

import math
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from diffsal.faithfulness.composites import (
    Composites,
    compare,
    composite_margins,
    in_logits,
    run_composites,
    skill_interval,
)
from diffsal.faithfulness.pasting import Plan, pasted, plan_composites
from diffsal.maps.salience import explain

REGIONS = ["rectangles", "halves", "cells", "marked"]
BOUNDS = {"rectangles": (0.2, 0.8), "halves": (0.3, 0.7), "cells": (0.2, 0.8), "marked": (0, 0.5)}
LABELS = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0])
grids = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: math.prod(grid) > 1)


def bag_of_features(logits=2, cell=4):
    """No pixel counts for two cells."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, cell, stride=cell), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, logits),
    )  # fmt: skip
    with torch.no_grad():
        model[-1].weight.mul_(20)
    return model.double()


def spotted(count=8, height=16, width=24, cell=4):
    """Images (count, 3, height, width), float64, whose cells differ widely."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.randn(count, 3, height // cell, width // cell, 1, 1, generator=generator)
    noise = torch.randn(count, 3, height // cell, width // cell, cell, cell, generator=generator)
    return (cells + noise / 2).permute(0, 1, 2, 4, 3, 5).reshape(count, 3, height, width).double()


def both_classes(model, images):
    return explain(model, images, true=1, false=0)


def random_case(count=8, grid=(4, 6), seed=2, **choices):
    """A plan, maps and margins, and actual margins somewhere near what the maps predict."""
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS.repeat(-(-count // 8))[:count]
    maps = torch.randn(count, *grid, generator=generator).double()
    margins = maps.sum((1, 2)) + torch.randn(count, generator=generator)
    plan = plan_composites(maps, labels, seed=seed, **choices)
    actual = compare(plan, maps, margins, torch.zeros(len(plan))).predicted
    return plan, maps, margins, actual + torch.randn(len(plan), generator=generator)


@pytest.mark.parametrize(("regions", "donors"), product(REGIONS, ["other", "same"]))
def test_all_numbers_equal_a_plain_loop(convnet, images, regions, donors):
    model, inputs = convnet(classes=3).double().eval(), images(8).double()
    inputs = inputs + spotted()
    found_maps = explain(model, inputs, true=2, false=0)
    margins = found_maps.margin
    maps = found_maps.difference + torch.randn(8, 4, 6)  # residuals of each image's own
    found = run_composites(
        model, inputs, maps, margins, LABELS, 2, 0,
        regions=regions, donors=donors, per_image=3, batch_size=5,
    )  # fmt: skip
    height, width = maps.shape[1:]
    actual, predicted, uniform = [], [], []
    for i, j, region in zip(found.receiver, found.donor, found.region, strict=True):
        assert (LABELS[i] == LABELS[j]) == (donors == "same")
        assert i != j
        composite = inputs[i].clone()
        for y, x in product(range(16), range(24)):
            if region[y * height // 16, x * width // 24]:
                composite[:, y, x] = inputs[j, :, y, x]
        with torch.no_grad():
            logits = model(composite[None])[0]
        actual.append(float(logits[2] - logits[0]))
        total, count = 0.0, 0
        for row, column in product(range(height), range(width)):
            count += int(region[row, column])
            total += float(maps[j if region[row, column] else i, row, column])
        share = count / (height * width)
        residual = [float(margins[k] - maps[k].sum()) for k in (i, j)]
        predicted.append(total + (1 - share) * residual[0] + share * residual[1])
        uniform.append(float((1 - share) * margins[i] + share * margins[j]))
    assert len(found) == 24
    for name, expected in [("actual", actual), ("predicted", predicted), ("uniform", uniform)]:
        assert getattr(found, name).tolist() == pytest.approx(expected, abs=1e-9), name
    actual, predicted, uniform = map(np.array, (actual, predicted, uniform))
    skill = 1 - np.mean((actual - predicted) ** 2) / np.mean((actual - uniform) ** 2)
    assert found.skill == pytest.approx(skill)
    before = margins[found.receiver].numpy()
    line = stats.linregress(predicted - before, actual - before)
    assert (found.slope, found.correlation) == pytest.approx((line.slope, line.rvalue))


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("logits", [1, 2])
def test_a_bag_of_features_is_predicted_exactly(regions, logits):
    model, images = bag_of_features(logits), spotted()
    maps = both_classes(model, images)
    found = run_composites(model, images, maps.difference, maps.margin, LABELS, regions=regions)
    assert (found.skill, found.slope, found.correlation) == pytest.approx((1, 1, 1), abs=1e-12)
    assert found.actual.std() > 0.1


@pytest.mark.parametrize("regions", REGIONS)
def test_shuffled_cells_predict_nothing(regions):
    model, images = bag_of_features(), spotted()
    maps = both_classes(model, images)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack(
        [one.flatten()[torch.randperm(24, generator=generator)] for one in maps.difference]
    ).view(8, 4, 6)
    found = run_composites(
        model, images, shuffled, maps.margin, LABELS, regions=regions, per_image=20
    )
    assert found.skill < 0.1


def test_a_map_of_the_decisions_elsewhere_is_found_out():
    """The map's own pixels decide nothing, and those that decide it does not show."""
    model, images = bag_of_features(), spotted()
    maps = both_classes(model, images)
    found = run_composites(
        model, images, maps.difference.flip(2), maps.margin, LABELS, regions="halves", per_image=20
    )
    assert found.skill < -0.5


def test_a_head_shift_changes_nothing(convnet):
    images = spotted()
    model = convnet().double()
    plan = plan_composites(torch.zeros(8, 4, 6), LABELS)

    def told():
        maps = both_classes(model, images)
        actual = composite_margins(model, images, plan)
        return maps, *(
            compare(plan, one, maps.margin, actual) for one in (maps.difference, maps.true)
        )

    before, difference_before, true_before = told()
    with torch.no_grad():
        model[-1].weight.add_(torch.randn(6).double() * 50)
    after, difference_after, true_after = told()
    assert not torch.allclose(before.true, after.true, atol=1)
    assert difference_after.skill == pytest.approx(difference_before.skill, abs=1e-9)
    assert torch.allclose(difference_after.predicted, difference_before.predicted, atol=1e-9)
    assert abs(true_after.skill - true_before.skill) > 0.1


@pytest.mark.parametrize("regions", REGIONS)
@given(grid=grids, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_regions_are_of_their_kind_and_never_empty_or_full(regions, grid, seed):
    maps = torch.randn(8, *grid, generator=torch.Generator().manual_seed(seed))
    plan = plan_composites(maps, LABELS, regions=regions, seed=seed)
    least, most = BOUNDS[regions]
    cells = math.prod(grid)
    counts = plan.region.flatten(1).sum(1)
    assert plan.region.shape == (40, *grid)
    assert ((counts >= max(1, least * cells)) & (counts <= min(cells - 1, most * cells))).all()
    if regions in ("rectangles", "halves"):
        for region in plan.region:
            rows, columns = region.any(1).sum(), region.any(0).sum()
            assert rows * columns == region.sum()  # and so it is a box, without gaps:
            edge = torch.zeros(1, dtype=torch.int)
            for line in (region.any(1).int(), region.any(0).int()):
                assert line.diff(prepend=edge, append=edge).ne(0).sum() == 2
    if regions == "halves":
        for region in plan.region:
            assert region.any(1).all() or region.any(0).all()
            shortest = min(length for length in grid if length > 1)
            assert abs(float(region.float().mean()) - 0.5) <= 0.5 / max(3, shortest) + 1e-6
    if regions == "marked":
        assert counts.min() >= cells / 10
        for receiver, region in zip(plan.receiver, plan.region, strict=True):
            own = maps[receiver] if LABELS[receiver] else -maps[receiver]
            assert own[region].min() >= own[~region].max()


def test_regions_and_donors_take_all_values():
    plan = plan_composites(torch.randn(8, 5, 6), LABELS, per_image=200)
    assert {int(one.sum()) for one in plan.region} >= {6, 8, 9, 10, 12, 15, 16, 18, 20, 24}
    assert plan.region.any(0).all()
    assert (~plan.region).any(0).all()
    assert len({(int(i), int(j)) for i, j in zip(plan.receiver, plan.donor, strict=True)}) == 32
    same = plan_composites(torch.randn(8, 5, 6), LABELS, donors="same", per_image=200)
    assert len({(int(i), int(j)) for i, j in zip(same.receiver, same.donor, strict=True)}) == 24
    halves = plan_composites(torch.randn(8, 5, 6), LABELS, regions="halves", per_image=20)
    assert len(halves.region.unique(dim=0)) == 4


@pytest.mark.parametrize("regions", REGIONS)
def test_a_plan_follows_from_its_seed_alone(regions):
    maps = torch.randn(8, 4, 6)
    state = torch.get_rng_state()
    first, again, other = (
        plan_composites(maps, LABELS, regions=regions, seed=seed) for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.donor, again.donor)
    assert torch.equal(first.region, again.region)
    assert not torch.equal(first.donor, other.donor)
    assert not torch.equal(first.region, other.region)
    assert torch.equal(first.donor, plan_composites(maps, LABELS, seed=7).donor)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100), regions=st.sampled_from(REGIONS[:3]))
@settings(max_examples=30, deadline=None)
def test_skill_minds_neither_unit_nor_order_of_classes(scale, seed, regions):
    plan, maps, margins, actual = random_case(seed=seed, regions=regions)
    first = compare(plan, maps, margins, actual)
    assert first.skill == pytest.approx(
        1 - np.mean((actual - first.predicted).numpy() ** 2)
        / np.mean((actual - first.uniform).numpy() ** 2)
    )  # fmt: skip
    for factor in (scale, -1):
        other = compare(plan, factor * maps, factor * margins, factor * actual)
        assert (other.skill, other.slope, other.correlation) == pytest.approx(
            (first.skill, first.slope, first.correlation), rel=1e-6
        )
        assert skill_interval(other, draws=50).low == pytest.approx(
            skill_interval(first, draws=50).low, rel=1e-6
        )


@pytest.mark.parametrize("regions", REGIONS)
def test_classes_may_be_swapped(convnet, regions):
    model, images = convnet().double(), spotted()
    one, other = explain(model, images, 1, 0), explain(model, images, 0, 1)
    first = run_composites(model, images, one.difference, one.margin, LABELS, regions=regions)
    second = run_composites(
        model, images, other.difference, other.margin, 1 - LABELS, 0, 1, regions=regions
    )
    for name in ("receiver", "donor", "region"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.allclose(second.actual, -first.actual, atol=1e-9)
    assert second.skill == pytest.approx(first.skill, abs=1e-9)


def test_batch_size_does_not_matter_and_the_model_is_left_alone(convnet):
    model, images = convnet().double().train(), spotted()
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    modes = []
    model[1].register_forward_pre_hook(
        lambda module, _: modes.append(module.training or torch.is_grad_enabled())
    )
    maps = both_classes(model, images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sizes.clear()  # only what is run below
    modes.clear()
    found = [
        run_composites(model, images, maps.difference, maps.margin, LABELS, batch_size=size)
        for size in (3, 1000)
    ]
    assert torch.allclose(found[0].actual, found[1].actual, atol=1e-9)
    assert found[0].skill == pytest.approx(found[1].skill, abs=1e-9)
    composite_margins(model, images, found[0])
    assert (max(sizes), min(sizes), any(modes), model[1].training) == (40, 1, False, True)
    assert max(sizes[:-3]) == 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(16, 24), (33, 29), (4, 6)])
def test_feathered_seams_blend_within_a_quarter_cell_of_the_seam(size):
    images = torch.stack([torch.zeros(1, *size), torch.ones(1, *size)])
    region = torch.zeros(1, 4, 6, dtype=torch.bool)
    region[0, 1:3, :2] = True
    plan = Plan(torch.tensor([0]), torch.tensor([1]), region, "feathered")
    soft = pasted(images, plan)[0, 0]
    sharp = pasted(images, Plan(plan.receiver, plan.donor, region, "sharp"))[0, 0]
    reach = size[0] // 16, size[1] // 24
    for y, x in product(*map(range, size)):  # the mean of the mask around, mirrored by no edge
        rows = [min(max(y + k, 0), size[0] - 1) for k in range(-reach[0], reach[0] + 1)]
        columns = [min(max(x + k, 0), size[1] - 1) for k in range(-reach[1], reach[1] + 1)]
        expected = np.mean([float(sharp[a, b]) for a, b in product(rows, columns)])
        assert float(soft[y, x]) == pytest.approx(expected, abs=1e-6)
    blended = (soft > 1e-6) & (soft < 1 - 1e-6)
    assert bool(blended.any()) == (min(reach) > 0)


def test_feathered_seams_keep_the_prediction_and_change_the_composite():
    model, images = bag_of_features(), spotted()
    maps = both_classes(model, images)
    sharp, soft = (
        run_composites(model, images, maps.difference, maps.margin, LABELS, seams=seams)
        for seams in ("sharp", "feathered")
    )
    assert torch.equal(sharp.predicted, soft.predicted)
    assert not torch.allclose(sharp.actual, soft.actual, atol=1e-3)
    assert 0.3 < soft.skill < 0.999


@pytest.mark.parametrize("donors", ["other", "same"])
@pytest.mark.parametrize("one_class", [False, True])
def test_the_interval_equals_a_plain_bootstrap_over_images(donors, one_class):
    found = compare(*random_case(donors=donors))
    if one_class:
        found = found[LABELS[found.receiver] == 1]
    images = sorted({*found.receiver.tolist(), *found.donor.tolist()})
    assert len(images) == (4 if one_class and donors == "same" else 8)
    wrong = (found.actual - found.predicted) ** 2
    uniform = (found.actual - found.uniform) ** 2
    generator, skills = np.random.default_rng(5), []
    for _ in range(300):
        counts = generator.multinomial(len(images), [1 / len(images)] * len(images))
        times = dict(zip(images, counts, strict=True))
        sums = [0.0, 0.0]
        for n in range(len(found)):
            weight = times[int(found.receiver[n])] * times[int(found.donor[n])]
            sums[0] += weight * float(wrong[n])
            sums[1] += weight * float(uniform[n])
        if sums[1] > 0:
            skills.append(1 - sums[0] / sums[1])
    interval = skill_interval(found, draws=300, seed=5)
    assert (interval.low, interval.high) == pytest.approx(np.percentile(skills, [2.5, 97.5]))
    assert (interval.mean, interval.count) == (found.skill, len(images))
    assert interval.low < found.skill < interval.high


def test_the_interval_covers_the_skill_of_the_population_about_as_often_as_it_says():
    population = compare(*random_case(count=400, per_image=20)).skill
    covered = 0
    for seed in range(60):
        interval = skill_interval(compare(*random_case(count=40, seed=seed + 10)), draws=200)
        covered += interval.low < population < interval.high
    assert 48 <= covered <= 60  # 57 are expected; fewer than 48, of 95 %, once in 3,000


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    found = compare(*random_case())
    together = skill_interval(found, draws=101)
    monkeypatch.setattr("diffsal.faithfulness.composites._DRAWN_AT_ONCE", 7 * len(found))
    assert skill_interval(found, draws=101) == together
    assert skill_interval(found, draws=101, seed=1) != together


def test_a_part_of_the_composites_is_whole():
    found = compare(*random_case())
    mask = LABELS[found.receiver] == 0
    part = found[mask]
    assert isinstance(part, Composites)
    for field in fields(found):
        whole, some = getattr(found, field.name), getattr(part, field.name)
        assert some == whole if field.name == "seams" else torch.equal(some, whole[mask])
    wrong, uniform = (
        (part.actual - guess).square().sum() for guess in (part.predicted, part.uniform)
    )
    assert part.skill == pytest.approx(1 - float(wrong / uniform))
    assert part.skill != pytest.approx(found[~mask].skill)


def test_what_is_undefined_is_nan():
    plan, maps, margins, _ = random_case()
    exactly = compare(plan, maps, margins, torch.zeros(len(plan))).uniform
    found = compare(plan, maps, margins, exactly + 1e-9 * torch.randn(len(plan)))
    interval = skill_interval(found)
    assert all(map(math.isnan, (found.skill, interval.mean, interval.low, interval.high)))
    same = compare(plan, torch.zeros_like(maps), torch.ones(8), torch.ones(len(plan)))
    assert all(map(math.isnan, (same.skill, same.slope, same.correlation)))
    nothing = found[found.receiver < 0]
    assert all(map(math.isnan, (nothing.skill, nothing.slope, nothing.correlation)))
    assert math.isnan(skill_interval(nothing).low)
    assert compare(plan, maps, margins, exactly + 1e-3 * exactly.flip(0)).skill < 0


@pytest.mark.parametrize("signed", [False, True])
def test_maps_without_a_unit_are_scaled_by_least_squares(signed):
    heatmaps, margins = torch.rand(8, 4, 6).double(), torch.randn(8).double()
    labels = None if signed else LABELS
    found = in_logits(heatmaps, margins, labels)
    signs = np.ones(8) if signed else np.where(LABELS == 1, 1, -1)
    line = stats.linregress(signs * heatmaps.sum((1, 2)).numpy(), margins.numpy())
    expected = line.slope * signs[:, None, None] * heatmaps.numpy()
    assert found.numpy() == pytest.approx(expected)
    assert torch.equal(in_logits(torch.ones(8, 2, 2), margins), torch.zeros(8, 2, 2).double())


def test_a_scaled_map_without_unit_is_as_good_as_it_was():
    model, images = bag_of_features(), spotted()
    maps = both_classes(model, images)
    plan = plan_composites(maps.difference, LABELS)
    actual = composite_margins(model, images, plan)
    margins = maps.margin
    found = compare(plan, in_logits(maps.difference / 37, margins), margins, actual)
    assert found.skill == pytest.approx(1, abs=1e-9)


def test_maps_and_margins_may_be_arrays_and_lists():
    plan, maps, margins, actual = random_case()
    found = compare(plan, maps.numpy(), margins.tolist(), actual.numpy())
    assert found.skill == compare(plan, maps, margins, actual).skill
    again = plan_composites(maps.numpy(), LABELS.tolist(), seed=2)
    assert torch.equal(again.region, plan.region)


def test_errors_are_one_line(refused, convnet):
    maps = torch.rand(8, 4, 6)
    with refused("two images of each class, and of class 1 there are 1"):
        plan_composites(maps[:3], [0, 0, 1])
    with refused("two images of each class, and of class 0 there are 0"):
        plan_composites(maps[:3], [1, 1, 1], donors="same")
    with refused("labels are 1 for images"):
        plan_composites(maps, 2 * LABELS)
    with refused("do not fit 8 images"):
        plan_composites(maps[:7], LABELS)
    with refused("single cell"):
        plan_composites(torch.rand(8, 1, 1), LABELS)
    with refused("per_image is 0"):
        plan_composites(maps, LABELS, per_image=0)
    for choice in ({"regions": "circles"}, {"donors": "any"}, {"seams": "wavy"}):
        with refused("is unknown: pass one of"):
            plan_composites(maps, LABELS, **choice)
    plan, maps, margins, actual = random_case()
    with refused("do not fit 7 images"):
        compare(plan, maps, margins[:7], actual)
    with refused("3 × 6 cells do not fit regions of 4 × 6"):
        compare(plan, maps[:, :3], margins, actual)
    with refused("the plan names image 7, and there are maps of 6: pass those of all"):
        compare(plan, maps[:6], margins[:6], actual)
    with refused("do not fit 40 composites"):
        compare(plan, maps, margins, actual[:5])
    with refused("does not fit images of 2 × 24 pixels"):
        pasted(torch.rand(8, 3, 2, 24), plan)
    with refused("do not fit 8 images"):
        in_logits(maps[:5], margins)
    with refused("do not fit 5 images"):
        in_logits(maps, margins, LABELS[:5])
    model, images = convnet().double(), spotted()
    with refused("do not fit 8 images"):
        run_composites(model, images, maps[:6], margins[:6], LABELS[:6])
    with refused("not the model's for class 1 against class 0"):
        wrong = explain(model, images, LABELS)  # their signs go with the labels
        run_composites(model, images, wrong.difference, wrong.margin, LABELS)
