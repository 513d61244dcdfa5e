"""What cannot be captured or explained is refused, in one line that says what to do."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from diffsal.maps.salience import capture, explain

Make = Callable[..., nn.Module]
Refused = Callable[[str], AbstractContextManager[None]]


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


CALLERS = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def test_compiled_models(pooled_net: Make, refused: Refused) -> None:
    net = pooled_net()
    compiled = torch.compile(net)
    for layers in (None, net.features):
        with refused("compiled .*_orig_mod"):
            capture(compiled, layers)
    capture(compiled._orig_mod)  # what the error says to pass

    partly = pooled_net()
    layer, partly.features = partly.features, torch.compile(partly.features)
    with refused("compiled"):
        capture(partly, layer)

    in_place = pooled_net()
    in_place.compile()
    with refused("compiled .*copy"):
        capture(in_place)

    head = pooled_net()
    head.fc = torch.compile(head.fc)
    capture(head, head.features)  # hooks run: the layer is outside


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_models_made_in_inference_mode(pooled_net: Make, refused: Refused, kind: str) -> None:
    net = pooled_net()
    with torch.inference_mode():
        if kind == "parameter":
            net.fc = nn.Linear(5, 2)
        else:
            net.register_buffer("scale", torch.ones(5))
    with refused("inference"):
        capture(net)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_a_forward_pass_that_turns_gradients_off(
    pooled_net: Make, refused: Refused, switch: Callable[[], AbstractContextManager], caller: str
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled_net()

        def forward(self, x: Tensor) -> Tensor:
            with switch():
                features = self.net.backbone(x)
            return self.net.head(features.clone())

    net = Wrapped()
    with (
        refused("no gradient flows .*'net.features'"),
        CALLERS[caller](),
        capture(net, net.net.features) as captured,
    ):
        captured.maps(net(images()))


def test_a_layer_that_runs_twice(refused: Refused) -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, shared, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with refused("ran twice"):
        explain(net, torch.randn(1, 3, 8, 8), target_layers=shared)


def test_a_second_forward_pass_before_the_maps(pooled_net: Make, refused: Refused) -> None:
    net, x = pooled_net(), images()
    with capture(net):
        net(x)
        with refused("'features' ran twice"):
            net(x)


def test_maps_are_taken_inside_and_once_per_forward_pass(
    pooled_net: Make, refused: Refused
) -> None:
    net, x = pooled_net(), images()
    with capture(net) as captured:
        with refused("'features' did not run"):
            captured.maps(torch.zeros(3, 2))
        logits = net(x)
        captured.maps(logits)
        with refused("'features' did not run"):
            captured.maps(logits)
        logits = net(x)
    with refused("inside the capture"):
        captured.maps(logits)
    with refused("inside the capture"):
        capture(net).maps(logits)


def test_an_error_in_the_maps_uses_the_forward_pass_up(pooled_net: Make, refused: Refused) -> None:
    net, x = pooled_net(), images()
    with torch.no_grad(), capture(net) as captured:
        with refused("class 7"):
            captured.maps(net(x), 7)
        assert not torch.is_grad_enabled()
        again = captured.maps(net(x)).true
    assert torch.equal(again, explain(net, x).true)


class Odd(nn.Module):
    """Layers that give no feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 3)
        self.pair = Odd.Pair()
        self.unused = nn.Conv2d(3, 2, 3)
        self.aside = nn.Identity()
        self.mixes_the_batch = nn.Flatten(0, 1)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.pair(self.features(x))
        self.aside(features.detach())
        rows = self.mixes_the_batch(features)
        return rows.reshape(len(x), 2, -1).mean(2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("pair", "'pair' returns a tuple"),
        ("unused", "'unused' did not run"),
        ("aside", "no gradient flows from the scores to layer 'aside'"),
        ("mixes_the_batch", r"'mixes_the_batch' gives \(6, 6, 6\) for a batch of 3"),
        ("", r"gives \(3, 2\) for a batch of 3"),
    ],
)
def test_layers_that_give_no_feature_map(refused: Refused, layer: str, message: str) -> None:
    net = Odd()
    with refused(message):
        explain(net, torch.randn(3, 3, 8, 8), target_layers=net.get_submodule(layer))


def test_layers_and_weightings_that_do_not_exist(pooled_net: Make, refused: Refused) -> None:
    net = pooled_net()
    with refused("Conv2d is not part of the model"):
        capture(net, nn.Conv2d(1, 1, 1))
    with refused("target_layers is empty"):
        capture(net, [])
    with refused("'gradcam' is unknown: pass one of elementwise, channel_mean, xgrad"):
        capture(net, weighting="gradcam")


def test_outputs_and_scores_that_cannot_be_explained(pooled_net: Make, refused: Refused) -> None:
    net, x = pooled_net(), images()
    with capture(net) as captured:
        with refused("returns a tuple with 2 tensors that could be its logits"):
            captured.maps((net(x), net.fc.weight))
        net(x)
        with refused("is a int, not a tensor of logits"):
            captured.maps(3)
        with refused("no gradient flows"):
            captured.maps(net(x).detach())
        with refused("no gradient flows"):
            captured.maps(net(x), lambda z: z[0].detach(), 1)
        with refused("no gradient flows"):
            captured.maps(net(x), 0, lambda z: torch.zeros(()))
