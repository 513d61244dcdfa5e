"""From a state's parameter names and shapes to the architecture that they are of."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models.resnet import Bottleneck

from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError, some_of
from diffsal.models.architectures import INCEPTIONS, find_factory, timm_with
from diffsal.models.fitting import AUXILIARY_HEADS, PASS_ARCH, behind_each, name_prefixes
from diffsal.models.reading import State

# Every classification model of torchvision: under a key that its family alone has, the number of
# its backbone's keys (without heads and num_batches_tracked) and of their elements (without the
# position embedding, which follows the image's size).
# fmt: off
ARCHITECTURES: dict[str, dict[str, tuple[int, int]]] = {
    "Conv2d_1a_3x3.conv.weight": {
        "inception_v3": (470, 21_820_000),
    },
    "class_token": {
        "vit_b_16": (150, 85_647_360), "vit_b_32": (150, 87_416_832),
        "vit_h_14": (390, 630_435_840), "vit_l_16": (294, 303_099_904),
        "vit_l_32": (294, 305_459_200),
    },
    "conv1.0.weight": {
        "shufflenet_v2_x0_5": (280, 349_744), "shufflenet_v2_x1_0": (280, 1_269_784),
        "shufflenet_v2_x1_5": (280, 2_502_064), "shufflenet_v2_x2_0": (280, 5_378_712),
    },
    "conv1.conv.weight": {
        "googlenet": (285, 5_614_464),
    },
    "conv1.weight": {
        "resnet101": (520, 42_605_504), "resnet152": (775, 58_295_232),
        "resnet18": (100, 11_186_112), "resnet34": (180, 21_301_696), "resnet50": (265, 23_561_152),
        "resnext101_32x8d": (520, 86_945_216), "resnext101_64x4d": (520, 81_609_152),
        "resnext50_32x4d": (265, 23_048_128), "wide_resnet101_2": (520, 124_975_552),
        "wide_resnet50_2": (265, 66_902_464),
    },
    "features.0.0.weight": {
        "convnext_base": (340, 87_564_416), "convnext_large": (340, 196_227_264),
        "convnext_small": (340, 49_453_152), "convnext_tiny": (178, 27_818_592),
        "efficientnet_b0": (309, 4_049_564), "efficientnet_b1": (437, 6_575_232),
        "efficientnet_b2": (437, 7_768_562), "efficientnet_b3": (494, 10_783_528),
        "efficientnet_b4": (608, 17_673_816), "efficientnet_b5": (736, 28_513_520),
        "efficientnet_b6": (850, 40_960_136), "efficientnet_b7": (1035, 64_097_680),
        "efficientnet_v2_l": (1329, 117_746_848), "efficientnet_v2_m": (961, 53_150_388),
        "efficientnet_v2_s": (670, 20_331_360), "mobilenet_v2": (260, 2_257_984),
        "mobilenet_v3_large": (262, 2_996_352), "mobilenet_v3_small": (206, 939_120),
        "swin_b": (351, 86_800_848), "swin_s": (351, 48_894_882), "swin_t": (183, 27_548_166),
        "swin_v2_b": (447, 87_014_952), "swin_v2_s": (447, 49_077_546),
        "swin_v2_t": (231, 27_637_122),
    },
    "features.0.weight": {
        "alexnet": (10, 2_469_696), "squeezenet1_0": (50, 735_424), "squeezenet1_1": (50, 722_496),
        "vgg11": (16, 9_220_480), "vgg11_bn": (48, 9_231_488), "vgg13": (20, 9_404_992),
        "vgg13_bn": (60, 9_416_768), "vgg16": (26, 14_714_688), "vgg16_bn": (78, 14_731_584),
        "vgg19": (32, 20_024_384), "vgg19_bn": (96, 20_046_400),
    },
    "features.conv0.weight": {
        "densenet121": (604, 7_037_504), "densenet161": (804, 26_691_936),
        "densenet169": (844, 12_642_880), "densenet201": (1004, 18_321_984),
    },
    "layers.0.weight": {
        "mnasnet0_5": (260, 958_136), "mnasnet0_75": (260, 1_919_016),
        "mnasnet1_0": (260, 3_140_232), "mnasnet1_3": (260, 5_050_072),
    },
    "stem.0.0.weight": {
        "maxvit_t": (543, 30_244_382),
    },
    "stem.0.weight": {
        "regnet_x_16gf": (355, 52_340_704), "regnet_x_1_6gf": (295, 8_320_640),
        "regnet_x_32gf": (370, 105_452_576), "regnet_x_3_2gf": (400, 14_350_112),
        "regnet_x_400mf": (355, 5_132_832), "regnet_x_800mf": (265, 6_623_968),
        "regnet_x_8gf": (370, 37_742_112), "regnet_y_128gf": (538, 637_834_966),
        "regnet_y_16gf": (367, 80_687_956), "regnet_y_1_6gf": (538, 10_366_102),
        "regnet_y_32gf": (405, 141_492_058), "regnet_y_3_2gf": (424, 17_989_498),
        "regnet_y_400mf": (329, 3_930_296), "regnet_y_800mf": (291, 5_677_944),
        "regnet_y_8gf": (348, 37_451_000),
    },
}
# Where the first convolution is, if not under that key.
_STEMS = {"class_token": "conv_proj.weight"}
_HEADS = ("classifier.", "fc.", "head.", "heads.", *AUXILIARY_HEADS)


def recognize(state: State) -> str:
    """The torchvision classification model with a backbone of this many keys, nearest in size.

    Raises:
        DiffsalError: none has these names and so many of them.

    Example:
        >>> recognize(torchvision_models.squeezenet1_1(num_classes=2).state_dict())
        'squeezenet1_1'
    """
    for stem, family in ARCHITECTURES.items():
        for own in behind_each(state, name_prefixes(state, stem)).values():
            keys, elements = _backbone_size(own)
            elements += _missing_colours(own.get(_STEMS.get(stem, stem)))
            off = {name: abs(n - elements) for name, (k, n) in family.items() if k == keys}
            if off:
                return min(off, key=off.__getitem__)
    raise DiffsalError(
        f"no torchvision classification model has these parameters ({some_of(state)}): {PASS_ARCH}"
    )


def _backbone_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers of keys and of elements, as in ``ARCHITECTURES``."""
    backbone = {
        key: 0 if key == "encoder.pos_embedding" else value.numel()
        for key, value in state.items()
        if not key.startswith(_HEADS) and not key.endswith("num_batches_tracked")
    }
    return len(backbone), sum(backbone.values())


def _missing_colours(weight: Tensor | None) -> int:
    """By how many elements a first convolution falls short of one that takes three channels."""
    if weight is None or weight.ndim != 4:
        return 0
    return (3 - weight.shape[1]) * weight[:, 0].numel()


def constructor_arguments(architecture: str, state: State) -> dict[str, Any]:
    """The constructor's arguments as far as a plain state tells them before the model is built.

    Example:
        >>> positions, patches = nn.Embedding(50, 8).weight[None], nn.Conv2d(3, 8, 32).weight
        >>> state = {"encoder.pos_embedding": positions, "conv_proj.weight": patches}
        >>> constructor_arguments("torchvision:vit_b_32", state)  # 7 x 7 patches, one token
        {'image_size': 224}
    """
    source, _, name = architecture.partition(":")
    if source == "timm":
        head = timm_with(name).models.get_pretrained_cfg_value(name, "classifier")
        head = head[0] if isinstance(head, tuple) else head  # several, if distilled
        weight = _ending(state, f"{head}.weight")
        stem = timm_with(name).models.get_pretrained_cfg_value(name, "first_conv")
        stem = _ending(state, f"{stem[0] if isinstance(stem, tuple) else stem}.weight")
        grey = stem is not None and stem.ndim == 4 and stem.shape[1] == 1
        channels = {"in_chans": 1} if grey else {}
        return channels if weight is None else {"num_classes": len(weight), **channels}
    if source != "torchvision":
        weights = [v for k, v in state.items() if k.endswith("weight") and v.ndim > 1]
        takes = weights and _takes_num_classes(find_factory(architecture))
        return {"num_classes": len(weights[-1])} if takes else {}
    if name in INCEPTIONS:
        stems = (_ending(state, f"{name}.conv.weight") for name in ("conv1", "Conv2d_1a_3x3"))
        grey = any(stem is not None and stem.shape[1] == 1 for stem in stems)
        return {"transform_input": not grey}  # as with the published weights; undecided says so
    positions = _ending(state, "encoder.pos_embedding")
    patches = _ending(state, "conv_proj.weight")
    if name.startswith("vit_") and positions is not None and patches is not None:
        side = math.isqrt(positions.shape[1] - 1)  # one position is the class token's
        return {"image_size": side * patches.shape[-1]}
    return {}


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # built in C
        return False
    return "num_classes" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _ending(state: State, suffix: str) -> Tensor | None:
    return next((v for k, v in state.items() if k == suffix or k.endswith(f".{suffix}")), None)


def undecided(model: nn.Module) -> list[str]:
    """What a torchvision model computes, and its state does not tell."""
    if getattr(model, "transform_input", False):
        return [
            "transform_input=True is assumed, as with torchvision's published weights; a model "
            "trained without it needs --arch package.module:factory"
        ]
    if isinstance(model, torchvision_models.ResNet) and isinstance(model.layer1[0], Bottleneck):
        return [
            "no dilation is assumed (replace_stride_with_dilation); a model trained with it needs "
            "--arch package.module:factory"
        ]
    return []


def usual_preprocessing(model: nn.Module) -> Preprocessing | None:
    """What an architecture demands, or was published with; None if nothing else than usual.

    Example:
        >>> usual_preprocessing(torchvision_models.VisionTransformer(64, 32, 1, 1, 8, 8)).size
        (64, 64)
        >>> usual_preprocessing(nn.Linear(4, 2))
    """
    if isinstance(model, torchvision_models.VisionTransformer):
        return Preprocessing(size=(model.image_size, model.image_size))
    if isinstance(model, torchvision_models.Inception3):
        return Preprocessing(size=(299, 299))
    match getattr(model, "pretrained_cfg", None):  # timm's
        case {"input_size": (3, height, width), "mean": mean, "std": std}:
            return Preprocessing(size=(height, width), mean=tuple(mean), std=tuple(std))
    return None


def preprocessing_note(preprocessing: Preprocessing) -> str:
    """What to note where a file does not tell the preprocessing, and this one is assumed."""
    height, width = preprocessing.size
    mean, std = (" ".join(map(str, v)) for v in (preprocessing.mean, preprocessing.std))
    grey = ", grey" if preprocessing.channels == 1 else ""
    return (
        f"the file does not tell the preprocessing; assumed unless given: {height} x {width} "
        f"pixels{grey}, mean {mean}, std {std} (--size, --mean, --std)"
    )
