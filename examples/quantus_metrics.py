"""Quantus's metrics of difference maps: its ``explain_func``, and three metrics that use it.

pip install quantus --no-deps
python examples/quantus_metrics.py

Without ``--no-deps``, Quantus brings opencv-python, which overwrites the cv2 of grad-cam's
opencv-python-headless. It also needs pandas, scikit-image, cachetools and tqdm.
"""

from typing import Any

import numpy as np
import quantus
import torch
from numpy.typing import NDArray
from torch import nn

import diffsal
from diffsal.demo import digits, train_digits

METRICS = {
    "faithfulness correlation": quantus.FaithfulnessCorrelation(nr_runs=30, disable_warnings=True),
    "maximum sensitivity": quantus.MaxSensitivity(nr_samples=5, disable_warnings=True),
    "randomised weights, rank correlation": quantus.MPRT(
        similarity_func=quantus.similarity_func.correlation_spearman,
        return_average_correlation=True,
        disable_warnings=True,
    ),
}


def difference_maps(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> NDArray[np.float32]:
    """What Quantus calls: inputs (B, C, H, W) and targets (B,) to raw maps (B, 1, H, W).

    Nothing is kept between calls, neither hook nor layer: Quantus hands over copies of the model
    whose weights it has changed, and inputs as arrays, some of them float64.
    """
    weight = next(model.parameters())
    images = torch.as_tensor(inputs).to(weight.device, weight.dtype)
    maps = diffsal.explain(model, images, true=torch.as_tensor(targets))
    values: NDArray[np.float32] = maps.resized(images.shape[2:]).difference.cpu().numpy()
    return values[:, None]


def main(epochs: int = 5, samples: int = 16) -> dict[str, float]:
    """Mean of each metric over held-out digits."""
    training, held_out = digits()
    model = train_digits(training, epochs=epochs).eval()
    inputs, labels = (tensor[:samples].numpy() for tensor in held_out.tensors())
    found = {}
    for name, metric in METRICS.items():
        scores = metric(
            model=model,
            x_batch=inputs,
            y_batch=labels,
            explain_func=difference_maps,
            device="cpu",
        )
        found[name] = float(np.mean(scores))
        print(f"{name:40}{found[name]:8.3f}")
    return found


if __name__ == "__main__":
    main()
