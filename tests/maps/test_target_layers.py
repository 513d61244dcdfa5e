"""The layer found in every architecture, and what brings its output to (B, C, h, w)."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from diffsal.maps.layouts import Layout
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import (
    find_target_layer,
    get_target_layer,
    unwrap,
)

Make = Callable[..., nn.Module]
Refused = Callable[[str], AbstractContextManager[None]]

# Family (a pattern of names): the layer, and one model's grid for an image of a size.
FAMILIES = {
    r"alexnet": ("features", "alexnet", 224, 6),
    r"convnext_.*": ("features", "convnext_tiny", 224, 7),
    r"densenet\d+": ("features", "densenet121", 224, 7),
    r"efficientnet_b\d": ("features", "efficientnet_b0", 224, 7),
    r"efficientnet_v2_.": ("features", "efficientnet_v2_s", 224, 7),
    r"googlenet": ("inception5b", "googlenet", 224, 7),
    r"inception_v3": ("Mixed_7c", "inception_v3", 299, 8),
    r"maxvit_t": ("blocks.3", "maxvit_t", 224, 7),
    r"mnasnet\d_\d+": ("layers", "mnasnet0_5", 224, 7),
    r"mobilenet_v2": ("features", "mobilenet_v2", 224, 7),
    r"mobilenet_v3_.*": ("features", "mobilenet_v3_small", 224, 7),
    r"regnet_x_.*": ("trunk_output", "regnet_x_400mf", 224, 7),
    r"regnet_y_.*": ("trunk_output", "regnet_y_400mf", 224, 7),
    r"resnet\d+": ("layer4", "resnet18", 224, 7),
    r"resnext\d+_.*": ("layer4", "resnext50_32x4d", 224, 7),
    r"shufflenet_v2_.*": ("conv5", "shufflenet_v2_x0_5", 224, 7),
    r"squeezenet1_\d": ("classifier.1", "squeezenet1_1", 224, 13),
    r"swin_[tsb]": ("permute", "swin_t", 224, 7),
    r"swin_v2_[tsb]": ("permute", "swin_v2_t", 256, 8),
    r"vgg\d+(_bn)?": ("features", "vgg11", 224, 7),
    r"vit_b_\d+": ("encoder.layers.encoder_layer_11.ln_1", "vit_b_16", 224, 14),
    r"vit_h_\d+": ("encoder.layers.encoder_layer_31.ln_1", "vit_h_14", 224, 16),
    r"vit_l_\d+": ("encoder.layers.encoder_layer_23.ln_1", "vit_l_32", 224, 7),
    r"wide_resnet\d+_2": ("layer4", "wide_resnet50_2", 224, 7),
}
CLASSIFIERS = models.list_models(module=models)
QUICK = {"vit_b_32"} | {name for _, name, *_ in FAMILIES.values() if not name.startswith("vit")}


def test_the_table_knows_every_classifier_of_torchvision() -> None:
    matches = {name: [p for p in FAMILIES if re.fullmatch(p, name)] for name in CLASSIFIERS}
    assert {name: len(found) for name, found in matches.items()} == dict.fromkeys(CLASSIFIERS, 1)
    assert len(CLASSIFIERS) >= 80


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFIERS],
)
def test_layer_of_every_classifier_of_torchvision(meta_classifier: Make, name: str) -> None:
    (expected,) = {row[0] for family, row in FAMILIES.items() if re.fullmatch(family, name)}
    # Of a ViT, the values of gradients tell, which no meta tensor has.
    model = models.get_model(name) if name.startswith("vit") else meta_classifier(name)
    layer = find_target_layer(model)
    assert layer.name == expected
    assert layer.module is model.get_submodule(expected)
    assert (layer.reshape is not None) == name.startswith("vit")


@pytest.mark.slow
@pytest.mark.parametrize("family", [one for one in FAMILIES if not re.match("vit_[hl]", one)])
def test_grid_of_every_family(meta_classifier: Make, family: str) -> None:
    _, name, size, side = FAMILIES[family]
    if name.startswith("vit"):
        maps = explain(models.get_model("vit_b_32"), torch.rand(2, 3, 224, 224))
        assert maps.true.shape == (2, 7, 7)
        return
    batch = torch.empty(2, 3, size, size, device="meta")
    maps = explain(meta_classifier(name), batch, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert maps.true.shape == (2, side, side)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r3d_18", "layer4"),
        pytest.param("s3d", "features", marks=pytest.mark.slow),
        ("swin3d_t", "norm"),
    ],
)
def test_video_classifiers(name: str, expected: str) -> None:
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
        clip = torch.empty(1, 3, 16, 224, 224)
    assert find_target_layer(model).name == expected
    assert explain(model, clip).true.ndim == 4


# --- tokens and windows -----------------------------------------------------------------------


def test_tokens_go_where_their_patch_is() -> None:
    tokens = torch.randn(2, 2 + 9, 4)
    grid = Layout("tokens", (3, 3), prefix=2)(tokens)
    assert grid.shape == (2, 4, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(grid[:, :, row, column], tokens[:, 2 + 3 * row + column])


@pytest.mark.parametrize("shape", [(2, 12, 4), (2, 9), (2, 3, 3, 4)])
def test_tokens_that_do_not_fill_the_grid(refused: Refused, shape: tuple[int, ...]) -> None:
    with refused(re.escape(f"shape {shape}") + ".*reshape_transform"):
        Layout("tokens", (3, 3), prefix=1)(torch.zeros(shape))


def test_channels_last() -> None:
    image, volume = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6, 5)
    plane, space = Layout("channels-last", (3, 4)), Layout("channels-last", (3, 4, 6))
    assert torch.equal(plane(image), image.permute(0, 3, 1, 2))
    assert torch.equal(space(volume), volume.permute(0, 4, 1, 2, 3))


def test_features_of_a_class_token_transformer_are_where_their_patch_is() -> None:
    """At the first block, a change of one patch changes the features of that cell."""
    model = models.VisionTransformer(96, 32, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8)
    layer = get_target_layer(model, "encoder.layers.encoder_layer_0.ln_1")
    seen = []
    layer.module.register_forward_hook(lambda _, __, output: seen.append(layer.reshape(output)))
    image = torch.randn(1, 3, 96, 96)
    changed = image.clone()
    changed[:, :, 32:64, 64:] += 1
    with torch.no_grad():
        model(image), model(changed)
    moved = (seen[0] - seen[1]).abs().sum(1)[0]
    assert moved.shape == (3, 3)
    assert moved.nonzero().tolist() == [[1, 2]]


def test_maps_of_windows_are_the_same_before_the_permutation() -> None:
    model = models.SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1, 2, 2, 2], [4, 4], num_classes=2)
    model.double()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    maps = {
        name: explain(model, images, target_layers=model.get_submodule(name)).true
        for name in ("permute", "norm")
    }
    assert maps["norm"].shape == (1, 2, 3)
    torch.testing.assert_close(maps["norm"], maps["permute"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("architecture", "name", "grid"),
    [
        ("vit_b_32", "conv_proj", (7, 7)),
        ("vit_b_32", "encoder.layers.encoder_layer_5.ln_2", (7, 7)),
        ("vit_b_32", "encoder.layers.encoder_layer_0", (7, 7)),
        ("swin_t", "features.0", (56, 56)),
        ("swin_t", "features.0.0", (56, 56)),
        ("swin_t", "features.7.1.norm1", (7, 7)),
        ("resnet18", "layer3", (14, 14)),
        ("densenet121", "features.denseblock3", (14, 14)),
        ("convnext_tiny", "features.5", (14, 14)),
        pytest.param("maxvit_t", "blocks.2", (14, 14), marks=pytest.mark.slow),
    ],
)
def test_a_named_layer_gets_the_reshape_it_needs(
    meta_classifier: Make, architecture: str, name: str, grid: tuple[int, int]
) -> None:
    model = meta_classifier(architecture)
    layer = get_target_layer(model, name)
    outputs: list[Tensor] = []
    layer.module.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    output = outputs[0] if layer.reshape is None else layer.reshape(outputs[0])
    assert output.shape[2:] == grid


# --- names, wrappers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("layer5", r"layer4"),
        ("layer4.1.conv3", r"layer4\.1\.conv2"),
        ("Layer4", r"layer4"),
        ("zzzzzz", r"conv1, bn1, .*layer4, avgpool, fc"),
        ("", r"layer4"),
    ],
)
def test_a_wrong_name_lists_near_ones(
    meta_classifier: Make, refused: Refused, name: str, near: str
) -> None:
    with refused(f"no layer {name!r}: .*{near}"):
        get_target_layer(meta_classifier("resnet18"), name)


class Wrapper(nn.Module):
    """A model of its own that holds another, and perhaps a head of its own."""

    def __init__(self, backbone: nn.Module, width: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Identity() if width is None else nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.head(features.flatten(1))


def headless(model: nn.Module, head: str) -> nn.Module:
    setattr(model, head, nn.Identity())
    return model


def with_sequential_head(model: nn.Module) -> nn.Module:
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 2), nn.LogSoftmax(1))
    return model


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, stride=8), nn.ReLU())


class PoolingFirst(nn.Module):
    """Pooling is registered before the layers that run before it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1, self.conv2 = convolution(3, 4), convolution(4, 5)
        self.fc = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.conv1(images))).flatten(1))


WRAPPERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "whole": (lambda: Wrapper(models.resnet18()), "backbone.layer4"),
    "sequential": (lambda: nn.Sequential(nn.Identity(), models.resnet18()), "1.layer4"),
    "twice": (lambda: Wrapper(Wrapper(models.resnet18())), "backbone.backbone.layer4"),
    "own head, fc": (
        lambda: Wrapper(headless(models.resnet18(), "fc"), 512),
        "backbone.layer4",
    ),
    "own head, classifier": (
        lambda: Wrapper(headless(models.densenet121(), "classifier"), 1024),
        "backbone.features",
    ),
    "own head, convnext": (
        lambda: Wrapper(headless(models.convnext_tiny(), "classifier"), 768),
        "backbone.features",
    ),
    "own head, swin": (
        lambda: Wrapper(headless(models.swin_t(), "head"), 768),
        "backbone.permute",
    ),
    "own head, vit": (
        lambda: Wrapper(headless(models.vit_b_32(), "heads"), 768),
        "backbone.encoder.layers.encoder_layer_11.ln_1",
    ),
    "children up to the pooling": (
        lambda: Wrapper(nn.Sequential(*list(models.resnet18().children())[:-1]), 512),
        "backbone.7",
    ),
    "sequential head": (lambda: with_sequential_head(models.resnet18()), "layer4"),
    "wrapped sequential head": (
        lambda: Wrapper(with_sequential_head(models.resnet18())),
        "backbone.layer4",
    ),
    "features with pooling": (
        lambda: Wrapper(
            nn.Sequential(convolution(3, 4), convolution(4, 5), nn.AdaptiveAvgPool2d(1)), 5
        ),
        "backbone.1",
    ),
    "flat": (
        lambda: nn.Sequential(
            *(*convolution(3, 4), *convolution(4, 5), nn.BatchNorm2d(5), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)),
        ),
        "4",
    ),
    "blocks": (
        lambda: nn.Sequential(
            nn.Sequential(convolution(3, 4), convolution(4, 5)),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)),
        ),
        "0",
    ),
    "pooling first": (PoolingFirst, "conv2"),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_wrappers(case: str) -> None:
    make, expected = WRAPPERS[case]
    # Whether a token is alive is in the gradients' values, which no meta tensor has.
    with torch.device("cpu" if "vit" in case else "meta"):
        model, images = make(), torch.rand(1, 3, 224, 224)
    layer = find_target_layer(model)
    assert layer.name == expected
    assert min(explain(model, images).true.shape[1:]) > 1


def test_data_parallel_prefixes(pooled_net: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    net = pooled_net()
    once = nn.DataParallel(net)
    twice = nn.DataParallel(once)
    assert unwrap(net) == ("", net)
    assert unwrap(twice) == ("module.module.", net)
    for model, prefix in ((once, "module."), (twice, "module.module.")):
        layer = find_target_layer(model)
        assert layer.name == prefix + "features"
        assert layer.module is net.features
        for name in ("first", prefix + "first"):  # as in the inner model, as in the state_dict
            layer = get_target_layer(model, name)
            assert (layer.name, layer.module) == (prefix + "first", net.first)


def test_models_without_features_over_space(refused: Refused) -> None:
    for model, example in (
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2)),
        (nn.Linear(3, 2), torch.rand(1, 3)),
    ):
        with refused(f"no feature map over space.* {type(model).__name__}: name the layer"):
            find_target_layer(model, example)


def test_a_model_that_runs_on_no_noise_needs_an_example(refused: Refused) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with refused("does not run on noise of any usual size .*pass example="):
        find_target_layer(model)


def test_a_head_that_begins_at_zero_hides_no_layer() -> None:
    """As torchvision's ViT has: its logits change with nothing yet."""
    model = models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8)
    assert not model.heads.head.weight.any()
    assert find_target_layer(model).name == "encoder.layers.encoder_layer_1.ln_1"
    assert not model.heads.head.weight.any()


# --- timm -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "side"),
    [
        ("resnet18", "layer4", 7),
        ("densenet121", "features", 7),
        ("regnetx_002", "s4", 7),
        ("efficientnet_lite0", "bn2", 7),
        ("mobilenetv3_small_050", "blocks", 7),
        ("convnext_atto", "stages", 7),
        ("swin_tiny_patch4_window7_224", "norm", 7),
        ("vit_tiny_patch16_224", "blocks.11.norm1", 14),
        ("deit_tiny_distilled_patch16_224", "blocks.11.norm1", 14),
        pytest.param(
            *("vit_small_patch14_reg4_dinov2", "blocks.11.norm1", 37), marks=pytest.mark.slow
        ),
    ],
)
def test_timm(name: str, expected: str, side: int) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=2)
    images = torch.rand(1, *model.default_cfg["input_size"])
    layer = find_target_layer(model)
    assert layer.name == expected
    assert explain(model, images).true.shape == (1, side, side)


def test_timm_backbones_without_a_head() -> None:
    timm = pytest.importorskip("timm")
    for name, width, expected in (
        ("resnet18", 512, "backbone.layer4"),
        ("efficientnet_b0", 1280, "backbone.bn2"),
        ("convnext_atto", 320, "backbone.stages"),
        ("vit_tiny_patch16_224", 192, "backbone.blocks.11.norm1"),
    ):
        model = Wrapper(timm.create_model(name, num_classes=0), width)
        assert find_target_layer(model).name == expected
