"""Salience in a Hugging Face ``Trainer``: everything happens in ``compute_loss``.

pip install transformers accelerate
python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from diffsal import DifferenceSalienceLoss, capture
from diffsal.demo import digits


class SalienceTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose batches have ``human_maps`` beside images and labels (Eq. 3)."""

    criterion = DifferenceSalienceLoss()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        **_: Any,
    ) -> Any:
        labels, human_maps = inputs.pop("labels"), inputs.pop("human_maps")
        layer = self.model.resnet.encoder.stages[-1]  # the encoder itself returns no tensor
        with capture(model, layer) as captured:
            outputs = model(**inputs)
            maps = captured.maps(outputs.logits, true=labels)
        loss = self.criterion(maps, human_maps)
        return (loss, outputs) if return_outputs else loss


class Digits(Dataset[dict[str, Tensor]]):
    """Handwritten 3s and 8s, with human maps that mark the left half."""

    def __init__(self, samples: int | None) -> None:
        self.images, self.labels = (tensor[:samples] for tensor in digits()[0].tensors())
        self.human_map = torch.zeros(64, 64)
        self.human_map[:, :32] = 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "pixel_values": self.images[index],
            "labels": self.labels[index],
            "human_maps": self.human_map,
        }


def main(epochs: int = 3, samples: int | None = None) -> nn.Module:
    """Train a small ResNet from scratch."""
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model: nn.Module = ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            remove_unused_columns=False,  # they are our human maps
            report_to=[],
            save_strategy="no",
            logging_steps=10,
        )
        SalienceTrainer(model=model, args=arguments, train_dataset=Digits(samples)).train()
    return model


if __name__ == "__main__":
    main()
