"""Digits to audit, networks that were never trained, and how audits of them are read."""

import csv

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from diffsal.auditing.run import audit
from diffsal.auditing.settings import Settings
from diffsal.data.index import read_index
from diffsal.data.preprocessing import Preprocessing
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import LoadedModel, load_model, save_checkpoint

NAMES = ("3", "8", "5")
PREPROCESSING = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SCRIPT = "<script>alert(1)<&script>.png"


def settings(**options):
    defaults = {"precision": 1.0, "batch_size": 64}
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


class BagOfFeatures(nn.Module):
    """No feature sees beyond its cell."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU())
        self.fc = nn.Linear(16, 2)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def read_rows(path):
    """Columns of a CSV: numbers with NaN for empty cells, and strings."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    texts = ("path", "label", "predicted")
    return {
        name: values if name in texts else np.array([float(v or "nan") for v in values])
        for name, values in columns.items()
    }


def audit_of(folder, loaded, per_class=(4, 4), **options):
    source = write_index(folder / "data", per_class, maps=False)
    index = read_index(source, classes=NAMES[: len(per_class)])
    result = audit(index, loaded, folder / "audit", settings(**options))
    page = (folder / "audit" / "report.html").read_text("utf-8")
    assert "nan" not in page.lower().replace("finance", "").split()
    assert "NaN" not in (folder / "audit" / "audit.json").read_text("utf-8")
    return result


def say(result, identity):
    (finding,) = (one for one in result["findings"] if one["id"] == identity)
    return finding["says"]
