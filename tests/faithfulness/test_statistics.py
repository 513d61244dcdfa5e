"""Every number against an independent computation: captum, scipy, scikit-learn, or a plain loop."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy import ndimage, stats
from sklearn.metrics import auc, jaccard_score
from torch import nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness import (
    cascading_randomization,
    edge_frame,
    energy_inside,
    frame_mass,
    insertion_deletion,
    intersection_over_union,
    interval,
    marked_share,
    occlusion_drops,
    occlusion_faithfulness,
    pointing_game,
    rank_correlation,
    road,
)
from diffsal.salience import explain, normalize

OCCLUDERS = ["mean", "blur", "noise"]


def convnet(classes=2, channels=3, seed=0):
    """A pooled-linear network with batch norm and dropout, whose logits spread widely."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(4),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6, classes),
    )
    with torch.no_grad():
        model[-1].weight.mul_(20)
    return model


def images(count=3, height=16, width=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator) + torch.arange(count).view(
        -1, 1, 1, 1
    )


def random_maps(count=3, height=4, width=6, seed=2):
    return torch.randn(count, height, width, generator=torch.Generator().manual_seed(seed))


def mean_of(image):
    return image.mean((1, 2), keepdim=True).expand_as(image)


def blur_of(image, sigmas):
    blurred = [
        ndimage.gaussian_filter(c.double().numpy(), sigmas, mode="mirror", truncate=3)
        for c in image
    ]
    return torch.from_numpy(np.stack(blurred)).to(image)


class Watched(nn.Module):
    """Records the largest batch and whether the model was in evaluation mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.largest, self.trained = 0, False

    def forward(self, inputs):
        self.largest = max(self.largest, len(inputs))
        self.trained |= self.training or self.model.training or torch.is_grad_enabled()
        return self.model(inputs)


# Occlusion


def margin_loop(model, image, true, false):
    with torch.no_grad():
        logits = model(image[None])[0]
    return float(logits[true] - logits[false])


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)])  # 16 × 24 pixels: even and uneven
@pytest.mark.parametrize("occluder", ["mean", "blur"])
def test_occlusion_drops_equal_a_plain_loop(occluder, grid):
    model, inputs, true, false = convnet(classes=4).eval(), images(), [0, 1, 3], [2, 0, 1]
    drops = occlusion_drops(model, inputs, true, false, grid=grid, occluder=occluder, batch_size=5)
    assert drops.shape == (3, *grid)
    for image, t, f, found in zip(inputs, true, false, drops, strict=True):
        if occluder == "mean":
            filler = mean_of(image)
        elif grid == (1, 1):
            return  # a blur wider than the image: scipy mirrors further than torch can
        else:
            filler = blur_of(image, (16 / grid[0] / 2, 24 / grid[1] / 2))
        for row in range(grid[0]):
            for column in range(grid[1]):
                occluded = image.clone()
                for y in range(16):
                    for x in range(24):
                        if y * grid[0] // 16 == row and x * grid[1] // 24 == column:
                            occluded[:, y, x] = filler[:, y, x]
                expected = margin_loop(model, image, t, f) - margin_loop(model, occluded, t, f)
                assert float(found[row, column]) == pytest.approx(expected, abs=1e-4)


def test_occlusion_drops_equal_captums():
    model, inputs = convnet().eval(), images()
    labels = torch.tensor([0, 1, 1])
    expected = Occlusion(
        lambda x: (model(x).gather(1, labels[:, None]) - model(x).gather(1, 1 - labels[:, None]))[
            :, 0
        ]
    ).attribute(
        inputs,
        sliding_window_shapes=(3, 4, 4),
        strides=(3, 4, 4),
        baselines=inputs.mean((2, 3), keepdim=True).expand_as(inputs),
    )[:, 0, ::4, ::4]
    found = occlusion_drops(model, inputs, labels, grid=(4, 6))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("true", "false", "classes"),
    [
        (None, None, 4),
        (None, None, 1),
        (None, "rest", 4),
        ([1, 0, 0], None, 1),
        (lambda logits: logits[0], [lambda z, k=k: z[k] for k in (1, 2, 3)], 4),
    ],
)
def test_classes_are_settled_on_the_untouched_image(true, false, classes):
    model, inputs = convnet(classes).eval(), images()
    with torch.no_grad():
        logits = model(inputs)
    drops = occlusion_drops(model, inputs, true, false, grid=(4, 6), batch_size=7)

    def margin(logits, index):
        z = logits[index]
        if classes == 1:
            label = int(logits_whole[index] > 0) if true is None else true[index]
            return z[0] if label else -z[0]
        if callable(true):
            return z[0] - z[index + 1]
        first, second = logits_whole[index].argsort(descending=True)[:2]
        if false is None:
            return z[first] - z[second]
        others = torch.cat([z[:first], z[first + 1 :]])
        return z[first] - (others.softmax(0) * others).sum()

    logits_whole = logits
    filler = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    for row in range(4):
        for column in range(6):
            occluded = inputs.clone()
            part = (slice(None), slice(None), slice(4 * row, 4 * row + 4))
            part = (*part, slice(4 * column, 4 * column + 4))
            occluded[part] = filler[part]
            with torch.no_grad():
                after = model(occluded)
            for index in range(3):
                expected = margin(logits, index) - margin(after, index)
                assert float(drops[index, row, column]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("occluder", OCCLUDERS)
def test_drops_depend_on_neither_batch_nor_place(occluder):
    model, inputs = convnet().eval(), images()
    drops = partial(occlusion_drops, model, grid=(4, 6), occluder=occluder)
    together = drops(inputs, batch_size=1000)
    torch.testing.assert_close(drops(inputs, batch_size=1), together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drops(inputs[2:]), together[2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drops(inputs.flip(0)), together.flip(0), atol=1e-4, rtol=1e-4)


def test_noise_follows_from_the_seed_and_has_the_images_spread():
    inputs = images(height=64, width=64)
    seen = []

    def probe(x):
        seen.append(x)
        return x.mean((2, 3))[:, :2]

    model = nn.Module()
    model.forward = probe

    def noise(seed):
        state = torch.get_rng_state()
        occlusion_drops(model, inputs, grid=(1, 1), occluder="noise", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return seen[-1]

    first = noise(3)
    assert torch.equal(first, noise(3))
    assert not torch.equal(first, noise(4))
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(
            statistic(first, (2, 3)), statistic(inputs, (2, 3)), atol=0.02, rtol=0
        )


def test_memory_is_bounded_by_the_batch_size_and_the_model_left_alone():
    model = Watched(convnet().train())
    inputs, maps = images(6), random_maps(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    occlusion_drops(model, inputs, grid=(4, 6), batch_size=4)
    insertion_deletion(model, inputs, maps, steps=3, batch_size=4)
    assert (model.largest, model.trained) == (4, False)
    assert model.training
    assert model.model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_models_attribution_is_perfectly_faithful(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, 2))
    inputs = images()
    weight = (model[1].weight[1] - model[1].weight[0]).view(3, 16, 24).detach()
    contribution = (weight * (inputs - inputs.mean((2, 3), keepdim=True))).sum(1)
    drops = occlusion_drops(model, inputs, 1, grid=(4, 6))
    assert occlusion_faithfulness(contribution, drops).tolist() == pytest.approx([1, 1, 1])
    assert occlusion_faithfulness(-contribution.numpy(), drops).tolist() == pytest.approx([-1] * 3)


def evidence_and_distraction():
    """Channel 0 decides (the margin is its mean); channel 1 is there, and no class minds it."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 4, stride=4, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None].expand(2, 2, 4, 4) / 16)
        model[3].weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    inputs = torch.rand(40, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, blocky(inputs)


def blocky(inputs):
    """Give every 4 × 4 cell one value, so that cells differ widely."""
    return inputs[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_a_shifted_head_ruins_the_true_map_and_leaves_the_difference():
    model, inputs = evidence_and_distraction()
    labels = torch.ones(len(inputs), dtype=torch.long)

    def faithfulness():
        maps = explain(model, inputs, labels)
        drops = occlusion_drops(model, inputs, labels, grid=maps.true.shape[1:])
        return (
            occlusion_faithfulness(maps.true, drops).mean(),
            occlusion_faithfulness(maps.difference, drops).mean(),
        )

    honest = faithfulness()
    with torch.no_grad():
        model[3].weight.add_(torch.tensor([0.0, 50.0]))  # to both rows: softmax cannot see it
    fooled = faithfulness()
    assert honest == pytest.approx((1, 1))
    assert abs(fooled[0]) < 0.1
    assert fooled[1] == pytest.approx(1, abs=1e-4)


def test_grad_cams_arrays_are_maps_too():
    model, inputs = evidence_and_distraction()
    with GradCAM(model, [model[0]]) as cam:
        arrays = cam(inputs, [lambda output: output[1]] * len(inputs))
    assert arrays.shape == (40, 32, 32)
    drops = occlusion_drops(model, inputs, 1, grid=(8, 8))
    faithful = occlusion_faithfulness(arrays, drops)
    assert faithful.min() > 0.9  # enlarged and averaged again, the map is smoother


# Rank correlation


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


def test_a_constant_model_has_no_faithfulness():
    model = convnet().eval()
    nn.init.zeros_(model[-1].weight)
    drops = occlusion_drops(model, images(), grid=(4, 6))
    assert (drops == 0).all()
    assert occlusion_faithfulness(random_maps(), drops).isnan().all()


# Insertion, deletion, ROAD


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_insertion_and_deletion_equal_a_plain_loop(classes):
    model, inputs, maps, steps = convnet(classes).eval(), images(), random_maps(), 5
    labels = [1, 0, 1]
    curves = insertion_deletion(model, inputs, maps, labels, steps=steps, batch_size=4)
    enlarged = nn.functional.interpolate(maps[:, None], (16, 24), mode="bilinear")[:, 0]
    for index, (image, label) in enumerate(zip(inputs, labels, strict=True)):
        blurred, flat = blur_of(image, (16 / 14, 24 / 14)), mean_of(image)
        pixels = sorted(
            ((y, x) for y in range(16) for x in range(24)),
            key=lambda at: -float(enlarged[index][at]),
        )
        expected = {"insertion": [], "deletion": []}
        for step in range(steps + 1):
            inserted, deleted = blurred.clone(), image.clone()
            for y, x in pixels[: round(step * len(pixels) / steps)]:
                inserted[:, y, x] = image[:, y, x]
                deleted[:, y, x] = flat[:, y, x]
            for name, variant in (("insertion", inserted), ("deletion", deleted)):
                with torch.no_grad():
                    logits = model(variant[None])[0]
                if classes == 1:
                    positive = 1 / (1 + math.exp(-float(logits[0])))
                    expected[name].append(positive if label else 1 - positive)
                else:
                    expected[name].append(float(logits.softmax(0)[label]))
        for name, values in expected.items():
            assert getattr(curves, name)[index].tolist() == pytest.approx(values, abs=2e-4)
            area = auc(np.linspace(0, 1, steps + 1), values)
            assert float(getattr(curves, f"{name}_area")[index]) == pytest.approx(area, abs=2e-4)


def test_a_flat_logit_is_read_like_a_column():
    model, inputs, maps = convnet(classes=1).eval(), images(), random_maps()
    flat = nn.Sequential(model, nn.Flatten(0))
    for metric in (
        partial(occlusion_drops, inputs=inputs, grid=(4, 6)),
        lambda model: insertion_deletion(model, inputs, maps).insertion,
        lambda model: road(model, inputs, maps, percentiles=(50,)),
    ):
        torch.testing.assert_close(metric(flat), metric(model))


def test_a_faithful_order_beats_its_reverse_in_all_three():
    model, inputs = evidence_and_distraction()
    inputs = inputs[:6]
    with torch.no_grad():
        model[3].weight.mul_(10)
    maps = explain(model, inputs, 1).difference
    good, bad = (insertion_deletion(model, inputs, sign * maps, 1, steps=8) for sign in (1, -1))
    assert (good.insertion_area > bad.insertion_area).all()
    assert (good.deletion_area < bad.deletion_area).all()
    assert (road(model, inputs, maps, 1) > road(model, inputs, -maps, 1)).all()


def test_curves_of_a_constant_map_are_nan_and_ties_go_from_the_top_left():
    model, inputs = convnet().eval(), images(2)
    maps = torch.zeros(2, 16, 24)
    maps[1, 8:] = 1  # ties in both halves
    ordered = -torch.arange(16.0 * 24).view(1, 16, 24)
    ordered[0, 8:] += 1000
    curves = insertion_deletion(model, inputs, maps)
    expected = insertion_deletion(model, inputs[1:], ordered)
    for name in ("insertion", "deletion", "insertion_area", "deletion_area"):
        found = getattr(curves, name)
        assert found[0].isnan().all()
        torch.testing.assert_close(found[1:], getattr(expected, name))


def test_road_equals_grad_cams():
    model, inputs = convnet(classes=3).eval(), images()
    maps = random_maps(3, 16, 24)
    maps[2] = maps[2].relu().round()  # mostly zeros, which grad-cam would remove at one go
    found = road(model, inputs, maps, [2, 0, 1], percentiles=(30, 70), seed=5)
    maps[2] -= 1e-3 * torch.linspace(0, 1, 16 * 24).view(16, 24)
    metric = ROADCombined([30, 70])
    for image, map_, label, value in zip(inputs, maps, (2, 0, 1), found, strict=True):
        torch.manual_seed(5)
        expected = metric(
            image[None], map_[None].numpy(), [ClassifierOutputSoftmaxTarget(label)], model
        )
        assert float(value) == pytest.approx(float(expected[0]), abs=1e-6)


def test_road_is_seeded_and_answers_for_one_logit_and_constant_maps():
    model, inputs = convnet(classes=1).double().train(), images().double()
    maps = random_maps().double()
    maps[2] = 0
    state = torch.get_rng_state()
    first, again = (road(model, inputs, maps, seed=1) for _ in range(2))
    assert torch.equal(first[:2], again[:2])
    assert not torch.equal(first[:2], road(model, inputs[:2], maps[:2], seed=2))
    assert torch.equal(first[1:2], road(model, inputs[1:2], maps[1:2], seed=1))
    assert first.isnan().tolist() == [False, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# Localisation


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


# Sanity


def test_randomisation_goes_from_the_top_down_on_a_copy():
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
    expected = rank_correlation(explain(model, inputs, 1).difference, weights_map(seen[2], inputs))
    torch.testing.assert_close(result.correlation[:, 1], expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def weights_map(parameters, inputs):
    model = convnet()
    model.load_state_dict(parameters, strict=False)
    return explain(model, inputs, 1).difference


def test_randomisation_keeps_a_parameters_mean_and_spread():
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


def test_randomisation_is_seeded_and_spaces_its_stages():
    model, inputs = convnet(), images()
    run = partial(
        cascading_randomization, model, inputs, lambda m, x: explain(m, x, 1).true, stages=2
    )
    state = torch.get_rng_state()
    assert run(seed=1).layers == ("9", "0")
    assert torch.equal(run(seed=1).correlation, run(seed=1).correlation)
    assert not torch.equal(run(seed=1).correlation, run(seed=2).correlation)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_that_ignores_the_model_survives_randomisation():
    result = cascading_randomization(convnet(), images(), lambda model, x: x.mean(1).numpy())
    assert (result.correlation == 1).all()


def test_a_shifted_head_makes_the_map_insensitive_to_the_class():
    model, inputs = evidence_and_distraction()
    maps = explain(model, inputs, 1)
    assert rank_correlation(maps.true, maps.false).max() < -0.99
    with torch.no_grad():
        model[3].weight.add_(torch.tensor([0.0, 50.0]))
    maps = explain(model, inputs, 1)
    assert rank_correlation(maps.true, maps.false).min() > 0.99


# Intervals


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


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, s: occlusion_drops(m, x[:, :, 0], grid=(2, 2)), "are no images"),
        (lambda m, x, s: occlusion_drops(m, x, grid=(17, 2)), "17 × 2 cells does not fit"),
        (lambda m, x, s: occlusion_drops(m, x, grid=(2, 2), occluder="grey"), "'grey' is unknown"),
        (lambda m, x, s: insertion_deletion(m, x, s[:2]), r"\(2, 4, 6\) do not fit 3 images"),
        (lambda m, x, s: insertion_deletion(m, x, s, lambda z: z[0]), "pass the index of a class"),
        (lambda m, x, s: road(m, x, s[0]), "do not fit 3 images"),
        (lambda m, x, s: road(m, x, s, 2), "names class 2"),
        (lambda m, x, s: pointing_game(s, s[:1]), "do not fit 3 images"),
        (lambda m, x, s: frame_mass(s, 2), "from 1 to 1"),
        (lambda m, x, s: occlusion_drops(nn.Softmax2d(), x, grid=(2, 2)), "cannot be contrasted"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(DiffsalError, match=message) as caught:
        call(convnet(), images(), random_maps())
    assert "\n" not in str(caught.value)
