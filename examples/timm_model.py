"""Salience with a timm model, and its maps in a picture of grad-cam's.

pip install 'diffsal[timm]'
python examples/timm_model.py overlay.png
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import nn

from diffsal import BaselineSalienceLoss, DifferenceCAM, capture
from diffsal.demo import digits


def main(overlay: str | Path, epochs: int = 3, samples: int | None = None) -> nn.Module:
    """Train a small ResNet from scratch with Eq. 2, and draw the map of one held-out digit."""
    torch.manual_seed(0)
    training, held_out = digits()
    images, labels = (tensor[:samples] for tensor in training.tensors())
    human_maps = torch.zeros(len(images), 64, 64)
    human_maps[:, :, :32] = 1

    model: nn.Module = timm.create_model("resnet10t", num_classes=2)
    criterion = BaselineSalienceLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(16):
            with capture(model) as captured:  # the last feature map is found, as in torchvision's
                maps = captured.maps(model(images[batch]), true=labels[batch])
            loss = criterion(maps, human_maps[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"loss {loss.item():.3f}")

    inputs, _ = held_out.tensors()
    with DifferenceCAM(model) as cam:
        heatmap = cam(inputs[:1])[0]
    image = held_out.images[0].astype(np.float32) / 255
    Image.fromarray(show_cam_on_image(image, heatmap, use_rgb=True)).save(overlay)
    return model


if __name__ == "__main__":
    main(sys.argv[1])
