"""Families of classifiers of other libraries, the smallest variant of each, with random weights.

What is stated of each, ``head``, is read off the architecture: whether behind the last feature map
over space there is only averaging, norms and linear layers, so that a map adds up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from torch import nn

Head = Literal["pooled", "first order", "refused"]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        library: what has to be installed.
        name: within the library.
        make: the model with two classes, unpretrained.
        head: ``pooled``, linear up to norms behind the layer; ``first order``, anything else;
            ``refused``, there is no such layer.
        reason: why it is refused, a pattern of the message.
        shape: (channels, height, width) or (channels, depth, height, width) of an image, passed as
            an example; ``None``: the layer is found without one.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    head: Head
    reason: str = ""
    shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


def _calls(module: str, function: str, *positional: Any, **named: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module(module), function)(*positional, **named)


_NAMED: dict[str, dict[Head, str]] = {
    "timm": {
        "pooled": """
        bat_resnext26ts beit_base_patch16_224 botnet26t_256 coatnet_pico_rw_224
        convmixer_768_32 convnext_atto convnextv2_atto cspdarknet53 cspresnet50 darknet21
        davit_tiny densenet121 dla46_c dpn48b eca_resnet33ts edgenext_xx_small
        efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn
        efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fastvit_t8 fbnetc_100
        focalnet_tiny_srf gcvit_xxtiny gernet_s gmlp_ti16_224 halonet26t hiera_tiny_224
        hrnet_w18_small inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t
        legacy_seresnet18 legacy_xception levit_128s levit_conv_128s mixer_s32_224 mixnet_s
        mnasnet_small mobilenetv2_035 mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
        nest_tiny nextvit_small nf_regnet_b0 nfnet_f0 poolformer_s12 poolformerv2_s12
        pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repvgg_a0 repvit_m0_9
        res2net50_48w_2s resmlp_12_224 resnest14d resnet10t resnetv2_18 resnetv2_50
        rexnet_100 samvit_base_patch16_224 selecsls42b sequencer2d_s seresnext26t_32x4d
        shvit_s1 skresnet18 spnasnet_100 starnet_s050 swiftformer_xs
        swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
        test_efficientnet test_resnet tf_efficientnetv2_b0 tiny_vit_5m_224 tinynet_e
        tresnet_m twins_pcpvt_small twins_svt_small visformer_tiny
        vit_little_patch16_reg1_gap_256 vit_relpos_small_patch16_224 vitamin_small_224
        vovnet39a wide_resnet50_2 xception41
        """,
        "first order": """
        caformer_s18 cait_xxs24_224 coat_lite_tiny coat_tiny convformer_s18 convit_tiny
        csatv2 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224
        efficientvit_b0 fasternet_t0 flexivit_small ghostnet_050 ghostnetv2_100
        hardcorenas_a hgnet_tiny hgnetv2_b0 inception_next_atto lcnet_035 mambaout_femto
        maxvit_pico_rw_256 mobilenetv3_small_050 mobilenetv4_conv_small_035 pit_ti_224
        pit_ti_distilled_224 repghostnet_050 test_vit vgg11
        vit_base_patch16_siglip_224 vit_small_patch16_dinov3 vit_tiny_patch16_224
        volo_d1_224 xcit_nano_12_p16_224
        """,
    },
    "torchvision": {
        "pooled": """
        convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5
        mobilenet_v2 regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t
        swin_v2_t
        """,
        "first order": """
        alexnet maxvit_t mobilenet_v3_small vgg11 vit_b_32
        """,
    },
    "pytorchcv": {
        "pooled": """
        airnet50_1x64d_r2 bam_resnet18 bninception cbam_resnet18 darknet_tiny densenet121
        diaresnet10 dla34 dpn68 efficientnet_b0 fishnet99 hardnet39ds ibn_resnet50 igcv3_w1
        inceptionv3 mixnet_s mnasnet_small mobilenet_w1 peleenet preresnet10
        proxylessnas_cpu regnetx002 resnet10 seresnet10 shufflenetv2_wd2 spnasnet
        squeezenet_v1_0 xception xdensenet121_2
        """,
        "first order": """
        ghostnet vgg11
        """,
    },
}
_VIDEO: dict[str, tuple[Head, tuple[int, ...]]] = {
    "r3d_18": ("pooled", (3, 8, 48, 48)),
    "mc3_18": ("pooled", (3, 8, 48, 48)),
    "r2plus1d_18": ("pooled", (3, 8, 48, 48)),
    "s3d": ("pooled", (3, 16, 224, 224)),
    "swin3d_t": ("pooled", (3, 8, 64, 64)),
    "mvit_v2_s": ("first order", (3, 16, 224, 224)),
}
_TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
_TINY_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_TINY_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
_TINY_DINO = {key: _TINY_VIT[key] for key in list(_TINY_VIT)[:3]} | {"image_size": 224}
_TRANSFORMERS: dict[str, tuple[Head, dict[str, Any]]] = {
    "resnet": ("pooled", {"embedding_size": 8, **_TINY_STAGES}),
    "vit": ("first order", _TINY_VIT),
    "deit": ("first order", _TINY_VIT | {"architectures": ["DeiTForImageClassification"]}),
    "beit": ("pooled", _TINY_VIT),
    "data2vec-vision": ("pooled", _TINY_VIT),
    "dinov2": ("first order", _TINY_DINO),
    "dinov2_with_registers": ("first order", _TINY_DINO),
    "convnext": ("pooled", _TINY_STAGES),
    "convnextv2": ("pooled", _TINY_STAGES),
    "swin": ("pooled", _TINY_SWIN),
    "swinv2": ("pooled", _TINY_SWIN),
    "donut-swin": ("pooled", _TINY_SWIN),
    "efficientnet": (
        "pooled",
        {
            "image_size": 128,
            "width_coefficient": 0.5,
            "depth_coefficient": 0.5,
            "hidden_dim": 640,
            "initializer_range": 0.2,
        },
    ),
    "mobilenet_v1": ("pooled", {}),
    "mobilenet_v2": ("pooled", {}),
    "mobilevit": ("pooled", {}),
    "mobilevitv2": ("pooled", {}),
    "regnet": ("pooled", {}),
    "bit": ("pooled", {}),
    "levit": ("pooled", {"architectures": ["LevitForImageClassification"]}),
    "cvt": ("first order", {}),
    "focalnet": ("pooled", {}),
    "poolformer": ("pooled", {}),
    "pvt": ("first order", {}),
    "pvt_v2": ("pooled", {}),
    "segformer": ("pooled", {}),
    "hiera": ("pooled", {}),
    "siglip": ("pooled", {"vision_config": _TINY_VIT}),
    "clip": ("pooled", {"vision_config": _TINY_VIT}),
    "swiftformer": ("pooled", {}),
    "textnet": ("pooled", {}),
    "vit_msn": ("first order", _TINY_VIT),
    "ijepa": ("pooled", _TINY_VIT),
    "hgnet_v2": ("first order", {}),
    "perceiver": (
        "first order",
        {
            "num_latents": 8,
            "d_latents": 16,
            "num_blocks": 1,
            "architectures": ["PerceiverForImageClassificationLearned"],
        },
    ),
}


def _timm(name: str) -> nn.Module:
    import timm

    shallow = {"depth": 3} if "_base_" in name else {}  # of these no smaller variant has a name
    return timm.create_model(name, num_classes=2, **shallow)


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    # The initialisation of these two takes half a minute.
    skips = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=2, **skips)


def _pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    return get_model(name, pretrained=False, num_classes=2)


def _efficientnet_pytorch() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=2)


def _transformer(name: str, arguments: dict[str, Any]) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(name, num_labels=2, **arguments)
    return transformers.AutoModelForImageClassification.from_config(config)


def _monai() -> Iterator[Family]:
    nets = "monai.networks.nets"
    small = {"hidden_size": 48, "mlp_dim": 64, "num_layers": 2, "num_heads": 2, "num_classes": 2}
    for axes, side in ((2, 64), (3, 64)):
        image = (side,) * axes
        common = {"spatial_dims": axes, "in_channels": 1, "num_classes": 2}
        blocks = "efficientnet-b0"
        made: dict[str, tuple[Head, Callable[[], nn.Module]]] = {
            "DenseNet121": ("pooled", _calls(nets, "DenseNet121", axes, 1, 2)),
            "EfficientNetBN": (
                "pooled",
                _calls(nets, "EfficientNetBN", blocks, pretrained=False, **common),
            ),
            "SEResNet50": ("pooled", _calls(nets, "SEResNet50", **common)),
            "resnet18": (
                "pooled",
                _calls(nets, "resnet18", spatial_dims=axes, n_input_channels=1, num_classes=2),
            ),
            "ViT": (
                "first order",
                _calls(
                    nets,
                    "ViT",
                    1,
                    image,
                    (8,) * axes,
                    classification=True,
                    spatial_dims=axes,
                    **small,
                ),
            ),
            "Classifier": (
                "first order",
                _calls(nets, "Classifier", (1, *image), 2, (8, 16, 32), (2, 2, 2)),
            ),
        }
        for name, (head, make) in made.items():
            # Of 32 pixels to a cell; a grid of 2 x 2 cells does not tell where anything is.
            shape = (1, 160, 160) if name == "EfficientNetBN" and axes == 2 else (1, *image)
            yield Family("monai", f"{name} {axes}-D", make, head, shape=shape)


def _all() -> Iterator[Family]:
    for library, by_head in _NAMED.items():
        for head, names in by_head.items():
            for name in names.split():
                yield Family(library, name, _calls(__name__, f"_{library}", name), head)
    for name in ("crossvit_tiny_240", "tnt_s_patch16_224"):  # patches and classes part early
        reason = "no feature map over space that the logits pass through"
        yield Family("timm", name, _calls(__name__, "_timm", name), "refused", reason)
    for name, (head, arguments) in _TRANSFORMERS.items():
        make = _calls(__name__, "_transformer", name, arguments)
        yield Family("transformers", name, make, head)
    for name, (head, shape) in _VIDEO.items():
        make = _calls(__name__, "_torchvision", name)
        yield Family("torchvision", name, make, head, shape=shape)
    yield from _monai()
    make = _calls(__name__, "_efficientnet_pytorch")
    yield Family("efficientnet_pytorch", "efficientnet-b0", make, "pooled")


FAMILIES = tuple(_all())

QUICK: frozenset[str] = frozenset(
    f"{library}:{name}"
    for library, names in {
        "timm": "resnetv2_18 nf_regnet_b0 regnetx_002 levit_128s starnet_s050 edgenext_xx_small "
        "tinynet_e test_resnet",
        "transformers": "resnet vit beit dinov2_with_registers convnextv2 swin",
        "torchvision": "squeezenet1_1 shufflenet_v2_x0_5",
    }.items()
    for name in names.split()
)
