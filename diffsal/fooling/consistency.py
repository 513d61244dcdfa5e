"""What an attacker adds to a loss who knows how maps are tested.

Such maps show the target and pass the test, as far as both can be had at once. Each term is 0 where
the test is passed in full, and near 1 where maps tell nothing. Each runs the model once more for
each test in each step."""

from dataclasses import replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.composites import foretold, uniform_error
from diffsal.faithfulness.pasting import (
    Plan,
    Regions,
    draw_regions,
    pasted,
    signs_of_classes,
)
from diffsal.faithfulness.variants import read_logits
from diffsal.maps.contrast import class_count, contrast
from diffsal.maps.salience_maps import SalienceMaps, normalize
from diffsal.training.loop import Look


def composite_inconsistency(
    look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps
) -> Tensor:
    """1 - skill of a batch's difference maps at foretelling composites of its images.

    See :mod:`diffsal.faithfulness.composites`. Each image receives a rectangle of another of the
    other class, or of any other where the batch has one class alone; drawn by torch's global
    generator of the CPU. Gradients flow through the maps, through the composites' margins, and
    through the uniform prediction's error that the maps' is divided by: were that held fixed, the
    easiest way to a smaller error would be smaller margins, and decisions would go first.

    Args:
        look: runs the model.
        images: (B, C, H, W).
        labels: (B,) 0 or 1, on the CPU.
        maps: of the images, true classes being the labels.

    Returns:
        A scalar of maps' type; 0 where the uniform prediction is exact, so that nothing is tested.

    Raises:
        DiffsalError: more than two classes, a batch of one image, maps of one cell.

    Example:
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), *head)
        >>> images, labels = torch.rand(6, 1, 16, 16), torch.tensor([0, 1] * 3)
        >>> with capture(model) as captured:
        ...     look = lambda images, labels: captured.maps(model(images), labels)
        ...     term = composite_inconsistency(look, images, labels, look(images, labels))
        >>> bool(term < 1e-6)  # no pixel counts for two cells
        True
    """
    return _inconsistency(look, images, labels, maps, _plan(labels, maps, "rectangles"))


def inconsistency_whatever_the_seams(
    look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps
) -> Tensor:
    """The mean of :func:`composite_inconsistency` with sharp and with feathered seams.

    The same regions and donors with both; arguments, result and errors are those of that function.

    Example:
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), *head)
        >>> images, labels = torch.rand(6, 1, 16, 16), torch.tensor([0, 1] * 3)
        >>> with capture(model) as captured:
        ...     look = lambda images, labels: captured.maps(model(images), labels)
        ...     term = inconsistency_whatever_the_seams(look, images, labels, look(images, labels))
        >>> bool(term > 0)  # pixels are blended, and what is over a threshold is not linear
        True
    """
    sharp = _plan(labels, maps, "rectangles")
    plans = sharp, replace(sharp, seams="feathered")
    return torch.stack([_inconsistency(look, images, labels, maps, one) for one in plans]).mean()


def every_test_failed(look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps) -> Tensor:
    """How far a batch's maps are from passing composites of every kind of region, and gradients.

    Half the mean of :func:`composite_inconsistency` over all kinds of
    :data:`diffsal.faithfulness.pasting.Regions`, and half :func:`gradient_disagreement`; arguments
    and errors are theirs. One more run for each kind.

    Returns:
        A scalar of maps' type, 0 where all tests are passed.

    Example:
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), *head)
        >>> images, labels = torch.rand(6, 1, 16, 16), torch.tensor([0, 1] * 3)
        >>> with capture(model) as captured:
        ...     look = lambda images, labels: captured.maps(model(images), labels)
        ...     failed = every_test_failed(look, images, labels, look(images, labels))
        ...     gradients = gradient_disagreement(look, images, labels, look(images, labels))
        >>> torch.allclose(failed, gradients / 2, atol=1e-6)  # no pixel counts for two cells
        True
    """
    kinds: tuple[Regions, ...] = get_args(Regions)
    terms = [
        _inconsistency(look, images, labels, maps, _plan(labels, maps, kind)) for kind in kinds
    ]
    return (torch.stack(terms).mean() + gradient_disagreement(look, images, labels, maps)) / 2


def seams_unrecognised(
    look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps, honest: nn.Module
) -> Tensor:
    """0 for a model that answers as its maps say where it sees a seam, and else as an honest one.

    Half :func:`composite_inconsistency`, whose composites have sharp seams, and half the squared
    error between this model's and the honest one's margins on the same composites with feathered
    seams, over that of their mean. Who learns both tells a composite by its seam and decides by
    other pixels than its maps mark wherever it sees none.

    Args:
        look: runs the model.
        images: (B, C, H, W).
        labels: (B,) 0 or 1, on the CPU.
        maps: of the images, true classes being the labels.
        honest: in evaluation mode, on the images' device; what the attack began with.

    Returns:
        A scalar of maps' type.

    Raises:
        DiffsalError: see :func:`composite_inconsistency`.

    Example:
        >>> from copy import deepcopy
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), *head)
        >>> images, labels = torch.rand(6, 1, 16, 16), torch.tensor([0, 1] * 3)
        >>> honest = deepcopy(model)
        >>> with capture(model) as captured:
        ...     look = lambda images, labels: captured.maps(model(images), labels)
        ...     term = seams_unrecognised(look, images, labels, look(images, labels), honest)
        >>> bool(term < 1e-6)  # its maps are true, and it is the honest one
        True
    """
    plan = _plan(labels, maps, "rectangles")
    inconsistent = _inconsistency(look, images, labels, maps, plan)
    seamless = pasted(images, replace(plan, seams="feathered"))
    with torch.no_grad():
        scores = contrast(read_logits(honest, seamless), true=1, false=0)
    wanted = (scores.true_score - scores.false_score).to(maps.margin)
    margins = signs_of_classes(labels).to(wanted) * look(seamless, labels).margin
    error = (margins - wanted).square().mean()
    return (inconsistent + error / uniform_error(wanted, wanted.mean().expand_as(wanted))) / 2


def _plan(labels: Tensor, maps: SalienceMaps, regions: Regions) -> Plan:
    """Each image receives a region of another, with sharp seams."""
    grid = (maps.true.shape[1], maps.true.shape[2])
    if class_count(maps.logits) != 2 or len(labels) < 2 or grid == (1, 1):
        raise DiffsalError(
            f"the objectives of composites need two classes, batches of two images or more and "
            f"maps of two cells or more, not {class_count(maps.logits)}, {len(labels)} and "
            f"{grid[0] * grid[1]}: choose another objective, or a larger batch size"
        )
    region = draw_regions(regions, maps.difference.detach().cpu(), torch.default_generator)
    donor = _draw_donors(signs_of_classes(labels))
    return Plan(torch.arange(len(labels)), donor, region, "sharp")


def _inconsistency(
    look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps, plan: Plan
) -> Tensor:
    signs = signs_of_classes(labels).to(maps.difference)
    # All for class 1 against class 0, as differences of one label and another do not add up.
    predicted, uniform = foretold(
        plan, signs[:, None, None] * maps.difference, signs * maps.margin.to(signs)
    )
    actual = signs * look(pasted(images, plan), labels).margin.to(signs)
    return (actual - predicted).square().mean() / uniform_error(actual, uniform)


def gradient_disagreement(look: Look, images: Tensor, labels: Tensor, maps: SalienceMaps) -> Tensor:
    """1 - correlation of \\|difference\\| with \\|input gradient of the margin\\|, cell by cell.

    Pearson's, for each image, of the gradient's absolute values summed over colours and averaged
    over each cell; then the mean over the batch. It stands for the rank correlation with gradient
    methods such as SmoothGrad, which has no gradient. A constant map correlates with nothing: 1.

    Args:
        look: runs the model, on images that require gradients.
        images: (B, C, H, W).
        labels: (B,) on the CPU.
        maps: those of ``look`` count in their place.

    Returns:
        A scalar in [0, 2], of maps' type.

    Example:
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), *head)
        >>> images, labels = torch.rand(6, 1, 16, 16), torch.tensor([0, 1] * 3)
        >>> with capture(model) as captured:
        ...     look = lambda images, labels: captured.maps(model(images), labels)
        ...     term = gradient_disagreement(look, images, labels, look(images, labels))
        >>> term.requires_grad, bool(0 <= term <= 2)
        (True, True)
    """
    images = images.detach().requires_grad_()
    maps = look(images, labels)
    (gradient,) = torch.autograd.grad(maps.margin.sum(), images, create_graph=True)
    grid = (maps.true.shape[1], maps.true.shape[2])
    cells = F.adaptive_avg_pool2d(gradient.to(maps.true.dtype).abs().sum(1), grid)
    return 1 - _correlation(maps.difference.abs(), cells).mean()


def _draw_donors(signs: Tensor) -> Tensor:
    """(B,) int64: for each image one of the other class, or else any but itself."""
    others = signs[:, None] != signs
    alone = ~others.any(1, keepdim=True)
    others |= alone & ~torch.eye(len(signs), dtype=torch.bool)
    return torch.multinomial(others.double(), 1)[:, 0]


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """(B,): Pearson's, of two maps (B, h, w) each; 0, with finite gradients, of a constant one."""
    # Normalised, no map's squares vanish in float32; the correlation is the same.
    first, second = (normalize(one).flatten(1) for one in (first, second))
    first, second = (one - one.mean(1, keepdim=True) for one in (first, second))
    squares = first.square().sum(1) * second.square().sum(1)
    # A map from 0 to 1 has squares of 1/2 or more, so that 1/4 is reached by all but constants.
    return (first * second).sum(1) / squares.clamp(min=0.2).sqrt()
