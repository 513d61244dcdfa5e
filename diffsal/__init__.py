"""Class activation maps of logit differences, for binary image classifiers.

Names are imported on first use, so that ``import diffsal`` and ``diffsal --help`` stay free of
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsal.cam import DifferenceCAM as DifferenceCAM
    from diffsal.contrast import Contrast as Contrast
    from diffsal.errors import DiffsalError as DiffsalError
    from diffsal.losses import BaselineSalienceLoss as BaselineSalienceLoss
    from diffsal.losses import ContrastSalienceLoss as ContrastSalienceLoss
    from diffsal.losses import DifferenceSalienceLoss as DifferenceSalienceLoss
    from diffsal.losses import PerClassSalienceLoss as PerClassSalienceLoss
    from diffsal.models import load_model as load_model
    from diffsal.models import save_checkpoint as save_checkpoint
    from diffsal.salience import SalienceMaps as SalienceMaps
    from diffsal.salience import capture as capture
    from diffsal.salience import explain as explain
    from diffsal.salience import normalize as normalize
    from diffsal.target_layers import find_target_layer as find_target_layer

__version__ = "0.1.0"

_HOME = {
    "BaselineSalienceLoss": "losses",
    "Contrast": "contrast",
    "ContrastSalienceLoss": "losses",
    "DifferenceCAM": "cam",
    "DifferenceSalienceLoss": "losses",
    "DiffsalError": "errors",
    "PerClassSalienceLoss": "losses",
    "SalienceMaps": "salience",
    "capture": "salience",
    "explain": "salience",
    "find_target_layer": "target_layers",
    "load_model": "models",
    "normalize": "salience",
    "save_checkpoint": "models",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffsal' has no attribute {name!r}")
    return getattr(import_module(f"diffsal.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
