"""Norms behind the pooling: with their scale held fixed, maps add up; nothing else changes."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from diffsal.maps.salience import capture, explain


class RootMeanSquare(nn.Module):
    """As language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (x * scale)


RootMeanSquareNorm = type("RootMeanSquareNorm", (RootMeanSquare,), {})


class Net(nn.Module):
    def __init__(self, norm: nn.Module, keeps_axes: bool = False, hidden: bool = False) -> None:
        super().__init__()
        self.features, self.norm, self.keeps_axes = nn.Conv2d(3, 8, 3, 2), norm, keeps_axes
        self.fc = nn.Linear(8, 2)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) if hidden else nn.Identity()
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if "norm" in type(module).__name__.lower():
                    nn.init.uniform_(parameter, 0.5, 1.5) if name == "weight" else nn.init.normal_(
                        parameter
                    )

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x).mean((2, 3), keepdim=self.keeps_axes)
        return self.fc(self.hidden(self.norm(pooled).flatten(1)))


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(8), False, "centred"),
    "without weights": (lambda: nn.LayerNorm(8, elementwise_affine=False), False, "centred"),
    "LayerNorm2d": (lambda: models.convnext.LayerNorm2d(8), True, "centred"),
    "GroupNorm, one": (lambda: nn.GroupNorm(1, 8), True, "centred"),
    "GroupNorm, four": (lambda: nn.GroupNorm(4, 8), False, "groups"),
    "RMSNorm": (lambda: nn.RMSNorm(8), False, "raw"),
    "own RMSNorm": (lambda: RootMeanSquareNorm(8), False, "raw"),
}
IMAGES = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(case: str, **options: bool) -> Net:
    torch.manual_seed(0)
    make, keeps_axes, _ = NORMS[case]
    return Net(make(), keeps_axes, **options).double().eval()


def closed_form(model: Net, kind: str, images: Tensor) -> Tensor:
    """(B, h, w): the norm written out, with its scale as a factor of each channel."""
    features = model.features(images)
    pooled = features.mean((2, 3))
    groups = {"centred": 1, "groups": 4, "raw": 8}[kind]
    centred = pooled.unflatten(1, (groups, -1))
    if kind != "raw":
        centred = centred - centred.mean(2, keepdim=True)
    else:
        centred = pooled.unflatten(1, (1, -1))
    eps = getattr(model.norm, "eps", None) or getattr(model.norm, "variance_epsilon", None)
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    scale = (centred.square().mean(2, keepdim=True) + eps).rsqrt().expand_as(centred).flatten(1)
    weight = getattr(model.norm, "weight", None)
    scale = scale if weight is None else scale * weight
    vector = (model.fc.weight[1] - model.fc.weight[0]) * scale  # (B, C)
    if kind != "raw":
        grouped = vector.unflatten(1, (groups, -1))
        vector = (grouped - grouped.mean(2, keepdim=True)).flatten(1)
    return (features * vector[:, :, None, None]).sum(1) / features[0, 0].numel()


@pytest.mark.parametrize("case", NORMS)
def test_maps_are_the_closed_form_and_add_up(case: str) -> None:
    model = net(case)
    maps = explain(model, IMAGES, true=1)
    torch.testing.assert_close(maps.difference, closed_form(model, NORMS[case][2], IMAGES).detach())
    bias = model.fc.bias[1] - model.fc.bias[0]
    if getattr(model.norm, "bias", None) is not None:
        bias = bias + (model.fc.weight[1] - model.fc.weight[0]) @ model.norm.bias
    torch.testing.assert_close(maps.residual, bias.detach().expand(4))


@pytest.mark.parametrize("case", NORMS)
def test_plain_first_order_sums_to_zero(case: str) -> None:
    maps = explain(net(case), IMAGES, true=1, fixed_statistics=False)
    assert maps.difference.flatten(1).sum(1).abs().max() < 0.05 * maps.margin.abs().max()


@pytest.mark.parametrize("case", NORMS)
def test_training_differentiates_the_closed_form(case: str) -> None:
    model = net(case).train()
    found, expected = [], []
    for gradients, make in ((found, None), (expected, NORMS[case][2])):
        model.zero_grad()
        if make is None:
            with capture(model, example=IMAGES) as captured:
                difference = captured.maps(model(IMAGES), true=1).difference
        else:
            difference = closed_form(model, make, IMAGES)
        difference.pow(3).sum().backward()
        gradients += [parameter.grad for parameter in model.parameters()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(()).double() if one is None else one,
            torch.zeros(()).double() if other is None else other,
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("case", NORMS)
def test_logits_and_their_gradients_stay(case: str) -> None:
    model = net(case).train()
    gradients = []
    for captures in (False, True):
        model.zero_grad()
        if captures:
            with capture(model, example=IMAGES) as captured:
                logits = model(IMAGES)
                captured.maps(logits, true=1)
        else:
            logits = model(IMAGES)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_norms_in_a_row() -> None:
    model = net("LayerNorm", hidden=True)
    residual = explain(model, IMAGES, true=1).residual
    assert residual.std() > 1e-3  # the inner bias is scaled by the outer norm
    with torch.no_grad():
        model.norm.bias.zero_(), model.hidden[0].bias.zero_()
    assert explain(model, IMAGES, true=1).residual.std() < 1e-12


def test_norms_over_space_are_left_alone() -> None:
    """Only what is pooled is held: the rest is where it was."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    model.double().eval()
    held, plain = (
        explain(model, IMAGES, 1, target_layers="0", fixed_statistics=fixed)
        for fixed in (True, False)
    )
    assert torch.equal(held.difference, plain.difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model = net("LayerNorm").float()
    images = IMAGES.float()
    exact = explain(model, images, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        maps = explain(model, images, 1)
    torch.testing.assert_close(maps.difference, exact.difference, rtol=0.05, atol=0.01)


def test_what_is_behind_a_norm_may_work_in_place() -> None:
    torch.manual_seed(0)
    head = nn.LayerNorm(8), nn.Hardswish(inplace=True), nn.Linear(8, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
    assert explain(model.double(), IMAGES, 1).difference.isfinite().all()
