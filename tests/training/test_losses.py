"""The losses against the paper's equations, computed from features and classifier weights."""

import doctest
import math
from collections.abc import Callable
from types import FunctionType
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock
from training.samples import (
    FUNCTIONS,
    LABELS,
    TERMS,
    assert_same_gradients,
    gradients,
    label_maps,
    no_maps,
    norm,
    overlap_average,
    take_maps,
    tiny,
    tiny_maps,
)

from diffsal import DiffsalError, SalienceMaps
from diffsal.training import losses
from diffsal.training.losses import (
    LOSSES,
    BaselineSalienceLoss,
    ContrastSalienceLoss,
    contrast_salience_loss,
)

WITH_MAPS = [name for name in LOSSES if name != "cross-entropy"]
every_loss = pytest.mark.parametrize("name", LOSSES)
every_loss_with_maps = pytest.mark.parametrize("name", WITH_MAPS)


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


Network: TypeAlias = tuple[
    nn.Module, Callable[[Tensor], Tensor], Callable[[], tuple[Tensor, Tensor]]
]


def linear(layer: nn.Linear) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (layer.weight, layer.bias)


def densenet(outputs: int) -> Network:
    model = models.DenseNet(16, (2, 2), 16, num_classes=outputs)
    return model, lambda x: model.features(x).relu(), linear(model.classifier)


def resnet(outputs: int) -> Network:
    model = models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=outputs)
    return model, nn.Sequential(*list(model.children())[:-2]), linear(model.fc)


def efficientnet(outputs: int) -> Network:
    stages = [MBConvConfig(6, 3, 2, 16, 24, 1), MBConvConfig(6, 5, 2, 24, 40, 2)]
    model = models.EfficientNet(stages, 0.0, stochastic_depth_prob=0.0, num_classes=outputs)
    return model, model.features, linear(model.classifier[-1])


def convnext(outputs: int) -> Network:
    """A norm behind the pooling: centred features, times a scale that the image gives."""
    stages = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)]
    model = models.ConvNeXt(stages, layer_scale=0.1, num_classes=outputs)
    layer_norm, _, fc = model.classifier
    nn.init.uniform_(layer_norm.weight, 0.5, 1.5)
    nn.init.normal_(layer_norm.bias)

    def scaled(images: Tensor) -> Tensor:
        features = model.features(images)
        centred = features - features.mean(1, keepdim=True)
        pooled = centred.mean((2, 3), keepdim=True)
        spread = (pooled.square().mean(1, keepdim=True) + layer_norm.eps).sqrt()
        return centred / spread * layer_norm.weight[:, None, None]

    return model, scaled, lambda: (fc.weight, fc.bias + fc.weight @ layer_norm.bias)


@pytest.mark.parametrize("network", [densenet, resnet, efficientnet, convnext])
@pytest.mark.parametrize(
    "outputs", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_losses_and_their_gradients_are_those_of_the_equations(
    network: Callable[[int], Network], outputs: int
) -> None:
    torch.manual_seed(outputs)
    model, features, head = network(outputs)
    model.double().train()
    images = torch.randn(5, 3, 96, 96, dtype=torch.float64)
    human = torch.rand(5, 40, 40, dtype=torch.float64)
    human[3] = torch.nan
    labels = LABELS if outputs < 3 else LABELS + torch.tensor([0, 0, 1, 0, 1])
    maps = take_maps(model, images, labels)
    expected = equations(features(images), *head(), labels, human, [True, True, True, False, True])
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
    assert detached_true is not None
    assert not detached_true.any()
    expected = ((1 - norm(true) - norm(false)) ** 2).mean((1, 2)).sum() / 4
    for_true, for_false = torch.autograd.grad(expected, [true, false])
    torch.testing.assert_close(literal_true, for_true)
    torch.testing.assert_close(literal_false, for_false)
    torch.testing.assert_close(detached_false, for_false)
    function = contrast_salience_loss(maps, None, detach_target=True)
    assert torch.autograd.grad(function, true, allow_unused=True)[0].count_nonzero() == 0


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
    assert {name for name in own if not name.startswith("_")} == public | {
        "SalienceLoss",
        "cross_entropy",
    }
    for cls in LOSSES.values():
        assert all(part in (cls.__doc__ or "") for part in ("CE", "Term", "Shape:", ">>>"))
    results = doctest.testmod(losses)
    assert results.attempted > 20
    assert results.failed == 0


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_the_predicted_classes_map_is_what_the_authors_scripts_compare(outputs: int) -> None:
    torch.manual_seed(0)
    model, images = tiny(outputs), torch.randn(5, 1, 9, 9, dtype=torch.float64)
    logits = model(images)
    predicted = logits[:, 0].gt(0).long() if outputs == 1 else logits.argmax(1)
    assert 0 < int((predicted == LABELS).sum()) < 5
    weight = model[-1].weight
    rows = weight[predicted] if outputs > 1 else weight * (2 * predicted[:, None] - 1)
    seen = (model[:2](images) * rows[:, :, None, None]).sum(1)
    human = torch.rand(seen.shape, dtype=torch.float64)
    wanted = (norm(human) - norm(seen)).square().mean()
    criterion = BaselineSalienceLoss(map_of="predicted")
    found = criterion.terms(take_maps(model, images), human)["true"]
    torch.testing.assert_close(found, wanted)
    assert_same_gradients(gradients(found, model), gradients(wanted, model))
