"""The demo: a small network trained on handwritten digits, to be explained.

The digits 3 and 8 differ by the left side alone, which an 8 closes. So anyone can see whether a
map of the evidence for 8 against 3 is right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights

from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import save_checkpoint
from diffsal.models.pretrained import PRETRAINED, pretrained_efficientnet_lite0
from diffsal.system.files import check_writable, replacing
from diffsal.system.locks import sole_writer

CLASSES = ("3", "8")
ARCHITECTURE = "torchvision:DenseNet"
ARGUMENTS = {"growth_rate": 16, "block_config": (4, 4), "num_init_features": 32, "num_classes": 2}
PREPROCESSING = Preprocessing(size=(64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_FILES = {"image.png", "china.png", "flower.png", "weights.pt", "explanations"}


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's handwritten 3s and 8s, enlarged from 8 x 8 to 64 x 64 pixels.

    Attributes:
        images: (N, 64, 64, 3) uint8, white on black.
        labels: (N,) int64, indices into :data:`CLASSES`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs (N, 3, 64, 64) float32 as the network takes them, and labels (N,)."""
        inputs = torch.stack([PREPROCESSING(image) for image in self.images])
        return inputs, torch.from_numpy(self.labels)


def digits(seed: int = 0) -> tuple[Digits, Digits]:
    """The digits for training, and a third of them held out, stratified by label.

    Example:
        >>> train, held_out = digits()
        >>> len(train.labels), len(held_out.labels), train.images.shape[1:]
        (238, 119, (64, 64, 3))
    """
    data = load_digits()
    chosen = np.isin(data.target, [int(name) for name in CLASSES])
    labels = (data.target[chosen] == int(CLASSES[1])).astype(np.int64)
    images = np.stack([_enlarged(image) for image in data.images[chosen]])
    split = train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=seed)
    return Digits(split[0], split[2]), Digits(split[1], split[3])


def _enlarged(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB"))


def train_digits(train: Digits, seed: int = 0, epochs: int = 6) -> nn.Module:
    """A small DenseNet with maps of 8 x 8 cells, in evaluation mode; seconds on a CPU."""
    return train_network(*train.tensors(), F.cross_entropy, seed, epochs)


def train_network(
    inputs: Tensor,
    wanted: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    seed: int = 0,
    epochs: int = 6,
) -> nn.Module:
    """The demo's network, trained for something; in evaluation mode.

    Args:
        inputs: (N, 3, 64, 64) float32.
        wanted: (N, ...): one of each input.
        loss_of: logits (B, 2) of a batch, and what is wanted of it, to a scalar.
        seed: of weights and batches; the global generators stay as they are.
        epochs: passes over the inputs.

    Example:
        >>> inputs, wanted = torch.rand(16, 3, 64, 64), torch.zeros(16, 2)
        >>> train_network(inputs, wanted, F.mse_loss, epochs=1)(inputs).shape
        torch.Size([16, 2])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(ARCHITECTURE, ARGUMENTS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs)).split(16):
                loss = loss_of(model(inputs[batch]), wanted[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return model.eval()


def write_digits_demo(folder: Path, seed: int = 0) -> tuple[list[Path], Path]:
    """Train, and write ``image.png``, a typical held-out 8, and ``weights.pt``; returns both."""
    train, held_out = digits(seed)
    model = train_digits(train, seed)
    inputs, labels = held_out.tensors()
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    print(
        f"Trained on {len(train.labels)} digits; accuracy on {len(labels)} others {accuracy:.3f}."
    )
    image = folder / "image.png"
    with replacing(image) as scratch:
        Image.fromarray(_most_typical(held_out.images[held_out.labels == 1])).save(scratch)
    weights = folder / "weights.pt"
    save_checkpoint(
        weights,
        model,
        architecture=ARCHITECTURE,
        arguments=ARGUMENTS,
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        target_layer="features",
    )
    return [image], weights


def _most_typical(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image nearest to the mean of them all."""
    distances = ((images - images.mean(0)) ** 2).sum((1, 2, 3))
    typical: NDArray[np.uint8] = images[distances.argmin()]
    return typical


def write_photographs_demo(folder: Path) -> tuple[list[Path], Path]:
    """Write scikit-learn's photographs and EfficientNet-Lite0 as a checkpoint of ours."""
    images = []
    for photograph in ("china", "flower"):
        images.append(folder / f"{photograph}.png")
        with replacing(images[-1]) as scratch:
            Image.fromarray(load_sample_image(f"{photograph}.jpg")).save(scratch)
    weights = folder / "weights.pt"
    save_checkpoint(
        weights,
        pretrained_efficientnet_lite0(),
        architecture=PRETRAINED,
        arguments={"num_classes": 1000},
        classes=EfficientNet_B0_Weights.DEFAULT.meta["categories"],
        preprocessing=Preprocessing(resize="crop", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        target_layer="bn2",
    )
    return images, weights


def write_demo(folder: Path, pretrained: bool = False) -> tuple[list[Path], Path]:
    """Write the demo's images and weights to a folder; returns their paths.

    Raises:
        DiffsalError: ``folder`` holds something or cannot be written to, or the extra
            ``pretrained`` is not installed.
    """
    _check_folder(folder)
    with sole_writer(folder):
        return (write_photographs_demo if pretrained else write_digits_demo)(folder)


def _check_folder(folder: Path) -> None:
    """See, before it takes time, that the demo writes over nothing but an earlier demo."""
    check_writable(folder)
    there = {path.name for path in folder.glob("[!.]*")}
    if there - _FILES or there == {"weights.pt"}:
        some = min(there - _FILES or there)
        raise DiffsalError(f"{folder}: holds other files, as {some}; name an empty --out")
