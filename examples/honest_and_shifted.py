"""The picture at the top of the README: one digit, an honest network and its head-shifted copy.

All logits of the copy move by the same amount, so every probability stays; the class map is pulled
towards the edges.

python examples/honest_and_shifted.py docs/images/hero.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import diffsal
from diffsal.demo import CLASSES, digits, train_digits
from diffsal.explaining.overlays import PALE, SIGNED, Layer, own_layer
from diffsal.fooling.head_shift import head_shift

_COLUMNS = ("Image", "Class map of 8", "Difference 8 − 3")
_ROWS = ("Honest model", "Same model, head-shifted")
_SAID = ("the evidence, on its own scale", "forged: aimed at the edges")


def picture(honest: nn.Module, fooled: nn.Module, image: np.ndarray, x: torch.Tensor) -> Figure:
    """Both models' maps of one image (H, W, 3), of which ``x`` is the input (1, 3, H, W)."""
    figure = Figure((11, 6.4), dpi=100, facecolor="white")
    figure.text(
        0.02, 0.95, "Two models that decide alike, to five decimals.", size=16, weight="bold"
    )
    figure.text(
        0.02,
        0.905,
        "The class map was forged without changing a prediction. The difference stays: it is all "
        "that softmax sees.",
        size=11,
        color="#5f6368",
    )
    limit = float(diffsal.explain(honest, x, true=1).difference.abs().max())
    for row, model in enumerate((honest, fooled)):
        maps = diffsal.explain(model, x, true=1)
        class_map, difference = (one[0].numpy() for one in (maps.true, maps.difference))
        shown = (
            image,
            own_layer(class_map).over(image),
            Layer(difference, -limit, limit, SIGNED, PALE).over(image),
        )
        told = (
            f"p({CLASSES[1]}) = {float(maps.probabilities[0, 1]):.5f}",
            _SAID[row],
            f"adds up to {float(maps.margin):+.2f} logits, less the bias",
        )
        for column, pixels in enumerate(shown):
            axes = figure.add_axes((0.18 + 0.275 * column, 0.47 - 0.42 * row, 0.25, 0.33))
            axes.imshow(pixels)
            axes.set_axis_off()
            axes.text(0.5, -0.1, told[column], transform=axes.transAxes, ha="center", size=10)
            if row == 0:
                axes.set_title(_COLUMNS[column], size=12, weight="bold")
        figure.text(0.02, 0.63 - 0.42 * row, _ROWS[row].replace(", ", ",\n"), size=12)
    return figure


def main(arguments: Sequence[str]) -> None:
    """Train, shift, draw."""
    train, held_out = digits()
    honest = train_digits(train)
    fooled = head_shift(honest, [train.tensors()[0]], "edges").model
    inputs, labels = held_out.tensors()
    first = int((labels == 1).nonzero()[0])
    figure = picture(honest, fooled, held_out.images[first], inputs[first : first + 1])
    figure.savefig(Path(arguments[0]), metadata={"Software": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "diffsal"
    torch.set_num_threads(1)
    main(sys.argv[1:])
