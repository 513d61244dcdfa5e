"""``DifferenceCAM`` against grad-cam itself: parity (invariant 8), targets, smoothing, metrics."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_grad_cam import FinerCAM, GradCAM, HiResCAM, XGradCAM
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.image import scale_cam_image, show_cam_on_image
from pytorch_grad_cam.utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    SoftmaxOutputTarget,
)
from pytorch_grad_cam.utils.reshape_transforms import vit_reshape_transform
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from diffsal import DifferenceCAM, DiffsalError
from diffsal.data.preprocessing import Preprocessing


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet18(num_classes=2).eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 3, 96, 80)


def network(outputs):
    torch.manual_seed(2)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)).eval()


def rectified(maps, size):
    """What grad-cam makes of a raw map (B, h, w): ReLU, min-max, resize, min-max."""
    return scale_cam_image(scale_cam_image(np.maximum(maps.numpy(), 0), size[::-1]))


# Parity with grad-cam


@pytest.mark.parametrize("margin", [0.1, 1.0, 10.0])
def test_rectified_difference_is_finer_cam_at_small_margins(model, x, margin):
    scale_margin(model, x, margin)
    with FinerCAM(model, [model.layer4], base_method=HiResCAM) as finer:
        theirs = finer(x, alpha=1)
    with DifferenceCAM(model, [model.layer4]) as cam:
        ours = rectified(cam.maps(x).difference, x.shape[2:])
    np.testing.assert_allclose(ours, theirs, atol=2e-3 if margin == 10 else 2e-5)


def test_finer_cam_inverts_at_large_margins_and_ours_does_not(x):
    model = network(outputs=2)
    small, large, vanished = (finer_and_ours(model, x, margin) for margin in (1.0, 22.0, 120.0))
    for (_, ours), (_, expected) in zip((large, vanished), (small, small), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    correlation = np.corrcoef(large[0].ravel(), large[1].ravel())[0, 1]
    assert correlation < 0  # its denominator's gradient turns the map over
    assert np.allclose(vanished[0], 0)


def scale_margin(model, x, margin):
    with torch.no_grad():
        logits = model(x)
        factor = margin / (logits[0, 0] - logits[0, 1]).abs()
        for parameter in list(model.parameters())[-2:]:
            parameter.mul_(factor)


def finer_and_ours(model, x, margin):
    scale_margin(model, x, margin)
    with FinerCAM(model, [model[2]], base_method=HiResCAM) as finer:
        theirs = finer(x[:1], alpha=1)
    with DifferenceCAM(model, [model[2]]) as cam:
        return theirs, rectified(cam.maps(x[:1]).difference, x.shape[2:])


@pytest.mark.parametrize(
    ("weighting", "theirs"),
    [("elementwise", HiResCAM), ("channel_mean", GradCAM), ("xgrad", XGradCAM)],
)
def test_true_maps_are_grad_cams_before_its_relu(model, x, weighting, theirs):
    layer = model.layer3  # not pooled-linear, so that the weightings differ
    labels = [0, 1, 1]
    with theirs(model, [layer]) as cam:
        cam.compute_cam_per_layer = lambda inputs, targets, eigen: raw(cam, inputs, targets)
        cam.aggregate_multi_layers = lambda maps: maps
        expected = cam(x, [ClassifierOutputTarget(label) for label in labels])
    with DifferenceCAM(model, [layer], weighting=weighting) as ours:
        maps = ours.maps(x, true=labels)
    np.testing.assert_allclose(maps.true.numpy(), expected, rtol=1e-3, atol=1e-5)


def raw(cam, inputs, targets):
    activations, gradients = (
        recorded[0].numpy()
        for recorded in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
    )
    return cam.get_cam_image(inputs, cam.target_layers[0], targets, activations, gradients, False)


def test_eigen_smooth_is_grad_cams_projection_signed_as_the_difference(model, x):
    recorded = {}
    handle = model.layer4.register_forward_hook(lambda *args: recorded.update(A=args[2].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    weight = (model.fc.weight[1] - model.fc.weight[0]).detach()[None, :, None, None]
    contributions = recorded["A"] * weight
    expected = get_2d_projection(contributions.numpy())
    difference = contributions.sum(1)
    agrees = (expected * (difference - difference.mean((1, 2), keepdim=True)).numpy()).sum((1, 2))
    expected *= np.sign(agrees)[:, None, None]
    with DifferenceCAM(model, [model.layer4]) as cam:
        ours = cam(x, [ClassifierOutputTarget(1)] * 3, eigen_smooth=True)
    size = x.shape[2:]
    resized = np.stack([cv2.resize(one, size[::-1]) for one in expected])
    np.testing.assert_allclose(ours, scale_cam_image(resized), atol=1e-4)


# The drop-in contract


def test_heatmap_is_equation_1(model, x):
    with DifferenceCAM(model, [model.layer4]) as cam:
        heatmap = cam(input_tensor=x, targets=None)
        maps = cam.maps(x)
    assert heatmap.shape == (3, 96, 80)
    assert heatmap.dtype == np.float32
    difference = (maps.true - maps.false).numpy()
    resized = np.stack([cv2.resize(one, (80, 96)) for one in difference])
    low, high = resized.min((1, 2), keepdims=True), resized.max((1, 2), keepdims=True)
    np.testing.assert_allclose(heatmap, (resized - low) / (high - low), atol=1e-4)
    image = np.random.default_rng(0).random((96, 80, 3), np.float32)
    assert show_cam_on_image(image, heatmap[0], use_rgb=True).shape == (96, 80, 3)


def test_metrics_of_grad_cam_take_its_heatmaps(model, x):
    targets = [ClassifierOutputTarget(1)] * 3
    with DifferenceCAM(model, [model.layer4]) as cam:
        heatmaps = cam(x, targets)
    for metric in (ROADCombined(percentiles=[50]), DropInConfidence(), IncreaseInConfidence()):
        scores = metric(x, heatmaps, targets, model)
        assert scores.shape == (3,)
        assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    "target", [ClassifierOutputTarget, ClassifierOutputSoftmaxTarget, ClassifierOutputReST]
)
def test_class_and_softmax_targets_name_the_true_class(model, x, target):
    with DifferenceCAM(model, [model.layer4]) as cam:
        np.testing.assert_array_equal(
            cam(x, [target(label) for label in (1, 0, 1)]),
            cam(x, [ClassifierOutputTarget(label) for label in (1, 0, 1)]),
        )
        ones, zeros = (cam(x, [target(label)] * 3) for label in (1, 0))
    np.testing.assert_allclose(ones + zeros, 1, atol=1e-5)


def test_binary_targets_name_the_class_of_one_logit(x):
    model = network(outputs=1)
    with DifferenceCAM(model) as cam:
        positive, negative = (cam(x, [BinaryClassifierOutputTarget(c)] * 3) for c in (1, 0))
        maps = cam.maps(x, true=1)
    np.testing.assert_allclose(positive + negative, 1, atol=1e-5)
    torch.testing.assert_close(maps.margin[:, None], maps.logits)


def test_a_callable_target_is_contrasted_with_what_false_names(x):
    model = network(outputs=4)
    fourth = lambda output: output[3]  # noqa: E731
    with DifferenceCAM(model) as cam:
        expected = cam.maps(x, true=3, false=1).difference
        torch.testing.assert_close(cam.maps(x, true=fourth, false=1).difference, expected)
        by_call = cam(x[:1], [fourth], false=1)
        with pytest.raises(DiffsalError, match="name false="):
            cam(x, [fourth] * 3)
    with DifferenceCAM(model, false=lambda output: output[1]) as cam:
        np.testing.assert_allclose(cam(x[:1], [fourth]), by_call, atol=1e-6)


def test_classes_are_chosen_once_before_augmentation(x):
    model = network(outputs=2)
    with torch.no_grad():  # the sign of this logit changes with the brightness of the input
        model[5].weight.zero_()[1, 0] = 1.0
        value = model(x)[:, 1]
        model[5].bias[1] = -value.mean() * 0.97
    with DifferenceCAM(model) as cam:
        predicted = [ClassifierOutputTarget(int(c)) for c in model.eval()(x).argmax(1)]
        np.testing.assert_array_equal(cam(x, aug_smooth=True), cam(x, predicted, aug_smooth=True))


def test_augmentation_smoothing_averages_raw_maps(model, x):
    with DifferenceCAM(model, [model.layer4]) as cam:
        targets = [ClassifierOutputTarget(0)] * 3
        total = 0
        for flipped in (False, True):
            for factor in (0.9, 1.0, 1.1):
                inputs = (x.flip(3) if flipped else x) * factor
                raw = cam.maps(inputs, true=0).difference.numpy()
                resized = np.stack([cv2.resize(one, (80, 96)) for one in raw])
                total = total + (resized[:, :, ::-1] if flipped else resized)
        np.testing.assert_allclose(
            cam(x, targets, aug_smooth=True), scale_cam_image(total), atol=1e-4
        )


def test_reshape_transform_of_grad_cam_and_our_own_agree():
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=2,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    x = torch.randn(2, 3, 32, 32)
    layer = model.encoder.layers[-1].ln_1
    theirs = lambda output: vit_reshape_transform(output, height=4, width=4)  # noqa: E731
    with DifferenceCAM(model) as found, DifferenceCAM(model, [layer], theirs) as given:
        assert found.target_layers == [layer]
        np.testing.assert_array_equal(given(x), found(x))
        assert given(x).std() > 0


def test_volumes(x):
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with DifferenceCAM(model) as cam:
        assert cam(torch.randn(2, 1, 9, 17, 11)).shape == (2, 9, 17, 11)


# What it refuses, and what it leaves behind


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (2, [ClassifierOutputTarget(0)] * 2, "2 targets for a batch of 3"),
        (2, [ClassifierOutputTarget(0)] * 4, "4 targets for a batch of 3"),
        (2, ClassifierOutputTarget(0), "pass a list"),
        (2, [ClassifierOutputTarget(2)] * 3, "names class 2"),
        (2, [ClassifierOutputTarget(-1)] * 3, "names class -1"),
        (2, [BinaryClassifierOutputTarget(1)] * 3, "is for one logit"),
        (1, [ClassifierOutputTarget(0)] * 3, "use BinaryClassifierOutputTarget"),
    ],
)
def test_unfit_targets_are_refused(x, outputs, targets, message):
    with DifferenceCAM(network(outputs)) as cam, pytest.raises(DiffsalError, match=message):
        cam(x, targets)


def test_a_target_that_is_no_number_is_refused(x):
    with (
        DifferenceCAM(network(3), false="rest") as cam,
        pytest.raises(DiffsalError, match="single number"),
    ):
        cam(x, [SoftmaxOutputTarget()] * 3)


def test_no_exception_is_swallowed(model):
    with pytest.raises(IndexError), DifferenceCAM(model, [model.layer4]):
        [][0]


def test_a_foreign_layer_and_a_model_without_parameters_are_refused(model):
    with pytest.raises(DiffsalError, match="not part of the model"):
        DifferenceCAM(model, [nn.ReLU()])
    with pytest.raises(DiffsalError, match="no parameters"):
        DifferenceCAM(nn.Flatten())


def test_the_model_is_left_as_it_was(model, x):
    model.train()
    model.layer1.eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    with DifferenceCAM(model, [model.layer4]) as cam:
        cam(x, aug_smooth=True)
        with pytest.raises(DiffsalError):
            cam(x, [])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_images_go_where_tensors_do(model, tmp_path):
    preprocessing = Preprocessing(size=(64, 64))
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    cam = DifferenceCAM(model, preprocessing=preprocessing)
    inputs = torch.stack([preprocessing(image) for image in images])
    expected = cam.maps(inputs, true=[0, 1]).difference
    forms = (list(images), files, [Image.fromarray(one) for one in images], [str(f) for f in files])
    for form in forms:
        assert torch.equal(cam.maps(form, true=[0, 1]).difference, expected)
    one = cam.maps(files[0], true=0).difference
    torch.testing.assert_close(one[0], expected[0], rtol=1e-4, atol=1e-5)
    classes = [ClassifierOutputTarget(0), ClassifierOutputTarget(1)]
    np.testing.assert_array_equal(cam(files, targets=classes), cam(inputs, targets=classes))


def test_images_without_preprocessing_are_one_line(model, refused):
    with refused("the input is a str: pass a tensor, or preprocessing="):
        DifferenceCAM(model).maps("image.png")
    with refused("the list of images is empty"):
        DifferenceCAM(model, preprocessing=Preprocessing()).maps([])
    with refused("missing.png"):
        DifferenceCAM(model, preprocessing=Preprocessing()).maps(["missing.png"])
