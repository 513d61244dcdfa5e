"""Does a map tell the truth? Four questions, each put to tensors of one batch.

* Does what it marks move the decision? :func:`occlusion_drops` with
  :func:`occlusion_faithfulness`, :func:`insertion_deletion`, :func:`road`.
* Does it lie where people say the evidence is? :func:`pointing_game`, :func:`energy_inside`,
  :func:`intersection_over_union`, and :func:`frame_mass` for the edge frame of passive fooling.
* Does it depend on what the model has learned? :func:`cascading_randomization`.
* Does it depend on the class? :func:`rank_correlation` of the true with the false map.

Maps come from anywhere: those of :class:`diffsal.salience.SalienceMaps`, or the arrays of any
``BaseCAM`` of grad-cam. They may be raw or normalised: every number here depends on the order of a
map's values, or on the values after :func:`diffsal.salience.normalize`. Where a question has no
answer for an image (a constant map, an empty human map), its number is NaN, and :func:`interval`
leaves it out and says how many were left.

An image's numbers do not depend on the batch that it comes in: neither its classes, which are
settled on the untouched image, nor the noise. Images are perturbed on the model's device,
``batch_size`` variants at a time, which bounds the memory.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from diffsal.contrast import NO_CLASS, Choice, contrast, probabilities
from diffsal.errors import DiffsalError
from diffsal.salience import evaluation_mode, normalize, output_logits, resize

__all__ = [
    "Curves",
    "Interval",
    "Occluder",
    "Randomization",
    "cascading_randomization",
    "edge_frame",
    "energy_inside",
    "frame_mass",
    "insertion_deletion",
    "intersection_over_union",
    "interval",
    "marked_share",
    "occlusion_drops",
    "occlusion_faithfulness",
    "pointing_game",
    "rank_correlation",
    "road",
]

Maps: TypeAlias = Tensor | NDArray[np.floating[Any]]
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
class Interval:
    """A mean over images and its 95 % bootstrap interval.

    Attributes:
        mean: NaN where nothing was left to average.
        low: NaN where there is no interval: fewer than two values, or all of them equal.
        high: as ``low``.
        count: how many values were no NaN.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Curves:
    """Probability of the true class while an image is rebuilt, or destroyed, along its map.

    Attributes:
        insertion: (B, steps + 1), from the baseline (first) to the image (last).
        deletion: (B, steps + 1), from the image (first) to the baseline (last).
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


@dataclass(frozen=True)
class Randomization:
    """How alike a map stays while the model forgets.

    Attributes:
        layers: S names; at each stage, this layer and all above it are random.
        correlation: (B, S), rank correlation with the untouched model's map.
    """

    layers: tuple[str, ...]
    correlation: Tensor


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
        model: any classifier that :func:`diffsal.contrast.contrast` can read; run in evaluation
            mode and left as it was.
        inputs: (B, C, H, W), on the model's device, of its dtype.
        true: see :func:`diffsal.contrast.contrast`, as is ``false``. Classes that are left open
            are settled on the untouched images; ``rest`` is weighed anew for every variant.
        grid: (h, w), usually the map's own size; a pixel y lies in row ⌊y·h/H⌋.
        batch_size: occluded images per forward pass, of the B·h·w.
        seed: of the noise.

    Returns:
        (B, h, w), logits: margin of the image minus margin with the cell occluded.

    Raises:
        DiffsalError: inputs that are no images, a grid finer than they are, an unknown occluder,
            and what :func:`diffsal.contrast.contrast` refuses.
    """
    cell_of_pixel = _cells(inputs, grid).to(inputs.device)
    baseline = _baseline(inputs, occluder, grid, seed)
    with evaluation_mode(model):
        whole = contrast(_batched_logits(model, inputs, batch_size), true, false)

        def occlude(sample: Tensor, cell: Tensor) -> Tensor:
            hidden = cell_of_pixel == cell[:, None, None, None]
            return torch.where(hidden, baseline[sample], inputs[sample])

        def margin(logits: Tensor, sample: Tensor) -> Tensor:
            scores = contrast(
                logits,
                _settled(true, whole.true_class, sample),
                _settled(false, whole.false_class, sample),
            )
            return scores.true_score - scores.false_score

        occluded = _score_variants(
            model, inputs, math.prod(grid), occlude, margin, batch_size=batch_size
        )
    drops = (whole.true_score - whole.false_score)[:, None] - occluded
    return drops.view(len(inputs), *grid)


def occlusion_faithfulness(maps: Maps, drops: Tensor) -> Tensor:
    """Rank correlation of each map with what occluding its cells does to the margin.

    Args:
        maps: (B, h, w) of the drops' size, or of any other, which is averaged over each cell.
        drops: (B, h, w), from :func:`occlusion_drops`.

    Returns:
        (B,) in [-1, 1]; NaN where the map or the drops are constant.
    """
    maps = torch.as_tensor(maps, device=drops.device)
    return rank_correlation(F.adaptive_avg_pool2d(maps, (drops.shape[1], drops.shape[2])), drops)


def rank_correlation(first: Maps, second: Maps) -> Tensor:
    """Spearman's rank correlation of each pair of maps, ties averaged.

    Of the true with the false map it is the map's sensitivity to the class: near 1, the map would
    have looked the same for the other answer. The difference map of two classes turns into its
    negative, so that for it -1 is no finding.

    Args:
        first: (B, ...) values of any unit.
        second: as many.

    Returns:
        (B,) in [-1, 1]; NaN where either is constant, up to rounding, or holds a NaN.
    """
    first = torch.as_tensor(first).flatten(1)
    second = torch.as_tensor(second, device=first.device).flatten(1)
    correlation = F.cosine_similarity(_centred_ranks(first), _centred_ranks(second), dim=1)
    return correlation.clamp(-1, 1).where(_varies(first) & _varies(second), torch.nan)


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
            callable for a class, and what :func:`diffsal.contrast.contrast` refuses.
    """
    size = _image_size(inputs)
    pixels = resize(_for_each(inputs, maps), size).flatten(1)
    position = _descending(pixels).view(len(inputs), 1, *size)
    moved = torch.linspace(0, pixels.shape[1], steps + 1, device=inputs.device).round()
    with evaluation_mode(model):
        classes = _true_class(_batched_logits(model, inputs, batch_size), true)

        def probability(logits: Tensor, sample: Tensor) -> Tensor:
            return probabilities(logits).gather(1, classes[sample, None])[:, 0]

        def curve(before: Tensor, after: Tensor) -> Tensor:
            def move(sample: Tensor, step: Tensor) -> Tensor:
                is_moved = position[sample] < moved[step, None, None, None]
                return torch.where(is_moved, after[sample], before[sample])

            scores = _score_variants(
                model, inputs, steps + 1, move, probability, batch_size=batch_size
            )
            return scores.where(_varies(pixels)[:, None], torch.nan)

        return Curves(
            insertion=curve(_baseline(inputs, insertion_baseline, _BLUR_GRID, seed), inputs),
            deletion=curve(inputs, _baseline(inputs, deletion_baseline, _BLUR_GRID, seed)),
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
    """
    from pytorch_grad_cam.metrics.road import ROADCombined  # a second, and only here

    size = _image_size(inputs)
    pixels = resize(_for_each(inputs, maps), size).flatten(1)
    relevance = (1 - _descending(pixels) / pixels.shape[1]).view(-1, *size).cpu().numpy()
    metric = ROADCombined(list(percentiles))

    def logits(images: Tensor) -> Tensor:
        return _logits(model, images.to(inputs.dtype))

    def score(index: int, true_class: int) -> float:
        target = [lambda output: probabilities(output[None])[0, true_class]]
        torch.default_generator.manual_seed(seed)  # the CPU's alone, where the noise is drawn
        one = slice(index, index + 1)
        return float(metric(inputs[one].float(), relevance[one], target, logits)[0])

    with evaluation_mode(model), torch.random.fork_rng(devices=[]):
        classes = _true_class(_batched_logits(model, inputs, 1), true)
        scores = [score(*each) for each in enumerate(classes.tolist())]
    return torch.tensor(scores, device=inputs.device).where(_varies(pixels), torch.nan)


def pointing_game(maps: Maps, human: Maps) -> Tensor:
    """Whether the map's maximum lies in the human map (Zhang et al. 2018, with no tolerance).

    Args:
        maps: (B, h, w), resized to the human maps where they differ.
        human: (B, H, W), masks or graded maps, not below 0: what reaches half of the image's own
            maximum counts as marked.

    Returns:
        (B,) 0 or 1; among several maxima, the share of them that lies inside. NaN where the map is
        constant or nothing is marked.
    """
    values, marked, known = _compare(maps, human)
    peaks = values == values.amax(1, keepdim=True)
    return ((peaks & marked).sum(1) / peaks.sum(1)).where(known, torch.nan)


def energy_inside(maps: Maps, human: Maps) -> Tensor:
    """Share of the normalised map that lies in the human map (relevance mass, Arras et al. 2022).

    Arguments as for :func:`pointing_game`. Chance is the share of the image that is marked: that
    much a map scores that knows nothing of it.

    Returns:
        (B,) in [0, 1]; NaN where the map is constant or nothing is marked.
    """
    values, marked, known = _compare(maps, human)
    return ((values * marked).sum(1) / values.sum(1)).where(known, torch.nan)


def intersection_over_union(maps: Maps, human: Maps, threshold: float = 0.5) -> Tensor:
    """Overlap of the human map with where the normalised map reaches ``threshold``.

    Other arguments as for :func:`pointing_game`.

    Returns:
        (B,) in [0, 1]; NaN where the map is constant or nothing is marked.
    """
    values, marked, known = _compare(maps, human)
    above = values >= threshold
    return ((above & marked).sum(1) / (above | marked).sum(1)).where(known, torch.nan)


def marked_share(human: Maps) -> Tensor:
    """(B,) in (0, 1]: the share of each image that is marked, see :func:`pointing_game`.

    It is what :func:`energy_inside` and :func:`pointing_game` come to by chance; NaN where nothing
    is marked.
    """
    marked = _marked(torch.as_tensor(human).flatten(1))
    return marked.double().mean(1).where(marked.any(1), torch.nan)


def frame_mass(maps: Maps, width: int) -> Tensor:
    """Share of the normalised map in a frame along the edges, where passive fooling puts it.

    Args:
        maps: (B, h, w).
        width: of the frame, in the map's own cells.

    Returns:
        (B,) in [0, 1]; NaN where the map is constant. Chance is the frame's share of the area.

    Raises:
        DiffsalError: a frame that is empty or leaves no middle.
    """
    maps = torch.as_tensor(maps)
    frame = edge_frame(maps.shape[1:], width).to(maps.device)
    return energy_inside(maps, frame.expand(len(maps), -1, -1))


def edge_frame(size: Sequence[int], width: int) -> Tensor:
    """(h, w) float32: 1 in a frame of ``width`` cells along the edges, 0 in the middle.

    Raises:
        DiffsalError: a frame that is empty or leaves no middle.
    """
    if not 0 < 2 * width < min(size):
        raise DiffsalError(
            f"a frame {width} wide does not fit a map of {size[0]} × {size[1]}: "
            f"pass a width from 1 to {(min(size) - 1) // 2}"
        )
    frame = torch.ones(tuple(size))
    frame[width:-width, width:-width] = 0
    return frame


def cascading_randomization(
    model: nn.Module,
    inputs: Tensor,
    explain: Callable[[nn.Module, Tensor], Maps],
    *,
    stages: int = 10,
    seed: int = 0,
) -> Randomization:
    """Randomise a copy of the model from the top down and watch the map (Adebayo et al. 2018).

    A map that survives does not show what the model has learned. Layers are taken in the reverse of
    the order in which they are registered. Every parameter is drawn anew from a normal distribution
    with the mean and standard deviation that it had, so that activations keep their scale (fresh
    initialisers, with no training, let them vanish on the way through a deep network); running
    statistics stay.

    Args:
        model: left untouched.
        inputs: (B, ...) on its device.
        explain: called with a model and the inputs, returns its maps (B, h, w). It must find its
            layer in the model that it is given, not in the original, and should name the class,
            which the copies would predict differently.
        stages: at how many depths the map is taken: evenly spaced, the top layer alone and the
            whole model among them; all layers, if there are fewer.
        seed: of the new parameters.
    """
    copy = deepcopy(model).eval()
    original = explain(copy, inputs)
    layers = [
        (name, parameters)
        for name, module in copy.named_modules()
        if (parameters := list(module.parameters(recurse=False)))
    ][::-1]
    stops = set(np.linspace(0, len(layers) - 1, min(stages, len(layers))).round().astype(int))
    generator = torch.Generator().manual_seed(seed)
    names, correlations = [], []
    for index, (name, parameters) in enumerate(layers):
        for parameter in parameters:
            _redraw(parameter, generator)
        if index in stops:
            names.append(name or type(copy).__name__)
            correlations.append(rank_correlation(original, explain(copy, inputs)))
    return Randomization(tuple(names), torch.stack(correlations, dim=1))


def interval(values: Maps | Sequence[float], seed: int = 0) -> Interval:
    """The mean of per-image numbers with its 95 % bootstrap interval (scipy, BCa, 9,999 draws).

    Images are drawn one by one: where several show the same thing, the interval is too narrow.

    Args:
        values: (N,) of any unit; NaN is left out.
        seed: of the draws.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if len(known) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if np.ptp(known) == 0:
        return Interval(mean, math.nan, math.nan, len(known))
    bounds = stats.bootstrap(
        (known,),
        np.mean,
        batch=max(1, 1_000_000 // len(known)),  # bounds memory; the draws are the same
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(known))


def _image_size(inputs: Tensor) -> tuple[int, int]:
    if inputs.ndim != 4:
        raise DiffsalError(
            f"inputs of shape {tuple(inputs.shape)} are no images: perturbing them needs "
            "(batch, channels, height, width)"
        )
    return inputs.shape[2], inputs.shape[3]


def _for_each(inputs: Tensor, maps: Maps) -> Tensor:
    maps = torch.as_tensor(maps, device=inputs.device)
    if maps.ndim != 3 or len(maps) != len(inputs):
        raise DiffsalError(
            f"maps of shape {tuple(maps.shape)} do not fit {len(inputs)} images: pass one map "
            "(height, width) for each"
        )
    return maps


def _cells(inputs: Tensor, grid: Sequence[int]) -> Tensor:
    """(H, W) int64: the cell, counted row by row, in which each pixel lies."""
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


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """(b, K), at least float32."""
    logits = output_logits(model(inputs))
    if not isinstance(logits, Tensor):
        return logits  # type: ignore[no-any-return] # contrast says what is wrong with it
    logits = logits[:, None] if logits.ndim == 1 else logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _batched_logits(model: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    return torch.cat([_logits(model, part) for part in torch.split(inputs, batch_size)])


def _score_variants(
    model: nn.Module,
    inputs: Tensor,
    variants: int,
    build: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
) -> Tensor:
    """(B, variants): build(sample, variant) makes images, score(logits, sample) rates them."""
    index = torch.arange(len(inputs) * variants, device=inputs.device)
    scores = []
    for part in torch.split(index, batch_size):
        sample, variant = part // variants, part % variants
        scores.append(score(_logits(model, build(sample, variant)), sample))
    return torch.cat(scores).view(len(inputs), variants)


def _settled(choice: Choice, classes: Tensor, sample: Tensor) -> Choice:
    """A choice as it was settled on the untouched images, for variants of ``sample``."""
    if not (classes == NO_CLASS).any():
        return classes[sample]
    if isinstance(choice, Sequence) and not isinstance(choice, str):
        return [choice[index] for index in sample.tolist()]
    return choice


def _true_class(logits: Tensor, true: Classes) -> Tensor:
    classes = contrast(logits, true, "rest").true_class
    if (classes == NO_CLASS).any():
        raise DiffsalError("a callable target has no probability: pass the index of a class")
    return classes


def _descending(pixels: Tensor) -> Tensor:
    """(B, H·W) int64: each pixel's position when values fall; the first of equals comes first."""
    return pixels.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _area(curve: Tensor) -> Tensor:
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1))


def _varies(values: Tensor) -> Tensor:
    """(B,) bool: whether (B, N) values are neither constant, up to rounding, nor NaN."""
    return normalize(values).amax(1) > 0


def _centred_ranks(values: Tensor) -> Tensor:
    """(B, N): ranks, ties averaged, less their mean."""
    values = values.contiguous()  # or searchsorted warns
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - values.shape[1]) / 2


def _compare(maps: Maps, human: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) normalised values, (B, N) what people marked, (B,) whether both say anything."""
    maps = torch.as_tensor(maps)
    human = _for_each(maps, human)
    if maps.shape != human.shape:
        maps = resize(maps, human.shape[1:])
    values, human = normalize(maps).flatten(1), human.flatten(1)
    marked = _marked(human)
    return values, marked, (values.amax(1) > 0) & marked.any(1)


def _marked(human: Tensor) -> Tensor:
    """(B, N) bool, from (B, N): where a human map reaches half of its own maximum."""
    return (human > 0) & (human >= human.amax(1, keepdim=True) / 2)


@torch.no_grad()
def _redraw(parameter: Tensor, generator: torch.Generator) -> None:
    drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
    parameter.copy_(parameter.mean() + parameter.std(correction=0) * drawn)
