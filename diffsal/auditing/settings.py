"""How a model is audited."""

from dataclasses import dataclass

import torch

from diffsal.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class Settings:
    """How a model is audited.

    Attributes:
        preprocessing: from an image's pixels to the model's input.
        device: where the model runs.
        limit: at most this many images, drawn at random by ``seed``; ``None``: all.
        subset: images, evenly spaced, for the slow methods: ROAD and randomisation. 0 leaves them
            out.
        batch_size: images, perturbed ones included, in one forward pass.
        seed: of the draws of images, of the bootstrap, and of whatever else is random.

    Example:
        >>> settings = Settings(Preprocessing(size=(64, 64)), torch.device("cpu"))
        >>> settings.subset, settings.batch_size
        (8, 64)
    """

    preprocessing: Preprocessing
    device: torch.device
    limit: int | None = None
    subset: int = 8
    batch_size: int = 64
    seed: int = 0
