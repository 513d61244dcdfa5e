"""How a model is audited."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from diffsal.data.preprocessing import Preprocessing
from diffsal.data.sources import FILES, Source

Occluders: TypeAlias = Literal["mean", "blur", "noise", "transplant"]
"""See :data:`diffsal.faithfulness.perturbation.Occluder`; ``transplant``: images of other classes.
"""


def usual_batch_size(device: torch.device) -> int:
    """On a CPU, memory for more images at once costs a sixth of the time.

    Example:
        >>> usual_batch_size(torch.device("cpu")), usual_batch_size(torch.device("cuda"))
        (8, 64)
    """
    return 8 if device.type == "cpu" else 64


@dataclass(frozen=True)
class Settings:
    """How a model is audited.

    Attributes:
        preprocessing: from an image's pixels to the model's input.
        device: where the model runs.
        limit: at most this many images, drawn at random by ``seed``; ``None``: all.
        precision: slow tests take images, at random and as many of each class, until the 95 %
            intervals of their means reach no further than this to either side, or all are taken.
        occluders: what takes the place of a cell's pixels, beside the image's mean colour.
        batch_size: images, perturbed ones included, in one forward pass.
        seed: of the draws of images, of the bootstrap, and of whatever else is random.
        source: what brings samples to inputs and pictures.
        share: this process's rank among those that share the slow work, and their number; more than
            one are in a group of torch's.

    Example:
        >>> settings = Settings(Preprocessing(size=(64, 64)), torch.device("cpu"))
        >>> settings.precision, settings.batch_size
        (0.15, 64)
    """

    preprocessing: Preprocessing
    device: torch.device
    limit: int | None = None
    precision: float = 0.15
    occluders: tuple[Occluders, ...] = ("blur", "transplant")
    batch_size: int = 64
    seed: int = 0
    source: Source = field(default=FILES, repr=False)
    share: tuple[int, int] = (0, 1)
