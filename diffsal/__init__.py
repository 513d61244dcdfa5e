"""Class activation maps of logit differences, for binary image classifiers.

Softmax sees only the difference of two logits, so a heatmap of one class can show anything without
a prediction changing. diffsal shows what speaks for one class and against the other, in logits::

    import diffsal

    maps = diffsal.explain(model, images)       # images (B, 3, H, W), as the model takes them
    maps.difference                             # (B, h, w): its sum + maps.residual = maps.margin
    maps.common_mode_share                      # (B,): how much of the class map softmax cannot see

``DifferenceCAM`` does the same in a grad-cam pipeline, ``capture`` in a training loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsal.auditing.in_memory import audit as audit
    from diffsal.auditing.result import Audit as Audit
    from diffsal.errors import DiffsalError as DiffsalError
    from diffsal.explaining.explanations import explain_images as explain_images
    from diffsal.fooling.in_memory import fool as fool
    from diffsal.fooling.result import Fooled as Fooled
    from diffsal.maps.contrast import Contrast as Contrast
    from diffsal.maps.difference_cam import DifferenceCAM as DifferenceCAM
    from diffsal.maps.salience import capture as capture
    from diffsal.maps.salience import explain as explain
    from diffsal.maps.salience_maps import SalienceMaps as SalienceMaps
    from diffsal.maps.salience_maps import normalize as normalize
    from diffsal.maps.target_layers import find_target_layer as find_target_layer
    from diffsal.models.checkpoints import load_model as load_model
    from diffsal.models.checkpoints import save_checkpoint as save_checkpoint
    from diffsal.training.losses import BaselineSalienceLoss as BaselineSalienceLoss
    from diffsal.training.losses import ContrastSalienceLoss as ContrastSalienceLoss
    from diffsal.training.losses import DifferenceSalienceLoss as DifferenceSalienceLoss
    from diffsal.training.losses import PerClassSalienceLoss as PerClassSalienceLoss

__version__ = "0.1.0"

_HOME = {
    "Audit": "auditing.result",
    "BaselineSalienceLoss": "training.losses",
    "Contrast": "maps.contrast",
    "ContrastSalienceLoss": "training.losses",
    "DifferenceCAM": "maps.difference_cam",
    "DifferenceSalienceLoss": "training.losses",
    "DiffsalError": "errors",
    "Fooled": "fooling.result",
    "PerClassSalienceLoss": "training.losses",
    "SalienceMaps": "maps.salience_maps",
    "audit": "auditing.in_memory",
    "capture": "maps.salience",
    "explain": "maps.salience",
    "explain_images": "explaining.explanations",
    "find_target_layer": "maps.target_layers",
    "fool": "fooling.in_memory",
    "load_model": "models.checkpoints",
    "normalize": "maps.salience_maps",
    "save_checkpoint": "models.checkpoints",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Names are imported on first use: `import diffsal` and `diffsal --help` stay free of torch.
    if name not in _HOME:
        raise AttributeError(f"module 'diffsal' has no attribute {name!r}")
    return getattr(import_module(f"diffsal.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
