"""Digits to audit, and networks that were never trained."""

import csv

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from diffsal.auditing.measure import Settings
from diffsal.data.preprocessing import Preprocessing
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import LoadedModel, load_model, save_checkpoint

NAMES = ("3", "8", "5")


PREPROCESSING = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


SCRIPT = "<script>alert(1)<&script>.png"


def settings(**options):
    defaults = {"subset": 2, "batch_size": 64}
    return Settings(PREPROCESSING, torch.device("cpu"), **defaults | options)


def write_index(folder, per_class=(10, 10), maps=True, splits=()):
    """Digits as PNG files, human maps for the second class, and an index; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    Image.fromarray(half).save(folder / "left.png")
    lines = [["path", "label", *(["map"] if maps else []), *(["split"] if splits else [])]]
    for name, count in zip(NAMES, per_class, strict=False):
        for number, digit in enumerate(data.images[data.target == int(name)][:count]):
            file = f"{name}-{number}.png" if (name, number) != ("3", 1) else SCRIPT
            Image.fromarray((digit * 15).astype(np.uint8)).resize((32, 32)).save(folder / file)
            line = [file, name]
            if maps:
                line.append("left.png" if name == "8" else "")
            if splits:
                line.append(splits[number % len(splits)])
            lines.append(line)
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder / "index.csv"


def model_file(path, outputs=2, seed=0):
    """A small DenseNet with maps of 4 x 4 cells, untrained."""
    torch.manual_seed(seed)
    arguments = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8}
    arguments["num_classes"] = outputs
    model = build_model("torchvision:DenseNet", arguments)
    nn.init.normal_(model.classifier.weight)
    classes = NAMES[:outputs] if 1 < outputs <= len(NAMES) else None
    save_checkpoint(
        path,
        model,
        architecture="torchvision:DenseNet",
        arguments=arguments,
        classes=classes,
        preprocessing=PREPROCESSING,
    )
    return path


def loaded_model(folder, **options) -> LoadedModel:
    return load_model(model_file(folder / "weights.pt", **options))
