"""Of an exact head, the sum of the difference is the margin less the bias, however trained."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from diffsal import capture


class Densely(nn.Module):
    """(Batch norm, ReLU,) average, linear: as in DenseNets and ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 5))
        self.fc = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(images).relu().mean((2, 3)))
        return logits

    def bias(self) -> Tensor:
        return self.fc.bias[1] - self.fc.bias[0]


class Normed(models.ConvNeXt):
    """A norm between the average and the linear layer."""

    def __init__(self) -> None:
        super().__init__(
            [CNBlockConfig(8, 8, 1), CNBlockConfig(8, None, 1)], layer_scale=0.5, num_classes=2
        )

    def bias(self) -> Tensor:
        norm, _, fc = self.classifier
        return fc.bias[1] - fc.bias[0] + (fc.weight[1] - fc.weight[0]) @ norm.bias


@pytest.mark.parametrize("network", [Densely, Normed])
def test_no_training_makes_the_difference_lie_about_sign_or_size(network: type) -> None:
    """An active fooler (Heo et al. 2019) wants maps that speak for the other class: in vain."""
    torch.manual_seed(0)
    model = network().double()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    labels = torch.arange(8) % 2
    images[labels == 1] += 1
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    sums = []
    with capture(model, example=images) as captured:
        for _ in range(25):
            logits = model(images)
            maps = captured.maps(logits, true=1)
            total = maps.difference.sum((1, 2))
            torch.testing.assert_close(total + model.bias(), maps.margin, rtol=1e-9, atol=1e-9)
            sums.append(total.detach())
            # Decide by the label, and have the map say the opposite.
            swapped = (total * (2 * labels - 1)).mean()
            loss = nn.functional.cross_entropy(logits, labels) + 3 * swapped
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (sums[-1] - sums[0]).abs().max() > 0.1  # it was trained, and did move
