"""The mechanism against its equations, worked out by hand in float64, and under every caller."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.modes import evaluated
from diffsal.maps.salience import capture, explain
from diffsal.maps.target_layers import TargetLayer, find_target_layer

Make = Callable[..., nn.Module]
Refused = Callable[[str], AbstractContextManager[None]]

REGNETS = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
EXACT = {
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "resnext": (  # wide ones are of the same blocks, at three times the parameters
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
        *("wide_resnet50_2", "wide_resnet101_2"),
    ),
    "densenet": ("densenet121", "densenet161", "densenet169", "densenet201"),
    "efficientnet": tuple(f"efficientnet_b{index}" for index in range(8)),
    "efficientnet_v2": ("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
    "mobilenet_v2": ("mobilenet_v2",),
    "regnet_x": tuple(f"regnet_x_{flops}" for flops in REGNETS),
    "regnet_y": tuple(f"regnet_y_{flops}" for flops in (*REGNETS, "128gf")),
    "shufflenet": tuple(f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")),
    "mnasnet": ("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    "googlenet": ("googlenet",),
    "inception": ("inception_v3",),
    "swin": ("swin_t", "swin_s", "swin_b"),
    "swin_v2": ("swin_v2_t", "swin_v2_s", "swin_v2_b"),
}
"""Torchvision's classifiers whose maps sum to the logit, smallest first in each family."""


def images(batch: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def cam(features: Tensor, weight: Tensor) -> Tensor:
    """Σ_c weight[c] · features[c] / cells, (B, ...); the paper's CAM, the pooling's divisor in."""
    return torch.einsum("bc,bc...->b...", weight, features) / features[0, 0].numel()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_maps_of_a_pooled_linear_head_are_the_papers_cams(pooled_net: Make) -> None:
    net, x, labels = pooled_net(3), images(), torch.tensor([2, 0, 1])
    others = torch.tensor([1, 1, 2])
    maps = explain(net, x, labels, others, target_layers=net.features)

    relu = F.relu(net.backbone(x).detach())
    weight, bias = net.fc.weight.detach(), net.fc.bias.detach()
    true, false = cam(relu, weight[labels]), cam(relu, weight[others])
    logits = net(x).detach()
    close(maps.true, true)
    close(maps.false, false)
    close(maps.difference, cam(relu, weight[labels] - weight[others]))
    close(maps.common, (true + false) / 2)
    close(maps.logits, logits)
    close(maps.true_score, logits[range(3), labels])
    close(maps.margin, logits[range(3), labels] - logits[range(3), others])
    close(maps.residual, bias[labels] - bias[others])
    assert maps.true_class.tolist() == [2, 0, 1]
    assert maps.false_class.tolist() == [1, 1, 2]
    assert maps.true_from == "label"


def test_without_labels_the_predicted_class_is_true(pooled_net: Make) -> None:
    net, x = pooled_net(3), images(8)
    maps = explain(net, x)
    ranked = net(x).argsort(dim=1, descending=True)
    assert maps.true_class.tolist() == ranked[:, 0].tolist()
    assert maps.false_class.tolist() == ranked[:, 1].tolist()
    assert maps.true_from == "prediction"


def test_one_logit_is_halved_so_that_the_margin_is_the_log_odds(pooled_net: Make) -> None:
    net, x = pooled_net(1), images(2)
    maps = explain(net, x, torch.tensor([1, 0]))
    whole = cam(F.relu(net.backbone(x).detach()), net.fc.weight.detach().expand(2, -1))
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    close(maps.difference, sign[:, None, None] * whole)
    close(maps.true, sign[:, None, None] * whole / 2)
    close(maps.common, torch.zeros_like(whole))
    close(maps.margin, sign * net(x).detach()[:, 0])
    assert maps.common_mode_share.isnan().all()


def test_the_map_against_the_rest_is_that_of_the_log_odds(pooled_net: Make) -> None:
    net, x, labels = pooled_net(4), images(), torch.tensor([3, 0, 0])
    maps = explain(net, x, labels, "rest")

    features = net.backbone(x).detach().requires_grad_()
    log_p = net.head(features.clone()).log_softmax(1)[range(3), labels]
    log_odds = log_p - torch.log1p(-log_p.exp())
    (gradient,) = torch.autograd.grad(log_odds.sum(), features)
    close(maps.difference, (features.detach() * gradient).sum(1))


def test_volumes(refused: Refused) -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.Conv3d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).double()
    x = torch.randn(2, 1, 4, 8, 6, dtype=torch.float64)
    maps = explain(net, x, torch.tensor([0, 1]), target_layers=net[1])
    relu = F.relu(net[:2](x).detach())
    close(maps.true, cam(relu, net[-1].weight.detach()))
    assert maps.true.shape == (2, 2, 4, 3)
    assert maps.normalized((4, 8, 6)).difference.shape == x[:, 0].shape
    both = explain(net, x, torch.tensor([0, 1]), target_layers=[net[0], net[1]])
    assert both.true.shape == (2, 4, 8, 6)


def test_a_video_classifier() -> None:
    from torchvision.models.video import r3d_18

    net = r3d_18(weights=None, num_classes=3).double().eval()
    clips = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    maps = explain(net, clips, torch.tensor([2, 1]), 0)
    assert maps.true.ndim == 4
    close(maps.true.flatten(1).sum(1) + net.fc.bias.detach()[[2, 1]], maps.true_score)


def test_tokens_through_a_reshape_transform() -> None:
    """Patch tokens (B, N, C), averaged: a pooled linear head in another layout."""
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 2)).double()
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[1](self.net[0](x).mean(1))

    def grid(output: Tensor) -> Tensor:
        return output.transpose(1, 2).reshape(-1, 4, 2, 3)

    labels = torch.tensor([0, 1])
    expected = cam(grid(tokens), net[1].weight.detach())
    by_argument = explain(Pooled(), tokens, labels, target_layers=net[0], reshape_transform=grid)
    layer = TargetLayer("tokens", net[0], grid)
    close(by_argument.true, expected)
    close(explain(Pooled(), tokens, labels, target_layers=layer).true, expected)


def test_scores_may_be_callables(pooled_net: Make) -> None:
    net, x = pooled_net(3), images(2)
    weight = net.fc.weight.detach()
    maps = explain(net, x, lambda logits: 2 * logits[0], [lambda z: z[1], lambda z: z[2]])
    relu = F.relu(net.backbone(x).detach())
    close(maps.true, cam(relu, 2 * weight[[0, 0]]))
    close(maps.false, cam(relu, weight[[1, 2]]))
    assert maps.true_class.tolist() == maps.false_class.tolist() == [-1, -1]
    assert maps.true_from == "score"


def test_a_vector_of_logits_is_one_logit_each(pooled_net: Make) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled_net(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, 0]

    net, x = Flat(), images(2)
    flat = explain(net, x, target_layers=net.net.features)
    assert flat.logits.shape == (2, 1)
    close(flat.true, explain(net.net, x).true)


def check_completeness(net: nn.Module, size: int) -> None:
    x = images(2, size)
    true, false = torch.tensor([0, 2]), torch.tensor([1, 1])
    maps = explain(net, x, true, false)
    bias = [module for module in net.modules() if isinstance(module, nn.Linear)][-1].bias.detach()
    logits = net(x).detach()
    close(logits, maps.logits)
    for side, label in ((maps.true, true), (maps.false, false)):
        logit = logits[range(2), label]
        assert torch.all((side.sum((1, 2)) + bias[label] - logit).abs() <= 1e-12 * logit.abs())
    close(maps.residual, bias[true] - bias[false])


@pytest.mark.parametrize("name", [names[0] for names in EXACT.values()])
def test_invariant_2_the_map_sums_to_the_logit(classifier: Make, name: str) -> None:
    check_completeness(classifier(name, num_classes=3), 139 if "inception" in name else 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for names in EXACT.values() for name in names[1:]])
def test_invariant_2_for_the_larger_models(classifier: Make, name: str) -> None:
    check_completeness(classifier(name, num_classes=3), 64)


def test_invariant_2_holds_in_training_mode_with_dropout(pooled_net: Make) -> None:
    net, x, labels = pooled_net().train(), images(), torch.tensor([0, 1, 0])
    with capture(net) as captured:
        logits = net(x)
        maps = captured.maps(logits, labels)
    close(maps.true.sum((1, 2)) + net.fc.bias[labels], logits[range(3), labels])
    assert not torch.allclose(logits, net.eval()(x))  # dropout did something


@pytest.mark.parametrize(
    ("name", "size", "arguments", "grid"),
    [
        ("alexnet", 96, {}, (2, 2)),
        ("vgg11", 64, {}, (2, 2)),
        ("squeezenet1_1", 64, {}, (3, 3)),
        ("mobilenet_v3_small", 64, {}, (2, 2)),
        ("convnext_tiny", 64, {}, (2, 2)),
        pytest.param("maxvit_t", 224, {}, (7, 7), marks=pytest.mark.slow),
        ("vit_b_32", 96, {"image_size": 96}, (3, 3)),
    ],
)
def test_other_heads_give_finite_first_order_maps(
    classifier: Make, name: str, size: int, arguments: dict[str, int], grid: tuple[int, int]
) -> None:
    net = classifier(name, torch.float32, num_classes=3, **arguments)
    maps = explain(net, images(2, size).float(), 2, "runner-up")
    assert maps.true.shape == (2, *grid)
    assert maps.difference.isfinite().all()
    assert maps.difference.abs().sum() > 0
    torch.testing.assert_close(maps.residual, maps.margin - maps.difference.sum((1, 2)))


def test_invariant_3_a_vector_added_to_every_row_changes_no_difference(pooled_net: Make) -> None:
    net, x, labels = pooled_net(), images(), torch.tensor([0, 1, 0])
    before = explain(net, x, labels)
    with torch.no_grad():
        net.fc.weight += 10 * torch.randn(5, dtype=torch.float64)
        net.fc.bias += 3
    after = explain(net, x, labels)
    close(after.difference, before.difference)
    close(after.margin, before.margin)
    close(after.residual, before.residual)
    close(after.logits.softmax(1), before.logits.softmax(1))
    shift = after.logits - before.logits
    close(shift[:, 0], shift[:, 1])
    assert (after.true - before.true).abs().max() > 0.1
    assert torch.all(after.common_mode_share > before.common_mode_share)


class Failing(nn.Module):
    """Stands in for the head, and raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def state(net: nn.Module) -> list[object]:
    """Everything that must be as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, module.training) for name, module in net.named_modules()],
        [[len(getattr(module, kind)) for kind in hooks] for module in net.modules()],
        [
            (name, parameter.requires_grad, parameter.tolist(), id(parameter.grad))
            for name, parameter in net.named_parameters()
        ],
        [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    ]


def in_mixed_state(net: nn.Module) -> nn.Module:
    """Modules in different modes, frozen and trained parameters, gradients here and there."""
    net.train()
    net.features.eval()
    net.first.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    return net


CALLERS = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("event", ["success", "before", "behind", "maps", "KeyboardInterrupt"])
@pytest.mark.parametrize("way", ["explain", "capture", "several layers"])
def test_invariant_6_the_model_is_left_as_it_was(
    pooled_net: Make, way: str, event: str, caller: str
) -> None:
    net, x = in_mixed_state(pooled_net()), images(2)
    expected: type[BaseException] | None = None
    # What runs the model itself says in one line what was raised.
    of_model = DiffsalError if way == "explain" else ZeroDivisionError
    if event == "KeyboardInterrupt":
        expected, net.relu = KeyboardInterrupt, Failing(KeyboardInterrupt())
    elif event == "behind":
        expected, net.relu = of_model, Failing(ZeroDivisionError())
    elif event == "before":
        expected, net.first = of_model, Failing(ZeroDivisionError())
    elif event == "maps":
        expected = Exception
    label = 7 if event == "maps" else 1
    layers = [net.first, net.features] if way == "several layers" else net.features

    with CALLERS[caller]():
        before = state(net)
        with pytest.raises(expected) if expected else nullcontext():
            if way == "explain":
                explain(net, x, label, target_layers=layers)
            else:
                with capture(net, layers) as captured:
                    captured.maps(net(x), label)
        assert state(net) == before


def test_a_capture_can_be_entered_again_but_not_twice_at_once(
    pooled_net: Make, refused: Refused
) -> None:
    net, x = pooled_net(), images()
    captured = capture(net)
    results = []
    for _ in range(2):
        with captured:
            results.append(captured.maps(net(x)).true)
    assert torch.equal(*results)
    with captured, refused("open already"), captured:
        pass
    assert not net.features._forward_hooks


def test_what_is_evaluated_leaves_the_model_as_it_was(pooled_net: Make) -> None:
    net = in_mixed_state(pooled_net())
    before = state(net)
    net.relu = Failing(ZeroDivisionError())
    x = images()
    with pytest.raises(ZeroDivisionError), evaluated(net) as run:
        run(x)
    net.relu = nn.ReLU(inplace=True)
    with evaluated(net) as run:
        assert not any(module.training for module in run.modules())
    assert state(net) == before


def test_explain_works_in_evaluation_mode(pooled_net: Make) -> None:
    net, x = pooled_net(), images()
    expected = explain(net, x).true
    assert torch.equal(explain(net.train(), x).true, expected)
    assert net.training


def test_images_and_labels_may_be_made_in_inference_mode(pooled_net: Make) -> None:
    net = pooled_net()
    with torch.inference_mode():
        x, labels, others = images(2), torch.tensor([0, 1]), torch.tensor([1, 0])
        maps = explain(net, x, labels, others)
    relu = F.relu(net.backbone(x.clone()).detach())
    close(maps.true, cam(relu, net.fc.weight.detach()))


def test_a_layer_may_hand_its_input_on_in_inference_mode(on_features: Make) -> None:
    net = on_features(3)
    with torch.inference_mode():
        features = images(2)
        maps = explain(net, features, torch.tensor([0, 1]), target_layers=net[0])
    close(maps.true, cam(features, net[-1].weight.detach()))


def test_explaining_keeps_no_graph_before_the_layer_and_calls_the_model_once(
    pooled_net: Make,
) -> None:
    net, seen = pooled_net(), []
    find_target_layer(net)  # which runs it on its own
    net.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    net.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    explain(net, images())
    assert seen == [False, True]


def test_a_capture_changes_no_logit(pooled_net: Make) -> None:
    net, x = pooled_net(), images()
    with capture(net):
        inside = net(x)
    assert torch.equal(inside, net(x))


def test_one_capture_serves_many_forward_passes(pooled_net: Make) -> None:
    net, batches = pooled_net(), [images() for _ in range(3)]
    expected = [explain(net, batch).true for batch in batches]
    with torch.no_grad(), capture(net) as captured:
        for batch, true in zip(batches, expected, strict=True):
            assert torch.equal(captured.maps(net(batch)).true, true)
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("train", [False, True])
def test_in_place_ops_behind_the_layer_do_not_touch_the_record(
    on_features: Make, train: bool
) -> None:
    net = on_features(4, nn.LeakyReLU(0.5, inplace=True))
    features = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    kept = features.clone()
    with torch.set_grad_enabled(train), capture(net, net[0]) as captured:
        maps = captured.maps(net(features), torch.tensor([0, 1]))
    close(maps.true, cam(F.leaky_relu(kept, 0.5), net[-1].weight))
    assert torch.equal(features, kept)


def test_a_frozen_model_is_explained(pooled_net: Make) -> None:
    net, x = pooled_net(), images()
    expected = explain(net, x).true
    net.requires_grad_(False)
    assert torch.equal(explain(net, x).true, expected)
    with capture(net) as captured:
        assert torch.equal(captured.maps(net(x)).true, expected)


def test_data_parallel_is_looked_through(pooled_net: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net, x = pooled_net(), images()
    wrapped, expected = nn.DataParallel(net), explain(net, x).true
    for layers in (None, net.features, TargetLayer("module.features", net.features)):
        assert torch.equal(explain(wrapped, x, target_layers=layers).true, expected)


def test_logits_may_be_an_attribute_of_the_output(pooled_net: Make) -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled_net()

        def forward(self, x: Tensor) -> object:
            return type("ModelOutput", (), {"logits": self.net(x)})

    net, x = Output(), images()
    assert torch.equal(
        explain(net, x, target_layers=net.net.features).true, explain(net.net, x).true
    )
