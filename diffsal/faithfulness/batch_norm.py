"""Do decisions and maps hang on the statistics that batch norms keep from training?"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffsal.errors import DiffsalError


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
        >>> batch_norms(model) == [model[0]]
        True
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def reestimate_batch_norms(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy whose batch norms hold the statistics of these images instead of the training set's.

    As :func:`torch.optim.swa_utils.update_bn` (Izmailov et al. 2018), means and variances are
    averaged over the batches, each weighed alike; while that goes on, a layer sees what those
    before it make of the batch by its own statistics. Everything else, dropout say, is in
    evaluation mode.

    Args:
        model: left untouched.
        batches: (B, C, H, W), on the model's device, of its dtype, B of 2 or more and all about
            the same; images of all classes in each, or the classes' statistics would be averaged
            as if they came one by one.

    Returns:
        The copy, in evaluation mode.

    Raises:
        DiffsalError: no batch norm that keeps statistics, or no images.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
        >>> images = torch.tensor([[[[1.0]]], [[[5.0]]]])
        >>> copy = reestimate_batch_norms(model, [images])
        >>> copy[0].running_mean, copy[0].running_var, model[0].running_mean
        (tensor([3.]), tensor([8.]), tensor([0.]))
    """
    if not batch_norms(model):
        raise DiffsalError("the model has no batch norm that keeps statistics of its training")
    copy = deepcopy(model).eval()
    kept = batch_norms(copy)
    for norm in kept:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    seen = 0
    for norm in kept:
        norm.train()
    with torch.no_grad():
        for images in batches:
            copy(images.clone())  # as a model may change its input in place
            seen += len(images)
    copy.eval()
    if not seen:
        raise DiffsalError("no images to take the statistics of: pass a batch or more")
    return copy
