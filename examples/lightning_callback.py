"""A Lightning callback: what speaks for and against fixed validation images, at every epoch.

pip install lightning tensorboard
python examples/lightning_callback.py logs
"""

import io
import sys
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffsal
from diffsal.data.preprocessing import Preprocessing
from diffsal.demo import ARGUMENTS, CLASSES, PREPROCESSING, digits
from diffsal.models.architectures import build_model


class SalienceImages(lightning.Callback):  # type: ignore[misc]
    """Logs a figure of each image to every logger that takes images.

    Args:
        pictures: uint8 (H, W, 3) each, or whatever ``preprocessing`` takes.
        labels: one class for each.
        preprocessing: from a picture to the model's input.
        classes: names.
    """

    def __init__(
        self,
        pictures: Sequence[Any],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.pictures, self.labels, self.classes = pictures, list(labels), classes
        self.preprocessing = preprocessing

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        inputs = torch.stack([self.preprocessing(one) for one in self.pictures])
        maps = diffsal.explain(module, inputs.to(module.device), true=self.labels)
        for sample, picture in enumerate(self.pictures):
            told = {"classes": self.classes, "preprocessing": self.preprocessing}
            figure = maps.figure(picture, sample, title=f"validation {sample}", **told)
            file = io.BytesIO()
            figure.savefig(file, format="png")
            pixels = np.asarray(Image.open(file).convert("RGB"))
            for logger in trainer.loggers:
                _log(logger, f"salience/{sample}", pixels, trainer.global_step)


def _log(logger: Any, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """TensorBoard's writer, loggers as Weights & Biases', and MLflow's client."""
    experiment = logger.experiment
    if hasattr(experiment, "add_image"):
        experiment.add_image(name, pixels, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[pixels], step=step)
    elif hasattr(experiment, "log_image"):
        experiment.log_image(logger.run_id, pixels, key=name.replace("/", "-"), step=step)


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """Yours; nothing in it knows of diffsal."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = build_model("torchvision:DenseNet", ARGUMENTS)

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(logger: Any, epochs: int = 3, samples: int | None = None) -> None:
    """Train on handwritten 3s and 8s; two of the held-out ones are watched."""
    train, held_out = digits()
    loaders = [
        DataLoader(TensorDataset(*(one[:samples] for one in part.tensors())), batch_size=16)
        for part in (train, held_out)
    ]
    watched = SalienceImages(
        list(held_out.images[:2]), held_out.labels[:2].tolist(), PREPROCESSING, CLASSES
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        logger=logger,
        callbacks=[watched],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), *loaders)


if __name__ == "__main__":
    from lightning.pytorch.loggers import TensorBoardLogger

    main(TensorBoardLogger(sys.argv[1]))
