"""Invariant 7: CPU and GPU agree. Skipped where there is no GPU."""

import copy

import numpy as np
import pytest
import torch
from torchvision.models import get_model

from diffsal import DifferenceCAM, capture, explain
from diffsal.data.preprocessing import Preprocessing
from diffsal.training.losses import LOSSES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def twins(name):
    model = get_model(name, num_classes=2).eval()
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "efficientnet_b0", "swin_t"])
def test_maps_agree(name):
    on_cpu, on_gpu = twins(name)
    inputs = torch.randn(4, 3, 96, 96)
    expected = explain(on_cpu, inputs, true=[0, 1, 1, 0])
    maps = explain(on_gpu, inputs.cuda(), true=torch.tensor([0, 1, 1, 0]).cuda())
    assert maps.true.is_cuda
    scale = expected.difference.abs().max()
    for field in ("true", "false", "difference", "margin"):
        ours, theirs = getattr(maps, field).cpu(), getattr(expected, field)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(1e-4 * scale))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_losses_and_gradients_agree(loss, classifier):
    model = classifier("resnet18", num_classes=2)  # float64, with no unit just at its ReLU's kink
    models = model, copy.deepcopy(model).cuda()
    inputs, labels = torch.randn(4, 3, 96, 96).double(), torch.tensor([0, 1, 1, 0])
    human = torch.rand(4, 9, 9)
    gradients = []
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        with capture(model) as captured:
            logits = model(inputs.to(device))
            maps = captured.maps(logits, true=labels.to(device))
            value = LOSSES[loss]()(maps, human.to(device))
        value.backward()
        gradients.append([value.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(1e-6 * theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    on_cpu, on_gpu = twins("resnet18")
    inputs = torch.randn(4, 3, 96, 96)
    expected = explain(on_cpu, inputs, true=1).difference
    with torch.autocast("cuda", dtype):
        autocast = explain(on_gpu, inputs.cuda(), true=1).difference
    half = explain(on_gpu.to(dtype), inputs.cuda().to(dtype), true=1).difference
    tolerance = 0.1 * float(expected.abs().max())
    for maps in (autocast, half):
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps.cpu(), expected, rtol=0.1, atol=tolerance)


def test_a_class_out_of_range_is_refused_before_it_reaches_the_gpu():
    _, model = twins("resnet18")
    with (
        DifferenceCAM(model) as cam,
        pytest.raises(Exception, match="names class 2"),
    ):
        cam.maps(torch.randn(2, 3, 64, 64), true=torch.tensor([0, 2]).cuda())


def test_heatmaps_are_in_memory_of_their_own():
    on_cpu, on_gpu = twins("resnet18")
    first, second = torch.randn(2, 3, 96, 96), torch.randn(2, 3, 96, 96)
    with DifferenceCAM(on_cpu) as cam:
        expected = [cam(first), cam(second)]
    with DifferenceCAM(on_gpu) as cam:
        heatmaps = [cam(first), cam(second)]  # the second in the memory of the first, if it were so
    for ours, theirs in zip(heatmaps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_pixels_are_normalised_to_the_same_bits():
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    preprocessing = Preprocessing()
    assert torch.equal(
        preprocessing.normalized(pixels.cuda()).cpu(), preprocessing.normalized(pixels)
    )
