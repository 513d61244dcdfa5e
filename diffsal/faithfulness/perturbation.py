"""Does a map tell where the pixels decide? Occlusion, insertion and deletion, ROAD."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from diffsal.errors import DiffsalError
from diffsal.faithfulness.statistics import Maps, one_map_each, rank_correlation, varies
from diffsal.faithfulness.variants import (
    batched_logits,
    margin_drops,
    read_logits,
    score_variants,
)
from diffsal.maps.contrast import NO_CLASS, Choice, contrast, probabilities
from diffsal.maps.modes import evaluated
from diffsal.maps.salience_maps import resize

Classes: TypeAlias = Tensor | Sequence[int] | int | None

Occluder: TypeAlias = Literal["mean", "blur", "noise"]
"""What takes the place of pixels.

``mean``: each image's own mean colour. ``blur``: the image under a Gaussian of half a cell's
standard deviation. ``noise``: normal, of each image's mean and standard deviation per channel; the
pattern follows from the seed alone and is the same for all images.
"""

_BLUR_GRID = (7, 7)
"""The cells by which insertion and deletion blur: 16 pixels of standard deviation at 224."""


@dataclass(frozen=True)
class Curves:
    """Probability of the true class while an image is rebuilt, or destroyed, along its map.

    Attributes:
        insertion: (B, steps + 1), from the baseline (first) to the image (last).
        deletion: (B, steps + 1), from the image (first) to the baseline (last).

    Example:
        >>> curves = Curves(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> curves.insertion_area, curves.deletion_area
        (tensor([0.7500]), tensor([0.2500]))
    """

    insertion: Tensor
    deletion: Tensor

    @property
    def insertion_area(self) -> Tensor:
        """(B,) in [0, 1]: area under the curve over the share of pixels; high is good."""
        return _area(self.insertion)

    @property
    def deletion_area(self) -> Tensor:
        """(B,) in [0, 1]: area under the curve over the share of pixels; low is good."""
        return _area(self.deletion)


@torch.no_grad()
def occlusion_drops(
    model: nn.Module,
    inputs: Tensor,
    true: Choice = None,
    false: Choice = None,
    *,
    grid: Sequence[int],
    occluder: Occluder = "mean",
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """By how much the margin drops when each cell of a grid is occluded (Zeiler & Fergus 2014).

    Args:
        model: any classifier that :func:`diffsal.maps.contrast.contrast` can read; run in
            evaluation mode and left as it was.
        inputs: (B, C, H, W), on the model's device, of its dtype.
        true: see :func:`diffsal.maps.contrast.contrast`, as is ``false``. Classes that are left
            open are settled on the untouched images; ``rest`` is weighed anew for every variant.
        grid: (h, w), usually the map's own size; a pixel y lies in row ⌊y·h/H⌋.
        batch_size: occluded images per forward pass, of the B·h·w.
        seed: of the noise.

    Returns:
        (B, h, w), logits: margin of the image minus margin with the cell occluded.

    Raises:
        DiffsalError: inputs that are no images, a grid finer than they are, an unknown occluder,
            and what :func:`diffsal.maps.contrast.contrast` refuses.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # the first pixel decides
        >>> image = torch.tensor([[[[8.0, 0.0, 0.0, 0.0]]]])
        >>> occlusion_drops(model, image, grid=(1, 4))  # from 8 to the mean, 2
        tensor([[[6., 0., 0., 0.]]])
    """
    cell_of_pixel = cells_of_pixels(inputs, grid).to(inputs.device)
    baseline = _baseline(inputs, occluder, grid, seed)

    def occlude(sample: Tensor, cell: Tensor) -> Tensor:
        hidden = cell_of_pixel == cell[:, None, None, None]
        return torch.where(hidden, baseline[sample], inputs[sample])

    drops = margin_drops(
        model, inputs, math.prod(grid), occlude, true, false, batch_size=batch_size
    )
    return drops.view(len(inputs), *grid)


def occlusion_faithfulness(maps: Maps, drops: Tensor) -> Tensor:
    """Rank correlation of each map with what occluding its cells does to the margin.

    Args:
        maps: (B, h, w) of the drops' size, or of any other, which is averaged over each cell.
        drops: (B, h, w), from :func:`occlusion_drops`.

    Returns:
        (B,) in [-1, 1]; NaN where the map or the drops are constant.

    Example:
        >>> drops = torch.tensor([[[6.0, 1.0, 0.0]]])
        >>> occlusion_faithfulness(torch.tensor([[[0.9, 0.3, 0.2]]]), drops).round()
        tensor([1.])
    """
    maps = torch.as_tensor(maps, device=drops.device)
    return rank_correlation(F.adaptive_avg_pool2d(maps, (drops.shape[1], drops.shape[2])), drops)


@torch.no_grad()
def insertion_deletion(
    model: nn.Module,
    inputs: Tensor,
    maps: Maps,
    true: Classes = None,
    *,
    steps: int = 20,
    insertion_baseline: Occluder = "blur",
    deletion_baseline: Occluder = "mean",
    batch_size: int = 64,
    seed: int = 0,
) -> Curves:
    """Insertion and deletion of pixels in the order of a map (Petsiuk, Das, Saenko 2018, RISE).

    As in RISE the curve is of the probability, which a confident model holds up for long, and
    pixels come in over a blurred image and go out into a flat one. The map is resized to the
    image; of equal values, those nearer to the top left corner count as higher.

    Args:
        model: as for :func:`occlusion_drops`, as are ``inputs``, ``batch_size`` and ``seed``.
        maps: (B, h, w), of any size.
        true: the class of each image, or of all; ``None``: the model's predictions.
        steps: step k moves the k/steps highest of the pixels.
        insertion_baseline: what insertion starts from.
        deletion_baseline: what deletion ends in.

    Returns:
        Curves, NaN where the map is constant.

    Raises:
        DiffsalError: inputs that are no images, not one map for each, an unknown baseline, a
            callable for a class, and what :func:`diffsal.maps.contrast.contrast` refuses.

    Example:
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        >>> maps, images = torch.rand(5, 7, 7), torch.rand(5, 3, 16, 16)
        >>> curves = insertion_deletion(model, images, maps, steps=10)
        >>> curves.insertion.shape, curves.insertion_area.shape
        (torch.Size([5, 11]), torch.Size([5]))
        >>> torch.allclose(curves.insertion[:, -1], curves.deletion[:, 0])  # both are the image
        True
    """
    size = _image_size(inputs)
    pixels = resize(one_map_each(maps, inputs), size).flatten(1)
    position = descending(pixels).view(len(inputs), 1, *size)
    moved = torch.linspace(0, pixels.shape[1], steps + 1, device=inputs.device).round()
    with evaluated(model) as run:
        logits = batched_logits(run, inputs, batch_size)
        classes = _true_class(logits, true)

        def probability(logits: Tensor, sample: Tensor) -> Tensor:
            return probabilities(logits).gather(1, classes[sample, None])[:, 0]

        def curve(before: Tensor, after: Tensor, first: int) -> Tensor:
            """(B, steps): all steps but the one that is the image itself."""

            def move(sample: Tensor, step: Tensor) -> Tensor:
                is_moved = position[sample] < moved[first + step, None, None, None]
                return torch.where(is_moved, after[sample], before[sample])

            return score_variants(run, inputs, steps, move, probability, batch_size=batch_size)

        blurred = _baseline(inputs, insertion_baseline, _BLUR_GRID, seed)
        flat = _baseline(inputs, deletion_baseline, _BLUR_GRID, seed)
        image = probability(logits, torch.arange(len(inputs), device=inputs.device))[:, None]
        known = varies(pixels)[:, None]
        return Curves(
            torch.cat([curve(blurred, inputs, 0), image], 1).where(known, torch.nan),
            torch.cat([image, curve(inputs, flat, 1)], 1).where(known, torch.nan),
        )


@torch.no_grad()
def road(
    model: nn.Module,
    inputs: Tensor,
    maps: Maps,
    true: Classes = None,
    *,
    percentiles: Sequence[float] = (20, 40, 60, 80),
    seed: int = 0,
) -> Tensor:
    """Remove and debias (Rong et al. 2022), by grad-cam's own ``ROADCombined``.

    Pixels are replaced by noisy linear imputation from their neighbours, once the least and once
    the most relevant first. Grad-cam is given the order of the pixels instead of their values:
    among ties, as in a map after ReLU, it would remove all of them and find nothing to impute
    from. Its imputation runs on the CPU, one image at a time, and takes most of the time.

    Args:
        model: as for :func:`occlusion_drops`, as is ``inputs``.
        maps: as for :func:`insertion_deletion`, as is ``true``.
        percentiles: where the order is cut.
        seed: of the imputation's noise, which is the same for all images.

    Returns:
        (B,) float32 in [-1, 1]: half of the true class's probability after removing the least
        relevant pixels minus that after the most relevant, averaged over the percentiles; high is
        good, NaN where the map is constant.

    Raises:
        DiffsalError: as :func:`insertion_deletion`.

    Example:
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        >>> road(model, torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8), percentiles=[50])  # no order
        tensor([nan, nan])
    """
    from pytorch_grad_cam.metrics.road import ROADCombined  # a second, and only here

    size = _image_size(inputs)
    pixels = resize(one_map_each(maps, inputs), size).flatten(1)
    relevance = (1 - descending(pixels) / pixels.shape[1]).view(-1, *size).cpu().numpy()
    metric = ROADCombined(list(percentiles))

    with evaluated(model) as run, torch.random.fork_rng(devices=[]):
        untouched = batched_logits(run, inputs, 1)

        def score(index: int, true_class: int) -> float:
            target = [lambda output: probabilities(output[None])[0, true_class]]
            torch.default_generator.manual_seed(seed)  # the CPU's alone, where the noise is drawn
            one = slice(index, index + 1)
            image = inputs[one].float()

            def logits(images: Tensor) -> Tensor:
                # At every percentile the metric asks for the image itself, too.
                known = images is image
                return untouched[one] if known else read_logits(run, images.to(inputs.dtype))

            return float(metric(image, relevance[one], target, logits)[0])

        classes = _true_class(untouched, true)
        scores = [score(*each) for each in enumerate(classes.tolist())]
    return torch.tensor(scores, device=inputs.device).where(varies(pixels), torch.nan)


def cells_of_pixels(inputs: Tensor, grid: Sequence[int]) -> Tensor:
    """(H, W) int64 on the CPU: the cell, counted row by row, in which each pixel lies.

    Args:
        inputs: (B, C, H, W).
        grid: (h, w); a pixel y lies in row ⌊y·h/H⌋.

    Raises:
        DiffsalError: inputs that are no images, a grid finer than they are.

    Example:
        >>> cells_of_pixels(torch.zeros(1, 3, 2, 5), (1, 2))
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 0, 1, 1]])
    """
    size = _image_size(inputs)
    if any(cells < 1 or cells > pixels for cells, pixels in zip(grid, size, strict=True)):
        raise DiffsalError(
            f"a grid of {grid[0]} × {grid[1]} cells does not fit images of {size[0]} × {size[1]} "
            "pixels: pass a coarser one"
        )
    row, column = (
        torch.arange(pixels) * cells // pixels for cells, pixels in zip(grid, size, strict=True)
    )
    return row[:, None] * grid[1] + column


def around(cells: Tensor, centres: Tensor, columns: int, reach: int) -> Tensor:
    """(N, ...) bool: which cells lie at most ``reach`` rows and columns from each centre.

    Args:
        cells: (...) int64, counted row by row, as from :func:`cells_of_pixels`.
        centres: (N,) int64, cells too.
        columns: of the grid.

    Example:
        >>> around(torch.arange(8).view(2, 4), torch.tensor([0]), columns=4, reach=1)
        tensor([[[ True,  True, False, False],
                 [ True,  True, False, False]]])
    """
    centres = centres.view(-1, *[1] * cells.ndim)
    rows, across = cells // columns - centres // columns, cells % columns - centres % columns
    return (rows.abs() <= reach) & (across.abs() <= reach)


def descending(values: Tensor) -> Tensor:
    """(B, N) int64: each value's position when values fall; the first of equals comes first.

    Example:
        >>> descending(torch.tensor([[1.0, 7.0, 3.0, 7.0]]))
        tensor([[3, 0, 2, 1]])
    """
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _image_size(inputs: Tensor) -> tuple[int, int]:
    if inputs.ndim != 4:
        raise DiffsalError(
            f"inputs of shape {tuple(inputs.shape)} are no images: perturbing them needs "
            "(batch, channels, height, width)"
        )
    return inputs.shape[2], inputs.shape[3]


def _baseline(inputs: Tensor, occluder: Occluder, grid: Sequence[int], seed: int) -> Tensor:
    """(B, C, H, W): for every image, what the occluder would leave of it."""
    size = _image_size(inputs)
    if occluder == "blur":
        return _blur(inputs, [pixels / cells / 2 for pixels, cells in zip(size, grid, strict=True)])
    mean = inputs.mean((2, 3), keepdim=True)
    if occluder == "mean":
        return mean.expand_as(inputs)
    if occluder == "noise":
        pattern = torch.randn(inputs.shape[1:], generator=torch.Generator().manual_seed(seed))
        return mean + inputs.std((2, 3), correction=0, keepdim=True) * pattern.to(inputs)
    raise DiffsalError(f"occluder {occluder!r} is unknown: pass 'mean', 'blur' or 'noise'")


def _blur(images: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur along the height, then along the width: the kernels are large, so one by one."""
    for axis, sigma in zip((2, 3), sigmas, strict=True):
        kernel = [1, 1]
        kernel[3 - axis] = 2 * min(math.ceil(3 * sigma), images.shape[axis] - 1) + 1  # [x, y]
        images = gaussian_blur(images, kernel, [sigma, sigma])
    return images


def _true_class(logits: Tensor, true: Classes) -> Tensor:
    classes = contrast(logits, true, "rest").true_class
    if (classes == NO_CLASS).any():
        raise DiffsalError("a callable target has no probability: pass the index of a class")
    return classes


def _area(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1))
