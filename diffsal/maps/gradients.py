"""The gradient of a score at the layers, laid out over the image, or why there is none."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffsal.errors import DiffsalError, one_line
from diffsal.maps.layouts import Layout, looks_channels_last
from diffsal.maps.target_layers import TargetLayer


def gradients_at(
    activations: Sequence[Tensor], names: Sequence[str], score: Tensor, *, create_graph: bool
) -> list[Tensor]:
    """Of a score (B,) with respect to each layer's output, of its shape.

    Args:
        activations: the layers' outputs.
        names: of the layers, for what is refused.
        score: one of each sample.
        create_graph: whether what is returned can be differentiated in turn.

    Raises:
        DiffsalError: a layer that no gradient reaches, a head that is recomputed reentrantly, or a
            backward pass of the model's own that raises anything.

    Example:
        >>> activation = torch.ones(2, 3, requires_grad=True)
        >>> gradients_at([activation], ["0"], 2 * activation.sum(1), create_graph=False)[0][0]
        tensor([2., 2., 2.])
    """
    gradients: Sequence[Tensor | None] = [None] * len(activations)
    if score.requires_grad:
        try:
            gradients = torch.autograd.grad(
                score,
                activations,
                torch.ones_like(score),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may have written its own way back
            raise _no_way_back(names[0], error) from error
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            raise DiffsalError(
                f"no gradient flows from the scores to layer {name!r}: the model's own "
                "forward pass turns gradients off or detaches behind it, or the layer does not "
                "influence the logits; name a later layer, or take the no_grad out"
            )
    return [gradient for gradient in gradients if gradient is not None]


def _no_way_back(name: str, error: Exception) -> DiffsalError:
    if "use_reentrant" in str(error):
        return DiffsalError(
            "the model recomputes its head by reentrant activation checkpointing, through "
            "which no map can be taken: pass use_reentrant=False to torch.utils.checkpoint"
        )
    return DiffsalError(
        f"the gradient from the scores to layer {name!r} fails ({one_line(error)}): name a later "
        "layer, or put the model's own backward pass right"
    )


def over_space(
    layer: TargetLayer,
    pair: tuple[Tensor, Tensor],
    image: tuple[int, ...] | None,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """A layer's output and its gradient as (B, C, h, w) or (B, C, d, h, w).

    Args:
        layer: which knows how they lie.
        pair: both, as the layer gives them.
        image: (height, width) or (depth, height, width) in pixels; ``None``: unknown.
        batch: B.

    Raises:
        DiffsalError: what the layer gives is no feature map of the batch.

    Example:
        >>> from torch import nn
        >>> layer = TargetLayer("norm", nn.LayerNorm(4), Layout("channels-last", (7, 7)))
        >>> over_space(layer, (torch.zeros(1, 7, 7, 4), torch.zeros(1, 7, 7, 4)), None, 1)[1].shape
        torch.Size([1, 4, 7, 7])
    """
    activation, gradient = pair
    reshape = layer.reshape
    if isinstance(reshape, Layout) and image is not None and activation.ndim == 3:
        reshape = reshape.over(image, activation.shape[1])
    if reshape is not None:
        activation, gradient = reshape(activation), reshape(gradient)
    elif looks_channels_last(activation.shape, image):
        raise DiffsalError(
            f"layer {layer.name!r} gives {tuple(activation.shape)}, which looks like channels "
            "last: pass a reshape_transform, such as lambda x: x.movedim(-1, 1)"
        )
    if activation.ndim not in (4, 5) or len(activation) != batch:
        raise DiffsalError(
            f"layer {layer.name!r} gives {tuple(activation.shape)} for a batch of "
            f"{batch}: (batch, channels, height, width) is needed; name "
            "another layer, or pass a reshape_transform"
        )
    return activation, gradient
