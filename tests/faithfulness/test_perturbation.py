"""Every number against an independent computation: captum, scipy, grad-cam, or a plain loop."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy import ndimage
from sklearn.metrics import auc
from torch import nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.perturbation import (
    insertion_deletion,
    occlusion_drops,
    occlusion_faithfulness,
    road,
)
from diffsal.maps.salience import explain

OCCLUDERS = ["mean", "blur", "noise"]


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


def margin_loop(model, image, true, false):
    with torch.no_grad():
        logits = model(image[None])[0]
    return float(logits[true] - logits[false])


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)])  # 16 × 24 pixels: even and uneven
@pytest.mark.parametrize("occluder", ["mean", "blur"])
def test_occlusion_drops_equal_a_plain_loop(convnet, images, occluder, grid):
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


def test_occlusion_drops_equal_captums(convnet, images):
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
def test_classes_are_settled_on_the_untouched_image(convnet, images, true, false, classes):
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
def test_drops_depend_on_neither_batch_nor_place(convnet, images, occluder):
    model, inputs = convnet().eval(), images()
    drops = partial(occlusion_drops, model, grid=(4, 6), occluder=occluder)
    together = drops(inputs, batch_size=1000)
    torch.testing.assert_close(drops(inputs, batch_size=1), together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drops(inputs[2:]), together[2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drops(inputs.flip(0)), together.flip(0), atol=1e-4, rtol=1e-4)


def test_noise_follows_from_the_seed_and_has_the_images_spread(images):
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


def test_memory_is_bounded_by_the_batch_size_and_the_model_left_alone(convnet, images):
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
def test_a_linear_models_attribution_is_perfectly_faithful(images, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, 2))
    inputs = images()
    weight = (model[1].weight[1] - model[1].weight[0]).view(3, 16, 24).detach()
    contribution = (weight * (inputs - inputs.mean((2, 3), keepdim=True))).sum(1)
    drops = occlusion_drops(model, inputs, 1, grid=(4, 6))
    assert occlusion_faithfulness(contribution, drops).tolist() == pytest.approx([1, 1, 1])
    assert occlusion_faithfulness(-contribution.numpy(), drops).tolist() == pytest.approx([-1] * 3)


def test_a_shifted_head_ruins_the_true_map_and_leaves_the_difference(evidence_and_distraction):
    model, inputs = evidence_and_distraction
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


def test_grad_cams_arrays_are_maps_too(evidence_and_distraction):
    model, inputs = evidence_and_distraction
    with GradCAM(model, [model[0]]) as cam:
        arrays = cam(inputs, [lambda output: output[1]] * len(inputs))
    assert arrays.shape == (40, 32, 32)
    drops = occlusion_drops(model, inputs, 1, grid=(8, 8))
    faithful = occlusion_faithfulness(arrays, drops)
    assert faithful.min() > 0.9  # enlarged and averaged again, the map is smoother


def test_a_constant_model_has_no_faithfulness(convnet, images):
    model = convnet().eval()
    nn.init.zeros_(model[-1].weight)
    drops = occlusion_drops(model, images(), grid=(4, 6))
    assert (drops == 0).all()
    assert occlusion_faithfulness(random_maps(), drops).isnan().all()


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_insertion_and_deletion_equal_a_plain_loop(convnet, images, classes):
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


def test_a_flat_logit_is_read_like_a_column(convnet, images):
    model, inputs, maps = convnet(classes=1).eval(), images(), random_maps()
    flat = nn.Sequential(model, nn.Flatten(0))
    for metric in (
        partial(occlusion_drops, inputs=inputs, grid=(4, 6)),
        lambda model: insertion_deletion(model, inputs, maps).insertion,
        lambda model: road(model, inputs, maps, percentiles=(50,)),
    ):
        torch.testing.assert_close(metric(flat), metric(model))


def test_a_faithful_order_beats_its_reverse_in_all_three(evidence_and_distraction):
    model, inputs = evidence_and_distraction
    inputs = inputs[:6]
    with torch.no_grad():
        model[3].weight.mul_(10)
    maps = explain(model, inputs, 1).difference
    good, bad = (insertion_deletion(model, inputs, sign * maps, 1, steps=8) for sign in (1, -1))
    assert (good.insertion_area > bad.insertion_area).all()
    assert (good.deletion_area < bad.deletion_area).all()
    assert (road(model, inputs, maps, 1) > road(model, inputs, -maps, 1)).all()


def test_curves_of_a_constant_map_are_nan_and_ties_go_from_the_top_left(convnet, images):
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


def test_road_equals_grad_cams(convnet, images):
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


def test_road_is_seeded_and_answers_for_one_logit_and_constant_maps(convnet, images):
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
        (lambda m, x, s: occlusion_drops(nn.Softmax2d(), x, grid=(2, 2)), "cannot be contrasted"),
    ],
)
def test_errors_say_what_to_do(convnet, images, call, message):
    with pytest.raises(DiffsalError, match=message) as caught:
        call(convnet(), images(), random_maps())
    assert "\n" not in str(caught.value)
