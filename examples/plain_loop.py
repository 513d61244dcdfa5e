"""Salience in a plain PyTorch loop: the lines marked ``+`` are what it takes.

    python examples/plain_loop.py

Handwritten 3s and 8s, and a human map that marks the left half, where they differ. Prints the share
of the difference map's positive part that lies there, with cross-entropy and with Eq. 5.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

from diffsal import ContrastSalienceLoss, capture, explain  # +
from diffsal.demo import ARGUMENTS, digits
from diffsal.models.architectures import build_model
from diffsal.training.losses import CrossEntropyLoss


def left_half(count: int) -> torch.Tensor:
    """Human maps (count, 64, 64): 1 in the left half, 0 in the right."""
    maps = torch.zeros(count, 64, 64)
    maps[:, :, :32] = 1
    return maps


def train(criterion: torch.nn.Module, epochs: int) -> float:
    """Train on the digits; returns the share of evidence inside the human map, held out."""
    torch.manual_seed(0)
    training, held_out = (part.tensors() for part in digits())
    data = TensorDataset(*training, left_half(len(training[0])))  # + maps beside the images
    model = build_model("torchvision:DenseNet", ARGUMENTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for images, labels, human_maps in DataLoader(data, batch_size=16, shuffle=True):
            with capture(model) as captured:  # +
                logits = model(images)
                maps = captured.maps(logits, true=labels)  # +
            loss = criterion(maps, human_maps)  # + contains the cross-entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    evidence = explain(model, held_out[0], true=held_out[1]).difference.clamp(min=0)
    return float(evidence[:, :, :4].sum() / evidence.sum())


def main(epochs: int = 6) -> dict[str, float]:
    """Print both shares."""
    shares = {
        "cross-entropy": train(CrossEntropyLoss(), epochs),
        "contrast (Eq. 5)": train(ContrastSalienceLoss(), epochs),  # +
    }
    for name, share in shares.items():
        print(f"{name:<18} {share:.2f} of the positive difference lies in the left half")
    return shares


if __name__ == "__main__":
    main()
