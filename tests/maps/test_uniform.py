"""The same checks on every kind of model: precisions, devices, grad modes, batches, gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from diffsal.maps.salience import capture, explain
from diffsal.maps.salience_maps import SalienceMaps

Make = Callable[..., nn.Module]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ),
]
TOLERANCES = {  # relative, absolute
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (0.05, 2e-3),
    torch.bfloat16: (0.05, 8e-3),  # two roundings of values near 1
}
CASES = ["one logit", "two logits", "five logits", "two layers", "tokens", "volume"]


@dataclass(frozen=True)
class Case:
    """A small model in float64 and evaluation mode, and a batch of five for it."""

    net: nn.Module
    inputs: Tensor
    grid: tuple[int, ...]
    layers: list[nn.Module] | None = None
    classes: int = 2

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """True classes, and false ones."""
        true = torch.arange(5) % self.classes
        return true, (true + 1) % self.classes

    def maps(self) -> SalienceMaps:
        """On the model's device, in its precision."""
        inputs = self.inputs.to(next(self.net.parameters()))
        return explain(self.net, inputs, *self.labels, target_layers=self.layers)

    def captured(self, inputs: Tensor) -> SalienceMaps:
        """In the caller's grad mode, and of the model as it is."""
        with capture(self.net, self.layers) as captured:
            return captured.maps(self.net(inputs), *self.labels)


def volume_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 3, stride=2, padding=1)),
        *(nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


def token_net() -> nn.Module:
    net = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8,
        num_classes=2,
    )  # fmt: skip
    nn.init.normal_(net.heads.head.weight, std=0.2)  # zero when it is made
    return net


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, pooled_net: Make) -> Case:
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    if request.param == "volume":
        volumes = torch.randn(5, 1, 4, 8, 6, dtype=torch.float64)
        return Case(volume_net().double().eval(), volumes, (2, 4, 3))
    if request.param == "tokens":
        return Case(token_net().double().eval(), images, (2, 2))
    if request.param == "two layers":
        net = pooled_net(3)
        return Case(net, images, (8, 8), [net.first, net.features], classes=3)
    logits = {"one logit": 1, "two logits": 2, "five logits": 5}[request.param]
    return Case(pooled_net(logits), images, (4, 4), classes=max(logits, 2))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def loss(maps: SalienceMaps) -> Tensor:
    """Uses every part of the maps, non-linearly."""
    normalized = maps.normalized([6] * (maps.true.ndim - 1))
    return (
        F.softplus(-maps.margin).mean()
        + maps.difference.square().sum()
        + (normalized.true - 0.3).square().mean()
        + normalized.false.pow(3).mean()
    )


class TestMaps:
    """Every check on every case."""

    def test_shapes(self, case: Case) -> None:
        maps, size = case.maps(), case.inputs.shape[2:]
        for map_ in (maps.true, maps.false, maps.difference, maps.common):
            assert map_.shape == (5, *case.grid)
        for map_ in maps.normalized(size):
            assert map_.shape == (5, *size)
        for values in (maps.margin, maps.residual, maps.common_mode_share):
            assert values.shape == (5,)

    def test_invariant_1_the_difference_and_its_mirror(self, case: Case) -> None:
        maps = case.maps()
        swapped = explain(case.net, case.inputs, *case.labels[::-1], target_layers=case.layers)
        assert torch.equal(maps.difference, maps.true - maps.false)
        close(swapped.difference, -maps.difference)
        close(swapped.margin, -maps.margin)
        size = [9] * len(case.grid)
        d, mirrored = maps.normalized(size).difference, swapped.normalized(size).difference
        close(d + mirrored, torch.ones_like(d))

    @pytest.mark.parametrize("weighting", ["elementwise", "channel_mean", "xgrad"])
    @pytest.mark.parametrize("false", ["runner-up", "rest"])
    def test_invariant_4_samples_do_not_see_each_other(
        self, case: Case, false: str, weighting: str
    ) -> None:
        labels, _ = case.labels

        def tensors(samples: list[int]) -> list[Tensor]:
            maps = explain(
                *(case.net, case.inputs[samples], labels[samples], false),
                target_layers=case.layers,
                weighting=weighting,
            )
            return [
                *(maps.true, maps.false, maps.logits, maps.margin, maps.residual),
                *(maps.common_mode_share, *maps.normalized(case.inputs.shape[2:])),
            ]

        whole, order = tensors([0, 1, 2, 3, 4]), [3, 0, 4, 2, 1]
        for expected, shuffled in zip(whole, tensors(order), strict=True):
            close(shuffled, expected[order])
        singles = zip(*(tensors([index]) for index in range(5)), strict=True)
        for expected, single in zip(whole, singles, strict=True):
            close(torch.cat(single), expected)

    @pytest.mark.parametrize(  # of no tokens, torch cannot infer the channels
        "case", [name for name in CASES if name != "tokens"], indirect=True
    )
    def test_invariant_5_a_batch_of_none(self, case: Case) -> None:
        labels = torch.zeros(0, dtype=torch.int64)
        maps = explain(case.net, case.inputs[:0], labels, target_layers=case.layers)
        assert maps.true.shape == (0, *case.grid)
        assert maps.residual.shape == maps.margin.shape == (0,)
        size = case.inputs.shape[2:]
        assert maps.normalized(size).difference.shape == (0, *size)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    def test_weights_of_every_precision(
        self, case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        expected = case.maps()
        case.net.to(device, dtype)
        maps = case.maps()
        at_least = torch.promote_types(dtype, torch.float32)
        assert maps.logits.dtype == dtype
        assert maps.true.dtype == maps.difference.dtype == maps.residual.dtype == at_least
        assert maps.true.device.type == maps.margin.device.type == device
        assert all(map_.isfinite().all() for map_ in (maps.true, maps.false, *maps.normalized()))
        rtol, atol = TOLERANCES[dtype]
        for side in ("true", "false"):
            actual, known = getattr(maps, side).cpu(), getattr(expected, side).to(at_least)
            torch.testing.assert_close(actual, known, rtol=rtol, atol=atol)

    @pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_grad_modes(self, case: Case, caller: Callable[[], torch.enable_grad]) -> None:
        trained = case.captured(case.inputs)
        assert trained.true.requires_grad
        with caller():
            maps, captured = case.maps(), case.captured(case.inputs)
        assert not any(t.requires_grad for t in vars(maps).values() if isinstance(t, Tensor))
        assert captured.true.requires_grad == (caller is torch.enable_grad)
        for other in (trained, captured):
            close(maps.true, other.true.detach())
            close(maps.false, other.false.detach())
        close(maps.logits, case.net(case.inputs).detach())

    @pytest.mark.parametrize("train", [False, True])
    def test_autocast_gives_float32_maps(self, case: Case, train: bool) -> None:
        case.net.float()
        expected = case.maps()
        with (
            torch.set_grad_enabled(train),
            torch.autocast("cpu", torch.bfloat16),
        ):
            maps = case.captured(case.inputs.float())
        assert maps.logits.dtype == torch.bfloat16
        assert maps.true.dtype == maps.false.dtype == maps.difference.dtype == torch.float32
        torch.testing.assert_close(maps.true, expected.true, rtol=0.05, atol=2e-3)
        if train:
            loss(maps).backward()
            assert all(parameter.grad.isfinite().all() for parameter in case.net.parameters())

    def test_invariant_7_gradcheck(self, case: Case) -> None:
        """Fast: along random directions; test_salience_training.py takes the whole Jacobian."""
        names = [name for name, _ in case.net.named_parameters()]

        def maps(*parameters: Tensor) -> tuple[Tensor, ...]:
            with capture(case.net, case.layers) as captured:
                logits = torch.func.functional_call(
                    case.net, dict(zip(names, parameters, strict=True)), (case.inputs,)
                )
                result = captured.maps(logits, *case.labels)
            return result.true, result.difference, result.residual, result.normalized().false

        assert torch.autograd.gradcheck(maps, tuple(case.net.parameters()), fast_mode=True)
