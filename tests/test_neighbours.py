"""What docs/coming-from.md says of other libraries holds."""

import pytest
import torch
from torchvision.models import resnet18

import diffsal


@pytest.mark.parametrize("layer", ["layer4", "layer3"])
def test_channel_mean_maps_are_captums_layer_grad_cam(layer):
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = resnet18(num_classes=2).eval()
    images = torch.rand(2, 3, 64, 64)
    own = diffsal.explain(model, images, true=1, target_layers=layer, weighting="channel_mean")
    theirs = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(images, target=1)
    torch.testing.assert_close(own.true, theirs[:, 0].detach(), rtol=1e-4, atol=1e-6)


def test_captum_draws_the_difference():
    visualization = pytest.importorskip("captum.attr").visualization
    torch.manual_seed(0)
    images = torch.rand(1, 3, 64, 64)
    maps = diffsal.explain(resnet18(num_classes=2).eval(), images).resized((64, 64))
    figure, _ = visualization.visualize_image_attr(
        maps.difference[0, ..., None].numpy(),
        images[0].permute(1, 2, 0).numpy(),
        method="blended_heat_map",
        sign="all",
        use_pyplot=False,
    )
    assert figure.axes
