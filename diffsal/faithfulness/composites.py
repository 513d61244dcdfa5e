"""Does a map predict the decision about an image into which a part of another is pasted?

Maps add up and are in logits, so they foretell what has not been seen. A region R of cells of
image i gets the pixels of image j, its donor. If the evidence of a cell is about the pixels under
it, the composite's margin is::

    Σ_{not R} d_i + Σ_R d_j + (1 - |R|)·b_i + |R|·b_j,        b = margin - Σ d,

d being maps of the same two classes for all images, ``|R|`` the share of the cells. Each image's
residual b is taken to lie everywhere alike; where the head is exact it is the bias, whatever R is.
Who believes that all evidence is everywhere alike predicts ``(1 - |R|)·m_i + |R|·m_j`` of the
margins m. :attr:`Composites.skill` compares the two. For a bag of local features (Brendel & Bethge
2019) whose receptive fields lie inside cells the map is exactly right; receptive fields that reach
over the seams, and decisions made elsewhere than the map says, cost skill. A vector added to both
rows of the classifier changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.faithfulness.pasting import (
    Donors,
    Plan,
    Regions,
    Seams,
    pasted,
    plan_composites,
    signs_of_classes,
)
from diffsal.faithfulness.statistics import Interval, Maps, one_map_each, varies
from diffsal.faithfulness.variants import batched_logits, read_logits
from diffsal.maps.contrast import contrast
from diffsal.maps.modes import evaluated

_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of the largest margin: composites that stray less from the uniform prediction test nothing."""

_DRAWN_AT_ONCE = 1_000_000  # weights of composites, to bound memory; the draws are the same


@dataclass(frozen=True)
class Composites(Plan):
    """What a model said of composites, and what its map foretold; (N,) float64 logits.

    Some of them, as those with receivers of one class, are ``composites[labels[composites.receiver]
    == 1]``; with the images, :func:`pasted` gives their pixels.

    Attributes:
        before: the receivers' own margins.
        actual: the composites' margins, by the model.
        predicted: by the map.
        uniform: by the margins and the shares of the area alone.

    Example:
        >>> region, each = torch.tensor([[[True, False]], [[False, True]]]), torch.tensor([0, 1])
        >>> before, actual = torch.tensor([2.0, -2.0]).double(), torch.tensor([-1.0, 1.5]).double()
        >>> found = Composites(each, 1 - each, region, "sharp", before, actual, actual, 0 * actual)
        >>> found.skill, found.slope, found.correlation
        (1.0, 1.0, 1.0)
        >>> found[found.receiver == 1].actual
        tensor([1.5000], dtype=torch.float64)
    """

    before: Tensor
    actual: Tensor
    predicted: Tensor
    uniform: Tensor

    @property
    def skill(self) -> float:
        """1 - MSE(predicted) / MSE(uniform): 1 is exact, 0 as good as "everywhere alike".

        Below 0 the map is worse than no map. NaN where the uniform prediction is exact.
        """
        if len(self) == 0:
            return float("nan")
        error = uniform_error(self.actual, self.uniform)
        if error.isinf():
            return float("nan")
        return 1 - float((self.actual - self.predicted).square().mean() / error)

    @property
    def slope(self) -> float:
        """Least squares, with an intercept, of actual on predicted changes of the margin.

        Changes are against the receiver. Below 1: less moves than the map says. NaN where all
        predicted changes are the same.
        """
        predicted, actual, known = self._changes()
        return float(predicted @ actual / predicted.square().sum()) if known[0] else float("nan")

    @property
    def correlation(self) -> float:
        """Pearson's, of the same changes; NaN where either are all the same."""
        predicted, actual, known = self._changes()
        if not all(known):
            return float("nan")
        return float(F.cosine_similarity(predicted, actual, 0).clamp(-1, 1))

    def _changes(self) -> tuple[Tensor, Tensor, list[bool]]:
        """Predicted and actual changes less their means, and whether each varies."""
        changes = torch.stack([self.predicted, self.actual]) - self.before
        known = varies(changes).tolist() if len(self) else [False, False]
        predicted, actual = changes - changes.mean(1, keepdim=True)
        return predicted, actual, known


@torch.no_grad()
def composite_margins(
    model: nn.Module,
    inputs: Tensor,
    plan: Plan,
    true: int = 1,
    false: int = 0,
    *,
    batch_size: int = 64,
) -> Tensor:
    """(N,) float64 logits on the CPU: score of ``true`` minus score of ``false``, composite by
    composite.

    Args:
        model: any classifier that :func:`diffsal.maps.contrast.contrast` can read; run in
            evaluation mode and left as it was.
        inputs: (B, C, H, W), on the model's device, of its dtype.
        true: a class, the same for all images, as is ``false``.
        batch_size: composites per forward pass.

    Raises:
        DiffsalError: see :func:`pasted` and :func:`diffsal.maps.contrast.contrast`.

    Example:
        >>> images, model = torch.tensor([[[[1.0, 2.0]]], [[[5.0, 6.0]]]]), nn.Flatten()
        >>> region = torch.tensor([[[True, False]]])
        >>> composite_margins(
        ...     model, images, Plan(torch.tensor([0]), torch.tensor([1]), region, "sharp")
        ... )  # from [5, 2]
        tensor([-3.], dtype=torch.float64)
    """
    parts = [plan[start : start + batch_size] for start in range(0, len(plan), batch_size)]
    with evaluated(model) as run:
        logits = torch.cat([read_logits(run, pasted(inputs, part)) for part in parts])
    return _margin(logits, true, false)


def compare(
    plan: Plan, maps: Maps, margins: Maps | Sequence[float], actual: Maps | Sequence[float]
) -> Composites:
    """Set what maps foretell against what the model said; any map, of any plan of its grid.

    Args:
        maps: (B, h, w) logits, for the ``true`` class against the ``false`` one of all images:
            ``maps.difference`` of ``explain(model, inputs, true=1, false=0)``; to test a class's
            map, ``maps.true``; of other units, see :func:`in_logits`.
        margins: (B,) logits, ``maps.margin`` of the same.
        actual: (N,) logits, from :func:`composite_margins`.

    Raises:
        DiffsalError: maps, margins and plan that do not fit each other.

    Example:
        >>> region = torch.tensor([[[True, False]]])
        >>> plan = Plan(torch.tensor([0]), torch.tensor([1]), region, "sharp")
        >>> maps = torch.tensor([[[3.0, 1.0]], [[-2.0, -4.0]]])
        >>> found = compare(plan, maps, [4.5, -5.5], [-1.0])  # the bias is 0.5
        >>> found.predicted, found.uniform  # -2 + 1 + 0.5; half of either margin
        (tensor([-0.5000], dtype=torch.float64), tensor([-0.5000], dtype=torch.float64))
    """
    margins = _numbers(margins)
    maps = one_map_each(_numbers(maps), margins)
    if maps.shape[1:] != plan.region.shape[1:]:
        raise DiffsalError(
            f"maps of {maps.shape[1]} × {maps.shape[2]} cells do not fit regions of "
            f"{plan.region.shape[1]} × {plan.region.shape[2]}: plan with maps of the same grid"
        )
    actual = _numbers(actual)
    if len(plan) and (most := int(torch.cat([plan.receiver, plan.donor]).max())) >= len(maps):
        raise DiffsalError(
            f"the plan names image {most}, and there are maps of {len(maps)}: pass those of all "
            "images that it was made for"
        )
    if actual.shape != (len(plan),):
        raise DiffsalError(
            f"margins of shape {tuple(actual.shape)} do not fit {len(plan)} composites: pass what "
            "composite_margins returned for this plan"
        )
    predicted, uniform = foretold(plan, maps, margins)
    return Composites(
        plan.receiver,
        plan.donor,
        plan.region,
        plan.seams,
        before=margins[plan.receiver],
        actual=actual,
        predicted=predicted,
        uniform=uniform,
    )


def foretold(plan: Plan, maps: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) each: the composites' margins by the maps, and by the uniform prediction.

    In the graph of maps and margins, and on their device.

    Args:
        maps: (B, h, w) logits, on the plan's grid.
        margins: (B,) logits.

    Example:
        >>> region = torch.tensor([[[True, False]]])
        >>> plan = Plan(torch.tensor([0]), torch.tensor([1]), region, "sharp")
        >>> foretold(plan, torch.tensor([[[3.0, 1.0]], [[-2.0, -4.0]]]), torch.tensor([4.0, -6.0]))
        (tensor([-1.]), tensor([-1.]))
    """
    region, share = plan.region.to(maps.device), plan.share.to(maps)
    receiver, donor = plan.receiver.to(maps.device), plan.donor.to(maps.device)

    def blend(values: Tensor) -> Tensor:
        return (1 - share) * values[receiver] + share * values[donor]

    cells = torch.where(region, maps[donor], maps[receiver])
    return cells.sum((1, 2)) + blend(margins - maps.sum((1, 2))), blend(margins)


def uniform_error(actual: Tensor, uniform: Tensor) -> Tensor:
    """The uniform prediction's mean squared error, in the graph; infinite if it tests nothing.

    That is, if it is exact up to float32's rounding: of infinity, every error is no part.

    Example:
        >>> actual = torch.tensor([1.0, 3.0])
        >>> uniform_error(actual, torch.tensor([0.0, 0.0])), uniform_error(actual, actual)
        (tensor(5.), tensor(inf))
    """
    error = (actual - uniform).square().mean()
    scale = torch.stack([actual, uniform]).abs().max()
    return error.where(~(error.sqrt() <= _ROUNDING * scale), torch.inf)


@torch.no_grad()
def run_composites(
    model: nn.Module,
    inputs: Tensor,
    maps: Maps,
    margins: Maps | Sequence[float],
    labels: Tensor | Sequence[int],
    true: int = 1,
    false: int = 0,
    *,
    regions: Regions = "rectangles",
    donors: Donors = "other",
    seams: Seams = "sharp",
    per_image: int = 5,
    batch_size: int = 64,
    seed: int = 0,
) -> Composites:
    """Plan, paste, run and compare; to test several maps on the same composites, do so in parts.

    Arguments are those of :func:`plan_composites`, :func:`composite_margins` and :func:`compare`.
    The images are run once more, to see that the margins are the model's.

    Raises:
        DiffsalError: as those, and margins that are not the model's: their signs go with the
            images' labels, or they are of other classes.

    Example:
        >>> import diffsal
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...     nn.Linear(4, 2)
        ... )
        >>> images = torch.rand(6, 3, 16, 16)
        >>> maps = diffsal.explain(model, images, true=1, false=0)
        >>> labels = [0, 0, 0, 1, 1, 1]
        >>> found = run_composites(model, images, maps.difference, maps.margin, labels)
        >>> len(found), round(found.skill, 3)  # no pixel counts for two cells
        (30, 1.0)
    """
    margins = _numbers(margins)
    one_map_each(maps, inputs), one_map_each(maps, margins)
    plan = plan_composites(
        maps,
        labels,
        regions=regions,
        donors=donors,
        seams=seams,
        per_image=per_image,
        seed=seed,
    )
    with evaluated(model) as run:
        own = _margin(batched_logits(run, inputs, batch_size), true, false)
    if (own - margins).square().mean() > 1e-4 * own.square().mean():
        raise DiffsalError(
            f"these margins are not the model's for class {true} against class {false}: explain "
            f"all images with true={true}, false={false}"
        )
    actual = composite_margins(model, inputs, plan, true, false, batch_size=batch_size)
    return compare(plan, maps, margins, actual)


def skill_interval(composites: Composites, *, draws: int = 2000, seed: int = 0) -> Interval:
    """The skill with its 95 % interval, by a bootstrap over the images (percentiles).

    Composites share images, so images are drawn, with replacement, from all that receive or
    donate; a composite weighs as often as its receiver was drawn, times as often as its donor was.

    Args:
        composites: all, or some, such as those with receivers of one class.
        draws: how many times.
        seed: of the draws.

    Returns:
        ``mean`` is the skill, and ``count`` the number of images; NaN where the skill is.

    Example:
        >>> maps = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> plan = plan_composites(maps, [0, 1] * 4)
        >>> margins = maps.sum((1, 2))
        >>> found = skill_interval(compare(plan, maps, margins, compare(plan, maps, margins,
        ...     torch.zeros(40)).predicted + torch.linspace(-1, 1, 40)))
        >>> found.low < found.mean < found.high, found.count
        (True, 8)
    """
    images, places = np.unique(
        torch.cat([composites.receiver, composites.donor]).numpy(), return_inverse=True
    )
    receiver, donor = places.reshape(2, -1)
    skill, count = composites.skill, len(images)
    if np.isnan(skill):
        return Interval(skill, skill, skill, count)
    errors = np.stack(
        [
            (composites.actual - guess).square().numpy()
            for guess in (composites.predicted, composites.uniform)
        ],
        axis=1,
    )
    generator, sums = np.random.default_rng(seed), []
    at_once = max(1, _DRAWN_AT_ONCE // len(composites))
    for start in range(0, draws, at_once):
        size = min(at_once, draws - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
        sums.append((drawn[:, receiver] * drawn[:, donor]) @ errors)
    wrong, uniform = np.concatenate(sums).T
    low, high = np.percentile(1 - wrong[uniform > 0] / uniform[uniform > 0], [2.5, 97.5])
    return Interval(skill, float(low), float(high), count)


def in_logits(
    maps: Maps, margins: Maps | Sequence[float], labels: Tensor | Sequence[int] | None = None
) -> Tensor:
    """(B, h, w) float64: maps without a unit, scaled so that their sums explain the margins.

    Least squares over the images of margin ≈ scale·Σ map + offset. One scale for all: with one for
    each class, the noise within a class would decide its sign. The offset is in each image's
    residual anyway, so that :func:`compare` needs the scale alone; maps whose sums are all the
    same get 0, and so predict as "everywhere alike" does.

    Args:
        maps: (B, h, w) of any unit.
        margins: (B,) logits, of class 1 against class 0.
        labels: (B,) 0 or 1, for maps that each speak for the image's own class, such as grad-cam's
            heatmaps in [0, 1]: those of class 0 count as negative. ``None``: all for class 1.

    Raises:
        DiffsalError: maps, margins and labels that do not fit each other.

    Example:
        >>> in_logits(torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]), [3.0, -1.0], labels=[1, 0])
        tensor([[[ 1.,  1.]],
        <BLANKLINE>
                [[-2., -0.]]], dtype=torch.float64)
    """
    margins = _numbers(margins)
    maps = one_map_each(_numbers(maps), margins)
    if labels is not None:
        maps = one_map_each(maps, signs := signs_of_classes(labels)) * signs[:, None, None]
    sums = maps.sum((1, 2))
    if not varies(sums[None]):
        return torch.zeros_like(maps)
    centred = sums - sums.mean()
    scale = float(centred @ margins / centred.square().sum())
    return maps * scale


def _numbers(values: Maps | Sequence[float]) -> Tensor:
    """On the CPU, float64, which not every device has."""
    if not isinstance(values, Tensor):
        values = np.asarray(values, np.float64)  # torch would round a list to float32
    return torch.as_tensor(values).detach().cpu().double()


def _margin(logits: Tensor, true: int, false: int) -> Tensor:
    scores = contrast(logits, true, false)
    return _numbers(scores.true_score - scores.false_score)
