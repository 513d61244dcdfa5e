"""The losses against the paper's equations, computed from features and classifier weights."""

import doctest
import math
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock

from diffsal import DiffsalError, SalienceMaps, capture
from diffsal.training import losses
from diffsal.training.losses import (
    LOSSES,
    ContrastSalienceLoss,
    baseline_salience_loss,
    contrast_salience_loss,
    cross_entropy_loss,
    difference_salience_loss,
    per_class_salience_loss,
)

FUNCTIONS = {
    "cross-entropy": cross_entropy_loss,
    "baseline": baseline_salience_loss,
    "difference": difference_salience_loss,
    "per-class": per_class_salience_loss,
    "contrast": contrast_salience_loss,
}
TERMS = {  # and the paper's weights
    "cross-entropy": {"cross_entropy": 1.0},
    "baseline": {"cross_entropy": 0.5, "true": 0.5},
    "difference": {"cross_entropy": 0.5, "difference": 0.5},
    "per-class": {"cross_entropy": 0.3, "true": 0.3, "false": 0.3},
    "contrast": {"cross_entropy": 0.3, "true": 0.3, "contrast": 0.3},
}
WITH_MAPS = [name for name in LOSSES if name != "cross-entropy"]
LABELS = torch.tensor([0, 1, 1, 0, 1])
every_loss = pytest.mark.parametrize("name", LOSSES)
every_loss_with_maps = pytest.mark.parametrize("name", WITH_MAPS)


def norm(maps: Tensor) -> Tensor:
    """min-max per sample, of maps known not to be constant"""
    return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in maps])


def overlap_average(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Area averaging in whole steps: cut every pixel into as many pieces as there are cells."""
    for axis, new in enumerate(size, start=1):
        old = maps.shape[axis]
        pieces = np.moveaxis(np.repeat(maps, new, axis=axis), axis, -1)
        maps = np.moveaxis(pieces.reshape(*pieces.shape[:-1], new, old).mean(-1), -1, axis)
    return maps


def equations(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, human: Tensor, has: list[bool]
) -> dict[str, dict[str, Tensor]]:
    """Eq. 2-5, term by term, for pooled features (B, C, h, w) and a linear layer."""
    logits = features.flatten(2).mean(2) @ weight.T + bias
    rows = torch.arange(len(labels))
    if len(weight) == 1:  # the log-odds z: +z/2 speaks for class 1, -z/2 for class 0
        sign = 2 * labels[:, None] - 1.0
        w_true, w_false = sign * weight / 2, -sign * weight / 2
        cross_entropy = F.softplus(-sign * logits).mean()
    else:
        others = logits.detach().clone()
        others[rows, labels] = -math.inf
        w_true, w_false = weight[labels], weight[others.argmax(1)]
        cross_entropy = -logits.log_softmax(1)[rows, labels].mean()
    t = torch.einsum("bc,bc...->b...", w_true, features)
    f = torch.einsum("bc,bc...->b...", w_false, features)
    cells = tuple(range(1, t.ndim))
    h = torch.zeros_like(t)
    h[has] = norm(torch.from_numpy(overlap_average(human[has].numpy(), tuple(t.shape[1:]))))
    counts = torch.tensor(has, dtype=t.dtype)

    def mse(target: Tensor, maps: Tensor) -> Tensor:
        return ((target - maps) ** 2).mean(cells)

    true = (counts * mse(h, norm(t))).sum() / len(labels)
    difference = (counts * mse(h, norm(t - f))).sum() / len(labels)
    false = (counts * mse(1 - h, norm(f))).sum() / len(labels)
    contrast = mse(1 - norm(t), norm(f)).sum() / len(labels)
    return {
        "cross-entropy": {"cross_entropy": cross_entropy},
        "baseline": {"cross_entropy": cross_entropy, "true": true},
        "difference": {"cross_entropy": cross_entropy, "difference": difference},
        "per-class": {"cross_entropy": cross_entropy, "true": true, "false": false},
        "contrast": {"cross_entropy": cross_entropy, "true": true, "contrast": contrast},
    }


def densenet(outputs: int) -> tuple[nn.Module, Callable[[Tensor], Tensor], nn.Linear]:
    model = models.DenseNet(16, (2, 2), 16, num_classes=outputs)
    return model, lambda x: model.features(x).relu(), model.classifier


def resnet(outputs: int) -> tuple[nn.Module, Callable[[Tensor], Tensor], nn.Linear]:
    model = models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=outputs)
    return model, nn.Sequential(*list(model.children())[:-2]), model.fc


def efficientnet(outputs: int) -> tuple[nn.Module, Callable[[Tensor], Tensor], nn.Linear]:
    stages = [MBConvConfig(6, 3, 2, 16, 24, 1), MBConvConfig(6, 5, 2, 24, 40, 2)]
    model = models.EfficientNet(stages, 0.0, stochastic_depth_prob=0.0, num_classes=outputs)
    return model, model.features, model.classifier[-1]


def tiny(outputs: int = 2, volumes: bool = False) -> nn.Sequential:
    """A smooth network without batch norm, on (B, 1, 9, 9), or (B, 1, 6, 6, 6)."""
    conv, pool = (nn.Conv3d, nn.AdaptiveAvgPool3d) if volumes else (nn.Conv2d, nn.AdaptiveAvgPool2d)
    layers = conv(1, 3, 3, stride=2), nn.Softplus(), pool(1), nn.Flatten(), nn.Linear(3, outputs)
    return nn.Sequential(*layers).double()


def take_maps(model: nn.Module, images: Tensor, labels: Tensor = LABELS) -> SalienceMaps:
    with capture(model) as captured:
        return captured.maps(model(images), true=labels)


def tiny_maps(outputs: int = 2) -> tuple[nn.Sequential, SalienceMaps]:
    torch.manual_seed(0)
    model = tiny(outputs)
    return model, take_maps(model, torch.randn(5, 1, 9, 9, dtype=torch.float64))


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, materialize_grads=True
        )
    )


def assert_same_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(gradient.abs().max() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(scale))


@pytest.mark.parametrize("network", [densenet, resnet, efficientnet])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_losses_and_their_gradients_are_those_of_the_equations(
    network: Callable[[int], Any], outputs: int
) -> None:
    torch.manual_seed(outputs)
    model, features, head = network(outputs)
    model.double().train()
    images = torch.randn(5, 3, 96, 96, dtype=torch.float64)
    human = torch.rand(5, 40, 40, dtype=torch.float64)
    human[3] = torch.nan
    labels = LABELS if outputs < 3 else LABELS + torch.tensor([0, 0, 1, 0, 1])
    maps = take_maps(model, images, labels)
    expected = equations(
        features(images), head.weight, head.bias, labels, human, [True, True, True, False, True]
    )
    for name, terms in expected.items():
        criterion = LOSSES[name]()
        torch.testing.assert_close(criterion.terms(maps, human), terms, rtol=1e-9, atol=1e-9)
        loss = sum(TERMS[name][term] * value for term, value in terms.items())
        actual = criterion(maps, human)
        torch.testing.assert_close(actual, loss, rtol=1e-9, atol=1e-9)
        assert_same_gradients(gradients(actual, model), gradients(loss, model))


def test_volumes_follow_the_same_equations() -> None:
    torch.manual_seed(0)
    model = tiny(volumes=True)
    model[1] = nn.ReLU()  # maps are taken at the convolution, and are those of what comes after it
    images = torch.randn(5, 1, 6, 8, 10, dtype=torch.float64)
    human = torch.rand(5, 1, 7, 5, 3, dtype=torch.float64)
    maps = take_maps(model, images)
    assert maps.true.shape == (5, 2, 3, 4)
    head = model[-1]
    expected = equations(model[:2](images), head.weight, head.bias, LABELS, human[:, 0], [True] * 5)
    for name, terms in expected.items():
        torch.testing.assert_close(LOSSES[name]().terms(maps, human), terms, rtol=1e-9, atol=1e-9)
        assert LOSSES[name]().terms(maps, None).keys() == terms.keys()
    assert LOSSES["baseline"](pool="max")(maps, human) != LOSSES["baseline"]()(maps, human)


@every_loss
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_gradcheck_through_the_maps(name: str, outputs: int) -> None:
    torch.manual_seed(1)
    model = tiny(outputs)
    images = torch.randn(5, 1, 9, 9, dtype=torch.float64)
    human = torch.rand(5, 9, 9)
    names, parameters = zip(*model.named_parameters(), strict=True)
    criterion = LOSSES[name]()

    def loss(*values: Tensor) -> Tensor:
        with capture(model) as captured:
            state = dict(zip(names, values, strict=True))
            logits = torch.func.functional_call(model, state, (images,))
            maps = captured.maps(logits, true=LABELS)
        return criterion(maps, human)

    assert torch.autograd.gradcheck(loss, parameters)


@every_loss
def test_functions_are_the_modules(name: str) -> None:
    _, maps = tiny_maps()
    human = torch.rand(5, 9, 9)
    assert FUNCTIONS[name](maps, human) == LOSSES[name]()(maps, human)
    if name == "cross-entropy":
        return
    weights = [0.1, 0.7, 2.0][: len(TERMS[name])]
    criterion = LOSSES[name](*weights, pool="max")
    expected = sum(
        weight * term
        for weight, term in zip(weights, criterion.terms(maps, human).values(), strict=True)
    )
    torch.testing.assert_close(criterion(maps, human), expected)
    torch.testing.assert_close(FUNCTIONS[name](maps, human, *weights, pool="max"), expected)


def test_one_logit_makes_the_human_terms_equal_and_the_contrast_zero() -> None:
    _, maps = tiny_maps(outputs=1)
    human = torch.rand(5, 9, 9)
    per_class = LOSSES["per-class"]().terms(maps, human)
    torch.testing.assert_close(per_class["true"], per_class["false"])
    contrast = LOSSES["contrast"]().terms(maps, human)["contrast"]
    torch.testing.assert_close(contrast, torch.zeros_like(contrast))


@every_loss_with_maps
@pytest.mark.parametrize("pool", ["area", "max"])
def test_scale_type_and_channel_axis_of_human_maps_do_not_matter(name: str, pool: str) -> None:
    _, maps = tiny_maps()
    criterion = LOSSES[name](pool=pool)
    mask = torch.rand(5, 30, 40) > 0.8
    expected = criterion(maps, mask)
    grey = mask.to(torch.uint8) * 255
    for same in (grey, grey[:, None], mask.double() * 7e9 - 2e9, mask.half(), mask.long() - 3):
        torch.testing.assert_close(criterion(maps, same), expected, rtol=1e-9, atol=1e-9)


def no_maps() -> dict[str, Tensor]:
    """Human maps (1, 20, 20) that hold nothing, whichever way they are pooled."""
    plain = torch.ones(1, 20, 20)
    one_pixel = plain.clone()
    one_pixel[0, 3, 5] = torch.nan
    return {
        "nan": plain * torch.nan,
        "one nan": one_pixel,
        "infinite": plain * torch.inf,
        "zero": plain * 0,
        "constant": plain * 0.3,
        "constant 255": plain * 255,
        "vast": plain * 3e38,
    }


@every_loss_with_maps
@pytest.mark.parametrize("pool", ["area", "max"])
@pytest.mark.parametrize("empty", no_maps())
def test_samples_without_a_human_map_keep_their_other_terms(
    name: str, pool: str, empty: str
) -> None:
    model, maps = tiny_maps()
    criterion = LOSSES[name](pool=pool)
    human = torch.rand(5, 20, 20)
    human[[1, 4]] = no_maps()[empty][0]
    present = [0, 2, 3]
    some = SalienceMaps(
        **{
            field: value[present] if isinstance(value, Tensor) else value
            for field, value in vars(maps).items()
        }
    )
    expected = criterion.terms(some, human[present])
    for term, value in criterion.terms(maps, human).items():
        if term in ("cross_entropy", "contrast"):
            expected[term] = criterion.terms(maps, None)[term]
        else:
            expected[term] = expected[term] * 3 / 5
        torch.testing.assert_close(value, expected[term])
    actual = gradients(criterion(maps, human), model)
    assert_same_gradients(actual, gradients(criterion.weighted_sum(expected), model))


@every_loss_with_maps
@pytest.mark.parametrize("empty", [None, *no_maps()])
def test_a_batch_without_human_maps_is_finite(name: str, empty: str | None) -> None:
    model, maps = tiny_maps()
    criterion = LOSSES[name]()
    human = None if empty is None else no_maps()[empty].expand(5, -1, -1)
    terms = criterion.terms(maps, human)
    assert terms.keys() == TERMS[name].keys()
    for term in terms.keys() - {"cross_entropy", "contrast"}:
        assert terms[term] == 0
    needs_none = {key: terms[key] for key in terms if key in ("cross_entropy", "contrast")}
    rest = criterion.weighted_sum(needs_none)
    assert_same_gradients(gradients(criterion(maps, human), model), gradients(rest, model))


@every_loss
def test_shards_average_to_the_joint_batch(name: str) -> None:
    torch.manual_seed(2)
    model = tiny()
    images = torch.randn(5, 1, 9, 9, dtype=torch.float64)
    human = torch.rand(5, 9, 9)
    human[[0, 1, 3]] = torch.nan  # the first shard of two has none at all
    criterion = LOSSES[name]()
    whole = criterion(take_maps(model, images), human)
    shards = sum(
        len(part) / 5 * criterion(take_maps(model, images[part], LABELS[part]), human[part])
        for part in ([0, 1], [2, 3, 4])
    )
    torch.testing.assert_close(shards, whole, rtol=0, atol=1e-12)
    for one, other in zip(gradients(shards, model), gradients(whole, model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


rows = st.sampled_from(["random", "zero", "constant", "one cell", "tiny", "huge"])


def hard_map(kind: str, seed: int, shape: tuple[int, int]) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "zero":
            return values * 0
        case "constant":
            return torch.full(shape, float(values[0, 0]))
        case "one cell":
            return torch.eye(shape[0] * shape[1])[0].view(shape)
        case "tiny":
            return values * 1e-30
        case "huge":
            return values * 1e30
    return values


@settings(deadline=None)
@given(
    kinds=st.lists(rows, min_size=9, max_size=9),
    name=st.sampled_from(list(LOSSES)),
    pool=st.sampled_from(["area", "max"]),
    scale=st.sampled_from([0.0, 1.0, 1e4, 1e30]),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_finite(
    kinds: list[str], name: str, pool: str, scale: float, outputs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    true, false = (
        torch.stack([hard_map(kind, seed + i, (3, 4)) for i, kind in enumerate(three)])
        for three in (kinds[:3], kinds[3:6])
    )
    human = torch.stack([hard_map(kind, seed, (8, 7)) for kind in kinds[6:]])
    logits = torch.randn(3, outputs) * scale
    leaves = [leaf.requires_grad_() for leaf in (true, false, logits)]
    maps = label_maps(*leaves)
    criterion = LOSSES[name]() if name == "cross-entropy" else LOSSES[name](pool=pool)
    loss = criterion(maps, human)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, leaves, materialize_grads=True):
        assert gradient.isfinite().all()


def label_maps(true: Tensor, false: Tensor, logits: Tensor) -> SalienceMaps:
    classes = torch.arange(len(true), device=true.device) % 2
    score = logits[:, 0]
    return SalienceMaps(true, false, logits, score, score, classes, 1 - classes, "label")


def test_detaching_the_target_leaves_the_false_map_alone_to_move() -> None:
    torch.manual_seed(0)
    true = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    false = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    maps = label_maps(true, false, torch.randn(4, 2, dtype=torch.float64))

    def contrast_term(detach: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        criterion = ContrastSalienceLoss(detach_target=detach)
        term = criterion.terms(maps, None)["contrast"]
        return term, *torch.autograd.grad(term, [true, false], allow_unused=True)

    literal, literal_true, literal_false = contrast_term(False)
    detached, detached_true, detached_false = contrast_term(True)
    assert literal == detached
    assert detached_true is None
    expected = ((1 - norm(true) - norm(false)) ** 2).mean((1, 2)).sum() / 4
    for_true, for_false = torch.autograd.grad(expected, [true, false])
    torch.testing.assert_close(literal_true, for_true)
    torch.testing.assert_close(literal_false, for_false)
    torch.testing.assert_close(detached_false, for_false)
    function = contrast_salience_loss(maps, None, detach_target=True)
    assert torch.autograd.grad(function, true, allow_unused=True)[0].count_nonzero() == 0


@every_loss
def test_autocast_changes_the_network_and_not_the_loss(name: str) -> None:
    torch.manual_seed(0)
    model = tiny().float()
    images, human = torch.randn(5, 1, 9, 9), torch.rand(5, 20, 20)
    criterion = LOSSES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        maps = take_maps(model, images)
        assert maps.logits.dtype == torch.bfloat16
        inside = criterion(maps, human)
    outside = criterion(maps, human)
    assert inside.dtype == torch.float32
    assert inside == outside
    full = criterion(take_maps(model, images), human)
    torch.testing.assert_close(inside, full, rtol=0.05, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(inside, model))


@every_loss
def test_nothing_waits_for_the_device(name: str) -> None:
    """On the meta device whatever needs a value on the host (item, boolean indexing) raises."""
    true, false, logits = (
        torch.empty(shape, device="meta") for shape in [(2, 7, 7)] * 2 + [(2, 2)]
    )
    for human in (None, torch.empty(2, 30, 20, device="meta")):
        assert LOSSES[name]()(label_maps(true, false, logits), human).shape == ()


@every_loss
def test_smoke(name: str) -> None:
    _, maps = tiny_maps()
    criterion = LOSSES[name]()
    assert criterion.weights == TERMS[name]
    assert repr(criterion).startswith(f"{type(criterion).__name__}(cross_entropy=")
    assert not list(criterion.parameters())
    loss = criterion(maps, torch.rand(5, 9, 9))
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert list(criterion.terms(maps, None)) == list(TERMS[name])
    with torch.no_grad():
        validation = replace(
            maps,
            **{
                field: value.detach()
                for field, value in vars(maps).items()
                if isinstance(value, Tensor)
            },
        )
        assert not criterion(validation, None).requires_grad


@every_loss
def test_a_loss_on_the_models_own_predictions_is_refused(name: str) -> None:
    model = tiny()
    with capture(model) as captured:
        maps = captured.maps(model(torch.randn(5, 1, 9, 9, dtype=torch.float64)))
    with pytest.raises(DiffsalError, match=r"prediction's, not the label.*true=labels"):
        LOSSES[name]()(maps, None)


@every_loss_with_maps
@pytest.mark.parametrize(
    ("human", "message"),
    [
        (torch.rand(4, 9, 9), r"\(4, 9, 9\) for a batch of 5: pass \(5, height, width\)"),
        (torch.rand(5, 3, 9, 9), r"\(5, 3, 9, 9\)"),
        (torch.rand(5, 81), r"\(5, 81\)"),
        (torch.rand(5, 0, 9), r"\(5, 0, 9\)"),
        (torch.rand(5, 9, 9, dtype=torch.complex64), "complex64"),
        (torch.rand(5, 9, 9, device="meta"), "human maps are on meta, the model's maps on cpu"),
    ],
)
def test_human_maps_that_do_not_fit_are_refused(name: str, human: Tensor, message: str) -> None:
    _, maps = tiny_maps()
    with pytest.raises(DiffsalError, match=message):
        LOSSES[name]()(maps, human)


@every_loss_with_maps
def test_an_unknown_pool_is_refused(name: str) -> None:
    with pytest.raises(DiffsalError, match="pool 'mean' is unknown: pass one of area, max"):
        LOSSES[name](pool="mean")
    with pytest.raises(DiffsalError, match="pool 'mean'"):
        FUNCTIONS[name](tiny_maps()[1], torch.rand(5, 9, 9), pool="mean")


def test_public_names_and_examples() -> None:
    public = {cls.__name__ for cls in LOSSES.values()} | {f.__name__ for f in FUNCTIONS.values()}
    own = {name for name, one in vars(losses).items() if one.__class__ in (type, FunctionType)}
    own = {name for name in own if getattr(losses, name).__module__ == losses.__name__}
    assert {name for name in own if not name.startswith("_")} == public | {"SalienceLoss"}
    for cls in LOSSES.values():
        assert all(part in (cls.__doc__ or "") for part in ("CE", "Term", "Shape:", ">>>"))
    results = doctest.testmod(losses)
    assert results.attempted > 20
    assert results.failed == 0
