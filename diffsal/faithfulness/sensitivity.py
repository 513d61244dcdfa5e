"""Does the map hold still where the image, and the decision, hardly change?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.perturbation import cells_of_pixels
from diffsal.faithfulness.variants import settled_choice
from diffsal.maps.admission import Layers
from diffsal.maps.contrast import Choice
from diffsal.maps.layouts import Reshape
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps


@dataclass(frozen=True)
class Sensitivity:
    """How far difference maps move under small changes of the image.

    Attributes:
        largest: (B,) at least float32, >= 0: the largest relative change of the map over the
            changes that count; NaN where none does, or the map is zero.
        counted: (B,) in [0, 1]: the share of the changes that leave the margin nearly as it was.

    Example:
        >>> found = Sensitivity(torch.tensor([0.1, torch.nan]), torch.tensor([1.0, 0.0]))
        >>> found.largest[found.counted > 0]
        tensor([0.1000])
    """

    largest: Tensor
    counted: Tensor


def max_sensitivity(
    model: nn.Module,
    inputs: Tensor,
    true: Choice = None,
    false: Choice = None,
    *,
    radius: float | Sequence[float],
    draws: int = 8,
    steady: float = 0.1,
    target_layers: Layers = None,
    reshape_transform: Reshape | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Sensitivity:
    """Max-Sensitivity of the difference map d (Yeh et al. 2019), at a margin that stays.

    The largest ‖d(x + δ) − d(x)‖ / ‖d(x)‖ over random δ, uniform within ±radius in each pixel. A
    map that moves where the decision does is no fault of the map, so that only those δ count
    that move the margin by at most a share ``steady`` of its size. Random changes are not the
    worst there are: an attacker finds larger ones.

    Args:
        model: any classifier that :func:`diffsal.maps.contrast.contrast` can read; run in
            evaluation mode and left as it was.
        inputs: (B, C, H, W), on the model's device, of its dtype. They run in one batch, once.
        true: see :func:`diffsal.maps.contrast.contrast`, as is ``false``. Classes that are left
            open are settled on the untouched images; ``rest`` is weighed anew for every copy.
        radius: in the inputs' units; of several, one for each channel.
        draws: changes δ of each image.
        steady: share of the margin.
        target_layers: see :class:`diffsal.maps.salience.capture`, as is ``reshape_transform``.
        batch_size: changed images per forward pass, of the B·draws.
        seed: of the changes, which are drawn on the CPU, the same for all images and devices.

    Raises:
        DiffsalError: inputs that are no images or integers, no draws, a radius or share that is
            negative; see :class:`diffsal.maps.salience.capture` and
            :func:`diffsal.maps.contrast.contrast`.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 8, 8), *head), torch.rand(2, 3, 16, 16)
        >>> found = max_sensitivity(model, images, radius=0)
        >>> found.largest, found.counted
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    cells_of_pixels(inputs, (1, 1))
    reach = torch.as_tensor(radius, dtype=torch.float64).view(-1, 1, 1)
    if draws < 1 or not steady >= 0 or not bool((reach >= 0).all()):
        raise DiffsalError(
            f"draws={draws}, steady={steady} and radius={radius} change nothing that could be "
            "compared: pass one draw or more, and a share and a radius of 0 or more"
        )
    if not inputs.is_floating_point():
        raise DiffsalError(f"inputs of type {inputs.dtype}: pass floating-point images")

    def maps_of(images: Tensor, true: Choice, false: Choice) -> SalienceMaps:
        return explain(
            model,
            images,
            true,
            false,
            target_layers=target_layers,
            reshape_transform=reshape_transform,
        )

    before = maps_of(inputs.clone(), true, false)  # as a model may change its input in place
    map_, margin = before.difference.flatten(1), before.margin
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand((draws, *inputs.shape[1:]), generator=generator, dtype=torch.float64)
    pattern = ((2 * unit - 1) * reach).to(inputs)
    changes, moves = [], []
    for part in torch.arange(len(inputs) * draws, device=inputs.device).split(batch_size):
        sample, draw = part // draws, part % draws
        after = maps_of(
            inputs[sample] + pattern[draw],
            settled_choice(true, before.true_class, sample),
            settled_choice(false, before.false_class, sample),
        )
        changes.append((after.difference.flatten(1) - map_[sample]).norm(dim=1))
        moves.append((after.margin - margin[sample]).abs())
    change, moved = (torch.cat(one).view(-1, draws) for one in (changes, moves))
    counts = moved <= steady * margin.abs()[:, None]
    largest = change.where(counts, -torch.inf).amax(1) / map_.norm(dim=1)
    return Sensitivity(
        largest.where(counts.any(1) & (map_ != 0).any(1), torch.nan),
        counts.to(largest.dtype).mean(1),
    )
