"""Models as people write them: the layer that all of the decision passes through, or a refusal.

Each case says what is right by its own means: that the maps add up to the margin but for what the
head adds whatever the image shows, and that they change where the image does.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffsal.errors import DiffsalError
from diffsal.maps.difference_cam import DifferenceCAM
from diffsal.maps.salience import capture, explain
from diffsal.maps.target_layers import find_target_layer


def backbone(channels: int = 3, width: int = 6) -> nn.Sequential:
    """(B, channels, 32, 32) to (B, width, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.ReLU(),
    )


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = backbone()
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class ReverseRegistration(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.first = backbone()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.first(x)).mean((2, 3)))


class PoolsInTheContainer(nn.Module):
    """As pytorchcv does: a pooling of fixed size, and a convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(backbone(), nn.AvgPool2d(8))
        self.output = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x)).flatten(1)


class LeavesTheGrid(nn.Module):
    """(B, 2, 1, 1) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = backbone()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class GeM(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


class GeMPooling(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.pool = GeM()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)))


class AttentionPooling(Plain):
    """The weights of the cells come from a 1×1 convolution, which runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        weights = self.attention(features).flatten(2).softmax(2)
        return self.fc((features.flatten(2) * weights).sum(2))


class SqueezeExcitation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.squeeze(x))


class GateBehindTheBackbone(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.gate = SqueezeExcitation(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gate(self.features(x)).mean((2, 3)))


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour, self.edges = backbone(), backbone(3, 4)
        self.fc = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        streams = self.colour(x), self.edges(x - F.avg_pool2d(x, 3, 1, 1))
        return self.fc(torch.cat([one.mean((2, 3)) for one in streams], 1))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([Plain(), Plain(), Plain()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


class UNetWithClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, 2, 1)
        self.bottom = nn.Conv2d(4, 6, 3, 2, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.fuse = nn.Conv2d(8, 5, 3, padding=1)
        self.classifier = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x).relu()
        coarse = self.bottom(fine).relu()
        return self.classifier(self.fuse(torch.cat([fine, self.up(coarse)], 1)).mean((2, 3)))


class TeacherBeside(Plain):
    """A second network runs, is registered last, and has no part in the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Plain()

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.guidance = self.teacher(x).detach()
        return logits


class TupleOutput(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.features(x)
        return self.fc(features.mean((2, 3))), features


class DictOutput(Plain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        pooled = self.features(x).mean((2, 3))
        return {"embedding": pooled, "logits": self.fc(pooled)}


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


class NormalisationInFront(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.normalise, self.inner = Normalise(), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.normalise(x))


class TupleOfFeatures(nn.Module):
    """The backbone returns a list of its stages."""

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = backbone()

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.stem(x)
            return [fine, fine[:, :, ::2, ::2] + 1]

    def __init__(self) -> None:
        super().__init__()
        self.stages = self.Stages()
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x)[-1].mean((2, 3)))


class OneActivation(nn.Module):
    """The same module runs behind every convolution, the last feature map included."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.first, self.last = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.last(self.act(self.first(x)))).mean((2, 3)))


class PoolsBesideItsFeatures(nn.Module):
    """As transformers' base models: features are returned with what was pooled from them."""

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = backbone()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = self.encoder(x)
            return {"last_hidden_state": features, "pooler_output": features.mean((2, 3))}

    def __init__(self) -> None:
        super().__init__()
        self.base, self.fc = self.Base(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.base(x)["pooler_output"])


class StagesOfTokens(nn.Module):
    """As LeViT and Hiera: stages of linear layers and norms, which look like a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.stages = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.stages(self.stem(x).flatten(2).mT)
        logits: Tensor = self.fc(self.norm(tokens.mean(1)))
        return logits


class ChannelsLast(nn.Module):
    """As MambaOut: the container returns (B, h, w, C), with as many channels as cells a side."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.stem(x).permute(0, 2, 3, 1)).relu()

    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = ChannelsLast.Features(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).mean((1, 2)))
        return logits


class LayerNormAct(nn.LayerNorm):
    """As timm's LayerNormAct2d: a LayerNorm by class, and yet it takes channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()


class NormOfChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), LayerNormAct(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.stem(x)).mean((2, 3)))
        return logits


CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "reverse registration": (ReverseRegistration, "last", (8, 8)),
    "pools in the container": (PoolsInTheContainer, "features.0", (8, 8)),
    "logits on a grid of one cell": (LeavesTheGrid, "features", (8, 8)),
    "gate behind the backbone": (GateBehindTheBackbone, "gate", (8, 8)),
    "two streams": (TwoStreams, "colour + edges", (8, 8)),
    "ensemble": (
        Ensemble,
        "members.0.features + members.1.features + members.2.features",
        (8, 8),
    ),
    "U-Net with classifier": (UNetWithClassifier, "fuse", (16, 16)),
    "teacher beside the model": (TeacherBeside, "features", (8, 8)),
    "tuple output": (TupleOutput, "features", (8, 8)),
    "dict output": (DictOutput, "features", (8, 8)),
    "normalisation in front": (lambda: NormalisationInFront(Plain()), "inner.features", (8, 8)),
    "normalisation in front of an ensemble": (
        lambda: NormalisationInFront(Ensemble()),
        "inner.members.0.features + inner.members.1.features + inner.members.2.features",
        (8, 8),
    ),
    "one activation everywhere": (OneActivation, "act#2", (8, 8)),
    "pools beside its features": (PoolsBesideItsFeatures, "base.encoder", (8, 8)),
    "stages of tokens": (StagesOfTokens, "stages", (8, 8)),
    "channels last": (ChannelsLast, "features", (8, 8)),
    "norm of channels first": (NormOfChannelsFirst, "norm", (8, 8)),
    "list of features": (TupleOfFeatures, "stages", (4, 4)),
}
# To first order only: the gradient through the pooling's own weights is part of the map.
NONLINEAR = {
    "GeM pooling": (GeMPooling, "features", (8, 8)),
    "attention pooling": (AttentionPooling, "features", (8, 8)),
}


def images(seed: int = 0) -> Tensor:
    return torch.rand(
        3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("case", [*CASES, *NONLINEAR])
def test_layer_and_grid(case: str) -> None:
    make, name, grid = {**CASES, **NONLINEAR}[case]
    model = make().double().eval()
    assert str(find_target_layer(model, images())) == name
    assert explain(model, images()).difference.shape[1:] == grid


@pytest.mark.parametrize("case", CASES)
def test_maps_add_up_but_for_what_no_image_changes(case: str) -> None:
    model = CASES[case][0]().double().eval()
    with DifferenceCAM(model, example=images()) as cam:
        residual = torch.cat([cam.maps(images(seed), true=1).residual for seed in range(3)])
    assert residual.std() <= 1e-12
    assert cam.maps(images(), true=1).margin.std() > 1e-6


@pytest.mark.parametrize("case", [*CASES, *NONLINEAR])
def test_maps_change_where_the_image_does(case: str) -> None:
    """Pixels in one corner change; the opposite one's evidence stays, or moves least."""
    model = {**CASES, **NONLINEAR}[case][0]().double().eval()
    changed = images()
    changed[:, :, :8, 24:] = 1 - changed[:, :, :8, 24:]
    moved = (explain(model, changed, 1).difference - explain(model, images(), 1).difference).abs()
    side = moved.shape[1] // 2
    quarters = {
        "changed": moved[:, :side, side:].sum(),
        "others": torch.stack(
            [
                moved[:, :side, :side].sum(),
                moved[:, side:, :side].sum(),
                moved[:, side:, side:].sum(),
            ]
        ).max(),
    }
    assert quarters["changed"] > 2 * quarters["others"]


@pytest.mark.parametrize("case", [*CASES, *NONLINEAR])
def test_looking_leaves_no_trace(case: str) -> None:
    model = {**CASES, **NONLINEAR}[case][0]().double().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    find_target_layer(model, images())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_branches_survive_by_name() -> None:
    model = TwoStreams().double().eval()
    found = explain(model, images(), 1)
    named = explain(model, images(), 1, target_layers="colour + edges")
    torch.testing.assert_close(named.difference, found.difference)
    with capture(model, example=images()) as captured:  # differentiable, too
        maps = captured.maps(model(images()), true=1)
        maps.difference.square().sum().backward()
    torch.testing.assert_close(maps.difference.detach(), found.difference)
    assert model.edges[0].weight.grad.abs().sum() > 0


class Siamese(nn.Module):
    """One backbone for both images of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = backbone(), nn.Linear(6, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        pooled = [self.backbone(one).mean((2, 3)) for one in (first, second)]
        return self.fc((pooled[0] - pooled[1]).abs())


def test_of_a_siamese_pair_one_image_has_to_be_named() -> None:
    model = Siamese().double().eval()
    pair = images(), images(1)
    with pytest.raises(DiffsalError, match=r"several images.*backbone#1, backbone#2.*name"):
        explain(model, pair)
    first, second = (explain(model, pair, 1, target_layers=f"backbone#{call}") for call in (1, 2))
    swapped = explain(model, pair[::-1], 1, target_layers="backbone#1")
    torch.testing.assert_close(swapped.difference, second.difference)
    bias = model.fc.bias[1] - model.fc.bias[0]
    total = (first.difference + second.difference).sum((1, 2)) + bias
    torch.testing.assert_close(total.detach(), first.margin)
    with pytest.raises(DiffsalError, match="ran twice"):
        explain(model, pair, 1, target_layers="backbone")


def test_a_forward_pass_that_failed_does_not_shift_the_calls() -> None:
    model = OneActivation().double().eval()
    expected = explain(model, images(), 1)
    with torch.no_grad(), capture(model, "act#2") as captured:
        failing = model.last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images())
        failing.remove()
        maps = captured.maps(model(images()), 1)
    torch.testing.assert_close(maps.difference, expected.difference)


class PairOfStreams(nn.Module):
    """Each image has a backbone of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.probe, self.gallery, self.fc = backbone(), backbone(), nn.Linear(12, 2)

    def forward(self, probe: Tensor, gallery: Tensor) -> Tensor:
        pooled = [self.probe(probe).mean((2, 3)), self.gallery(gallery).mean((2, 3))]
        return self.fc(torch.cat(pooled, 1))


def test_of_two_images_one_has_to_be_named() -> None:
    model = PairOfStreams().double().eval()
    pair = images(), images(1)
    with pytest.raises(DiffsalError, match=r"several images.*probe.*gallery.*name"):
        explain(model, pair)
    maps = explain(model, pair, 1, target_layers="probe")
    weight = model.fc.weight[1] - model.fc.weight[0]
    expected = torch.einsum("c,bchw->bhw", weight[:6], model.probe(pair[0])) / 64
    torch.testing.assert_close(maps.difference, expected.detach())


class ImageAndNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.fc = backbone(), nn.Linear(6 + 2, 2)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.fc(torch.cat([self.features(image).mean((2, 3)), numbers], 1))


@pytest.mark.parametrize("named", [False, True])
def test_an_image_and_numbers(named: bool) -> None:
    model = ImageAndNumbers().double().eval()
    numbers = torch.randn(3, 2, dtype=torch.float64)
    inputs = {"image": images(), "numbers": numbers} if named else (images(), numbers)
    with DifferenceCAM(model, example=inputs) as cam:
        maps = cam.maps(inputs, true=1)
    weight, bias = model.fc.weight[1] - model.fc.weight[0], model.fc.bias[1] - model.fc.bias[0]
    torch.testing.assert_close(maps.residual, (numbers @ weight[6:] + bias).detach())


def test_an_oblong_grid_whose_cells_would_fill_a_square() -> None:
    """16 x 9 tokens are 144, as are 12 x 12."""
    torch.manual_seed(0)
    model = StagesOfTokens().double().eval()
    oblong = torch.rand(2, 3, 64, 36, dtype=torch.float64)
    layer = find_target_layer(model, oblong)
    maps = explain(model, oblong, 1, target_layers=layer)
    changed = oblong.clone()
    changed[:, :, :8, 28:] = 1 - changed[:, :, :8, 28:]
    moved = explain(model, changed, 1, target_layers=layer).difference != maps.difference
    assert moved.shape == (2, 16, 9)
    assert moved[:, :2, 7:].all()
    assert moved.sum() == 2 * 2 * 2


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> None:
        """No gradient at all, though the graph leads on."""


class _Stopped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(_Stop.apply(self.features(images).mean((2, 3))))


def test_a_way_back_of_the_models_own_is_gone(refused):
    with refused("the logits change with no feature map"):
        find_target_layer(_Stopped())


@pytest.mark.parametrize(("made", "width"), [(4, 8), (4, 1), (1, 4)])
def test_a_batch_norm_of_another_width_is_told(made, width, refused):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    model = nn.Sequential(nn.Conv2d(3, made, 3), nn.BatchNorm2d(width), *head)
    with refused(f"running_mean should contain {made} elements not {width}"):
        find_target_layer(model)


def test_a_batch_norm_with_a_forward_of_its_own_runs_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[1].forward = lambda x: F.adaptive_avg_pool2d(x, 1)
    assert find_target_layer(model).name == "0"


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images).detach()).mean((2, 3)))


def test_a_batch_norm_behind_what_is_detached_leads_to_no_image(refused):
    with refused("no gradient leads from the logits to the image"):
        find_target_layer(_Detached())


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        self.all = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head)

    def forward(self, images: Tensor) -> Any:
        return checkpoint(self.all, images, use_reentrant=False)


def test_a_model_that_is_recomputed_as_a_whole_is_captured():
    model, images = _Checkpointed().eval(), torch.rand(2, 3, 8, 8)
    with capture(model, find_target_layer(model)) as captured:
        maps = captured.maps(model(images))
        maps.difference.square().mean().backward()
    torch.testing.assert_close(maps.difference.detach(), explain(model.all, images).difference)
