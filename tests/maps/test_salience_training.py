"""Training through the maps: their gradients are those of the closed form, or it is refused."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffsal.maps.salience import capture, explain
from diffsal.maps.salience_maps import SalienceMaps

Make = Callable[..., nn.Module]
Refused = Callable[[str], AbstractContextManager[None]]


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def cam(features: Tensor, weight: Tensor) -> Tensor:
    """Σ_c weight[c] · features[c] / cells, (B, ...); the paper's CAM, the pooling's divisor in."""
    return torch.einsum("bc,bc...->b...", weight, features) / features[0, 0].numel()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def objective(maps: SalienceMaps) -> Tensor:
    """Uses every part of the maps, non-linearly."""
    normalized = maps.normalized((6, 6))
    return (
        F.cross_entropy(maps.logits.to(maps.true.dtype), maps.true_class)
        + maps.difference.square().sum()
        + (normalized.true - 0.3).square().mean()
        + normalized.false.pow(3).mean()
    )


def by_hand(net: nn.Module, x: Tensor, labels: Tensor) -> SalienceMaps:
    """The maps of a :class:`PooledNet`, from its features and weights; no hooks, no gradients."""
    relu = F.relu(net.backbone(x))
    logits = F.linear(relu.mean((2, 3)), net.fc.weight, net.fc.bias)
    true, false = (cam(relu, net.fc.weight[classes]) for classes in (labels, 1 - labels))
    scores = (logits[range(len(x)), classes] for classes in (labels, 1 - labels))
    return SalienceMaps(true, false, logits, *scores, labels, 1 - labels, "label")


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor | None]:
    net.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in net.parameters()]


def captured_loss(net: nn.Module, x: Tensor, labels: Tensor, layer: nn.Module) -> Tensor:
    with capture(net, layer) as captured:
        return objective(captured.maps(net(x), labels))


def test_gradients_of_maps_are_those_of_the_closed_form(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    loss = captured_loss(net, x, labels, net.features)
    assert all(parameter.grad is None for parameter in net.parameters())
    expected = objective(by_hand(net, x, labels))
    close(loss, expected)
    actual = gradients(net, loss)
    for one, other in zip(actual, gradients(net, expected), strict=True):
        close(one, other)
        assert one.abs().max() > 0


def test_a_frozen_backbone_leaves_the_gradient_of_the_head(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    expected = gradients(net, objective(by_hand(net, x, labels)))
    net.first.requires_grad_(False)
    net.features.requires_grad_(False)
    actual = gradients(net, captured_loss(net, x, labels, net.features))
    assert actual[:4] == [None] * 4
    for one, other in zip(actual[4:], expected[4:], strict=True):
        close(one, other)


@pytest.mark.parametrize(
    ("weighting", "layers"),
    [
        ("elementwise", ["features"]),
        ("elementwise", ["first", "features"]),
        ("channel_mean", ["features"]),
        ("xgrad", ["features"]),
    ],
)
def test_gradcheck_through_the_capture(weighting: str, layers: list[str]) -> None:
    """A smooth head that is not linear, so that maps depend on weights in second order."""
    net = nn.Sequential()
    net.first = nn.Conv2d(1, 2, 3, padding=1)
    net.features = nn.Conv2d(2, 2, 2, stride=2)
    net.act, net.pool, net.flatten = nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net.fc, net.last = nn.Linear(2, 2), nn.Softplus()
    net.double()
    names = [name for name, _ in net.named_parameters()]
    chosen = [getattr(net, layer) for layer in layers]

    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def maps(*parameters: Tensor) -> tuple[Tensor, ...]:
        with capture(net, chosen, weighting=weighting) as captured:
            logits = torch.func.functional_call(
                net, dict(zip(names, parameters, strict=True)), (x,)
            )
            result = captured.maps(logits, torch.tensor([0, 1]))
        return result.true, result.difference, result.residual, result.normalized().false

    assert torch.autograd.gradcheck(maps, tuple(net.parameters()))


class Checkpointed(nn.Module):
    """A :class:`PooledNet`, a part of which is recomputed in the backward pass."""

    def __init__(self, net: nn.Module, part: str, reentrant: bool) -> None:
        super().__init__()
        net.relu = nn.ReLU()  # in place on a checkpoint's input, torch itself refuses
        self.net, self.part, self.reentrant = net, part, reentrant

    def forward(self, x: Tensor) -> Tensor:
        def run(part: str, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
            if part != self.part:
                return function(value)
            return checkpoint(function, value, use_reentrant=self.reentrant)

        def front(value: Tensor) -> Tensor:
            return torch.tanh(self.net.first(value))

        def whole(value: Tensor) -> Tensor:
            inner = run("front", front, value)
            return run("head", self.net.head, run("layer", self.net.features, inner))

        return run("whole", whole, x)


REFUSED = {  # part recomputed, reentrant, training
    ("layer", True, False),
    ("layer", True, True),
    ("head", True, False),
    ("head", True, True),
    ("whole", True, False),
    ("whole", True, True),
    ("whole", False, True),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["front", "layer", "head", "whole"])
def test_activation_checkpointing_is_right_or_refused(
    pooled_net: Make, refused: Refused, part: str, reentrant: bool, train: bool
) -> None:
    plain, x, labels = pooled_net(), images().requires_grad_(), torch.tensor([0, 1, 1])
    net = Checkpointed(plain, part, reentrant)
    fails = (part, reentrant, train) in REFUSED
    with refused("checkpointing|no gradient flows") if fails else nullcontext():
        if train:
            actual = gradients(plain, captured_loss(net, x, labels, plain.features))
            expected = gradients(plain, objective(by_hand(plain, x, labels)))
            for one, other in zip(actual, expected, strict=True):
                close(one, other)
        else:
            maps = explain(net, x, labels, target_layers=plain.features)
            close(maps.true, by_hand(plain, x, labels).true.detach())
    assert not plain.features._forward_hooks


@contextmanager
def one_process_group(path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path / 'store'}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_trains_and_its_static_graph_is_refused(
    pooled_net: Make, refused: Refused, tmp_path: Path
) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 1])
    expected = gradients(net, objective(by_hand(net, x, labels)))
    with one_process_group(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(net)
        with capture(parallel) as captured:
            loss = objective(captured.maps(parallel(x), labels))
        for one, other in zip(gradients(net, loss), expected, strict=True):
            close(one, other)

        static = nn.parallel.DistributedDataParallel(pooled_net(), static_graph=True)
        for model in (static, nn.Sequential(static)):
            with refused("static_graph"):
                capture(model, static.module.features)


def test_a_models_own_static_graph_attribute_means_nothing(pooled_net: Make) -> None:
    net = pooled_net()
    net.static_graph = True
    capture(net)
