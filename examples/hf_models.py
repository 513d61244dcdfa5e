"""Maps of Hugging Face's image classifiers, a ViT and a ResNet, by the layers that are found.

pip install 'diffsal[transformers]'
python examples/hf_models.py FOLDER

The networks are small and random, so that nothing is downloaded. Yours is
``ViTForImageClassification.from_pretrained("...").eval()``, and its processor makes the input.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import diffsal
from diffsal.demo import digits

NAMES = {0: "3", 1: "8"}


def networks() -> dict[str, nn.Module]:
    """Two classifiers of two classes; weights wide enough for maps that vary."""
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=8,
        initializer_range=0.3,
        id2label=NAMES,
    )
    resnet = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        id2label=NAMES,
    )
    return {
        "vit": ViTForImageClassification(vit).eval(),
        "resnet": ResNetForImageClassification(resnet).eval(),
    }


def main(folder: str | Path) -> dict[str, diffsal.SalienceMaps]:
    """Explain two digits by either network, and draw the first."""
    images = digits()[1].images[:2]
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    found = {}
    for name, model in networks().items():
        maps = diffsal.explain(model, pixel_values, true=1)
        figure = maps.figure(images[0], classes=tuple(NAMES.values()))
        figure.savefig(Path(folder) / f"{name}.png")
        layer = diffsal.find_target_layer(model).name
        # Of a ResNet the residual is the bias; behind attention, maps are of first order.
        print(f"{name}: maps {tuple(maps.difference.shape)} at {layer}, residual {maps.residual}")
        found[name] = maps
    return found


if __name__ == "__main__":
    main(sys.argv[1])
