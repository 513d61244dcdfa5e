"""Is what a map says of a cell about the pixels under it? Gradients with respect to the pixels.

A map lies on the grid of a deep layer and is drawn over the image, as if a cell's evidence came
from the pixels there. Two looks at the pixels themselves: where the margin is sensitive to them
(SmoothGrad), and how much of what moves a cell's evidence lies under the cell or beside it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.perturbation import around, cells_of_pixels
from diffsal.faithfulness.statistics import Maps, one_map_each, rank_correlation
from diffsal.faithfulness.variants import batched_logits, read_logits, settled_margin
from diffsal.maps.admission import Layers, admit
from diffsal.maps.contrast import Choice
from diffsal.maps.layouts import Reshape
from diffsal.maps.modes import evaluated
from diffsal.maps.outputs import output_logits
from diffsal.maps.salience import capture


def smoothgrad(
    model: nn.Module,
    inputs: Tensor,
    true: Choice = None,
    false: Choice = None,
    *,
    grid: Sequence[int],
    draws: int = 8,
    noise: float = 0.15,
    batch_size: int = 16,
    seed: int = 0,
) -> Tensor:
    """How sensitive the margin is to the pixels of each cell (SmoothGrad, Smilkov et al. 2017).

    The mean over noisy copies of the margin's gradient, in absolute values, summed over channels
    and averaged over the pixels of a cell.

    Args:
        model: any classifier that :func:`diffsal.maps.contrast.contrast` can read; run in
            evaluation mode and left as it was, whatever the caller's grad mode and whether or not
            its parameters are frozen.
        inputs: (B, C, H, W), on the model's device, of its dtype.
        true: see :func:`diffsal.maps.contrast.contrast`, as is ``false``. Classes that are left
            open are settled on the untouched images; ``rest`` is weighed anew for every copy.
        grid: (h, w), usually the map's own size; a pixel y lies in row ⌊y·h/H⌋.
        draws: noisy copies of each image.
        noise: standard deviation, as a share of the image's range, its brightest value of any
            channel less its darkest; 0: the plain gradient.
        batch_size: copies per forward and backward pass, of the B·draws.
        seed: of the noise, which is drawn on the CPU, the same for all images and devices.

    Returns:
        (B, h, w), at least float32, never negative: logits per unit of a pixel.

    Raises:
        DiffsalError: inputs that are no images or integers, a grid finer than they are, no draws,
            negative noise, a model that lets no gradient through to the pixels, and what
            :func:`diffsal.maps.contrast.contrast` refuses.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> model[1].weight.data = torch.tensor([[3.0, -1.0, 0.0, 0.5]])
        >>> smoothgrad(model, torch.rand(1, 1, 1, 4), grid=(1, 2))  # the same everywhere
        tensor([[[2.0000, 0.2500]]])
    """
    cell_of_pixel = cells_of_pixels(inputs, grid)
    if draws < 1 or not noise >= 0:
        raise DiffsalError(
            f"draws={draws} and noise={noise} give nothing to average: pass one draw or more, and "
            "a standard deviation of 0 or more"
        )
    admit(model)
    with evaluated(model) as run, _gradients():
        inputs, cell_of_pixel = _differentiable(inputs), cell_of_pixel.to(inputs.device)
        with torch.no_grad():  # clones throughout, as a model may change its input in place
            logits = batched_logits(run, inputs.clone(), batch_size)
        margin = settled_margin(logits, true, false)
        flat = inputs.flatten(1)
        spread = noise * (flat.amax(1) - flat.amin(1)).view(-1, 1, 1, 1)
        pattern = torch.randn(
            (draws, *inputs.shape[1:]), generator=torch.Generator().manual_seed(seed)
        )
        found = []
        for part in torch.arange(len(inputs) * draws).to(inputs.device).split(batch_size):
            sample, draw = part // draws, part % draws
            copies = inputs[sample] + spread[sample] * pattern[draw.cpu()].to(inputs)
            copies.requires_grad_()
            scores = margin(read_logits(run, copies.clone()), sample)
            found.append(_cell_means(_gradient(scores, copies).abs().sum(1), cell_of_pixel))
        return torch.cat(found).view(len(inputs), draws, *grid).mean(1)


def smoothgrad_agreement(maps: Maps, cells: Tensor) -> Tensor:
    """Rank correlation of each map, without its signs, with the pixels' sensitivity.

    Sensitive is not the same as decisive, and a map may be right where this is low; two maps of
    one model that differ in it differ in how far they are about the same places as the pixels.

    Args:
        maps: (B, h, w) of the cells' size, or of any other, whose absolute values are averaged
            over each cell.
        cells: (B, h, w), from :func:`smoothgrad`.

    Returns:
        (B,) in [-1, 1]; NaN where either is constant.

    Raises:
        DiffsalError: not one map for each.

    Example:
        >>> cells = torch.tensor([[[6.0, 1.0, 0.0]]])
        >>> smoothgrad_agreement(torch.tensor([[[-0.9, 0.3, 0.2]]]), cells).round()
        tensor([1.])
    """
    sizes = one_map_each(maps, cells).abs()
    return rank_correlation(F.adaptive_avg_pool2d(sizes, (cells.shape[1], cells.shape[2])), cells)


def receptive_share(
    model: nn.Module,
    inputs: Tensor,
    true: Choice = None,
    false: Choice = None,
    *,
    target_layers: Layers = None,
    reshape_transform: Reshape | None = None,
    cells_per_image: int = 4,
    seed: int = 0,
) -> Tensor:
    """How much of what moves a cell's evidence lies in its own pixels and those next to it.

    Evidence is the difference map's value, as a function of the pixels. Of its gradient, squared
    and summed over channels, the share is taken that lies in the cell and its up to 8 neighbours.
    Where all pixels count alike, it is those cells' share of the area, 9/(h·w) or less.

    One backward pass gives one cell of every image, so that cells are drawn: with probability
    proportional to their evidence, in absolute value, one from each of ``cells_per_image`` equal
    parts of it. The mean is then, over seeds, that of all cells weighted by their evidence.

    Args:
        model: any classifier; run in evaluation mode and left as it was, whatever the caller's
            grad mode and whether or not its parameters are frozen.
        inputs: (B, C, H, W), on the model's device, of its dtype. They run in one batch, whose
            graph is kept.
        true: see :func:`diffsal.maps.contrast.contrast`, as is ``false``.
        target_layers: see :class:`diffsal.maps.salience.capture`, as is ``reshape_transform``.
        cells_per_image: backward passes.
        seed: of the draws, the same for all images and devices.

    Returns:
        (B,) in [0, 1], at least float32. Cells that no pixel moves are left out; NaN where none
        is left, as in a map that is zero.

    Raises:
        DiffsalError: inputs that are no images or integers, a map finer than they are, no cells,
            a model that lets no gradient through to the pixels; see
            :class:`diffsal.maps.salience.capture` and :func:`diffsal.maps.contrast.contrast`.

    Example:
        >>> local = nn.Conv2d(3, 4, 4, stride=4)  # a cell is made of its own pixels
        >>> model = nn.Sequential(local, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> receptive_share(model, torch.rand(2, 3, 32, 32))
        tensor([1., 1.])
    """
    cells_of_pixels(inputs, (1, 1))
    if cells_per_image < 1:
        raise DiffsalError(f"cells_per_image is {cells_per_image}: pass one or more")
    with _gradients():
        inputs = _differentiable(inputs)
        captured = capture(model, target_layers, reshape_transform, example=inputs)
        pixels = inputs.clone().requires_grad_()
        with evaluated(model) as run, captured:
            maps = captured.maps(output_logits(run(pixels.clone())), true, false)
        evidence = one_map_each(maps.difference, inputs)
        grid = (evidence.shape[1], evidence.shape[2])
        cell_of_pixel = cells_of_pixels(inputs, grid).to(inputs.device)
        evidence = evidence.flatten(1)
        shares = []
        for cell in _draw_cells(evidence, cells_per_image, seed).to(inputs.device).unbind(1):
            gradient = _gradient(evidence.gather(1, cell[:, None]), pixels, keep_graph=True)
            largest = gradient.abs().amax((1, 2, 3), keepdim=True)
            # Of the largest, as small gradients have squares that are 0 in float32; 0 gives NaN.
            energy = (gradient / largest).square().sum(1)
            inside = (energy * around(cell_of_pixel, cell, grid[1], reach=1)).sum((1, 2))
            shares.append(inside / energy.sum((1, 2)))
        return torch.stack(shares, 1).nanmean(1).clamp(max=1)


@contextmanager
def _gradients() -> Iterator[None]:
    """With gradients on, also where the caller has them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _differentiable(inputs: Tensor) -> Tensor:
    """The inputs, with nothing behind them, of which gradients can be taken."""
    if not inputs.is_floating_point():
        raise DiffsalError(
            f"inputs of type {inputs.dtype} have no gradient: pass floating-point images"
        )
    return inputs.detach()


def _gradient(scores: Tensor, pixels: Tensor, keep_graph: bool = False) -> Tensor:
    """(B, C, H, W), at least float32, of scores that are each of one image alone."""
    gradient = None
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(
            scores.sum(), pixels, retain_graph=keep_graph, allow_unused=True
        )
    if gradient is None:
        raise DiffsalError(
            "no gradient flows from the scores to the pixels: the model's own forward pass turns "
            "gradients off or detaches; take the no_grad out"
        )
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _cell_means(values: Tensor, cell_of_pixel: Tensor) -> Tensor:
    """(B, cells): the mean of (B, H, W) values over the pixels of each cell."""
    cell = cell_of_pixel.flatten()
    count = cell.bincount()
    sums = values.new_zeros(len(values), len(count)).index_add(1, cell, values.flatten(1))
    return sums / count


def _draw_cells(evidence: Tensor, count: int, seed: int) -> Tensor:
    """(B, count) int64 on the CPU: cells of (B, cells) evidence, as likely as it is large."""
    below = evidence.detach().cpu().double().abs().cumsum(1)
    chance = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points = (torch.arange(count) + chance) / count * below[:, -1:]
    # To the right of equals, so that a cell of no evidence is never drawn.
    return torch.searchsorted(below, points, right=True).clamp(max=below.shape[1] - 1)
