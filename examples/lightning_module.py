"""Salience in Lightning: everything happens in ``training_step``.

pip install lightning
python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diffsal import PerClassSalienceLoss, capture
from diffsal.demo import ARGUMENTS, digits
from diffsal.models.architectures import build_model


class SalienceClassifier(lightning.LightningModule):  # type: ignore[misc]
    """A classifier that learns from images, labels and human maps (Eq. 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model("torchvision:DenseNet", ARGUMENTS)
        self.criterion = PerClassSalienceLoss()

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        images, labels, human_maps = batch
        with capture(self.model) as captured:
            maps = captured.maps(self.model(images), true=labels)
        terms = self.criterion.terms(maps, human_maps)
        self.log_dict({name: term.detach() for name, term in terms.items()}, on_epoch=True)
        return self.criterion.weighted_sum(terms)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(epochs: int = 3, samples: int | None = None) -> nn.Module:
    """Train on handwritten 3s and 8s, with human maps that mark the left half."""
    images, labels = (tensor[:samples] for tensor in digits()[0].tensors())
    human_maps = torch.zeros(len(images), 64, 64)
    human_maps[:, :, :32] = 1
    loader = DataLoader(TensorDataset(images, labels, human_maps), batch_size=16, shuffle=True)
    module = SalienceClassifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    return module.model


if __name__ == "__main__":
    main()
