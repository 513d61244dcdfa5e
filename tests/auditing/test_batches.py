"""How models are laid out in memory."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from diffsal.auditing.batches import lay_out


def is_channels_last(model):
    convolution = next(one for one in model.modules() if isinstance(one, nn.Conv2d))
    return convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_logits_stay_to_rounding():
    torch.manual_seed(0)
    model, images = resnet18().eval(), torch.rand(2, 3, 64, 64)
    before = model(images)
    lay_out(model, images[:1])
    assert is_channels_last(model)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)


class Viewing(nn.Sequential):
    """Asks for channels first, as many a forward pass of one's own does."""

    def forward(self, images):
        return self[1](self[0](images).view(len(images), -1))


class Strided(nn.Sequential):
    """Reads memory as it lies, so that its logits would change."""

    def forward(self, images):
        features = self[0](images)
        return self[1](features.as_strided((len(images), 72), (72, 1)))


@pytest.mark.parametrize("kind", [Viewing, Strided])
def test_who_asks_for_a_layout_keeps_it(kind):
    model = kind(nn.Conv2d(3, 2, 3), nn.Linear(72, 2))
    lay_out(model, torch.rand(1, 3, 8, 8))
    assert not is_channels_last(model)
    assert model[0].weight.is_contiguous()
