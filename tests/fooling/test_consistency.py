"""Terms of attackers who know the tests, against plain loops and differences of the loss."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffsal.faithfulness.pasting import Plan, pasted
from diffsal.fooling import consistency
from diffsal.fooling.consistency import (
    composite_inconsistency,
    every_test_failed,
    gradient_disagreement,
    inconsistency_whatever_the_seams,
    seams_unrecognised,
)
from diffsal.maps.salience import capture
from diffsal.training.loop import Look

LABELS = torch.tensor([0, 1, 1, 0, 1])
Term = Callable[..., Tensor]


def small(outputs: int = 2) -> nn.Sequential:
    """Smooth, maps of 4 × 4 cells for images of 8 × 8, whose receptive fields reach over seams."""
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, outputs)
    return nn.Sequential(conv, nn.Softplus(), *head).double()


def pictures(count: int = 5) -> Tensor:
    return 2 * torch.randn(count, 2, 8, 8, dtype=torch.float64)


def value(
    term: Term,
    model: nn.Module,
    images: Tensor,
    labels: Tensor = LABELS,
    state: dict[str, Tensor] | None = None,
) -> Tensor:
    """The term, as the training loop asks for it."""
    with capture(model) as captured:

        def look(images: Tensor, labels: Tensor) -> Any:
            logits = torch.func.functional_call(model, state or {}, (images,))
            return captured.maps(logits, true=labels)

        checked: Look = look
        return term(checked, images, labels, look(images, labels))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """What was pasted so far."""
    seen: list[Plan] = []

    def noting(inputs: Tensor, plan: Plan) -> Tensor:
        seen.append(plan)
        return pasted(inputs, plan)

    monkeypatch.setattr(consistency, "pasted", noting)
    return seen


def plain_inconsistency(model: nn.Sequential, images: Tensor, plan: Plan) -> float:
    """1 - skill, one composite and one cell at a time."""
    weight = model[4].weight.detach()
    rows = weight[1] - weight[0]
    with torch.no_grad():
        cells = (model[:2](images) * rows[:, None, None]).sum(1).numpy() / 16
        margins = model(images).diff(dim=1)[:, 0].numpy()
    bias = model[4].bias.detach().diff().item()
    wrong = uniform = 0.0
    for receiver, donor, region in zip(plan.receiver, plan.donor, plan.region, strict=True):
        pixels, predicted = images[receiver].clone(), bias
        for row, column in product(range(4), repeat=2):
            chosen = donor if region[row, column] else receiver
            predicted += cells[chosen, row, column]
            spot = (..., slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            pixels[spot] = images[chosen][spot]
        actual = model(pixels[None]).detach().diff(dim=1).item()
        share = int(region.sum()) / 16
        wrong += (actual - predicted) ** 2
        uniform += (actual - (1 - share) * margins[receiver] - share * margins[donor]) ** 2
    assert wrong > 0
    return float(wrong / uniform)


def test_inconsistency_is_one_minus_skill_in_plain_loops(plans: list[Plan]) -> None:
    model, images = small(), pictures()
    found = value(composite_inconsistency, model, images)
    (plan,) = plans
    assert found.item() == pytest.approx(plain_inconsistency(model, images, plan), rel=1e-9)


def test_every_test_is_all_kinds_of_regions_and_the_gradient(plans: list[Plan]) -> None:
    model, images = small(), pictures()
    found = value(every_test_failed, model, images)
    composites = np.mean([plain_inconsistency(model, images, plan) for plan in plans])
    gradient = value(gradient_disagreement, model, images).item()
    assert found.item() == pytest.approx((composites + gradient) / 2, rel=1e-9)

    rectangles, halves, cells, marked = (plan.region for plan in plans)
    assert [is_rectangle(region) for region in rectangles] == [True] * 5
    assert halves.sum((1, 2)).tolist() == [8] * 5
    assert all(map(is_rectangle, halves))
    assert not all(map(is_rectangle, cells))
    with torch.no_grad():
        rows = model[4].weight.diff(dim=0)[0] * (2 * LABELS[:, None] - 1)
        own = (model[:2](images) * rows[:, :, None, None]).sum(1)
    for region, speaks in zip(marked, own, strict=True):
        assert speaks[region].min() > speaks[~region].max()


def is_rectangle(region: Tensor) -> bool:
    """Whether a region is all of the rectangle round it."""
    sides = [
        int(region.any(axis).nonzero().max() - region.any(axis).nonzero().min()) + 1
        for axis in (0, 1)
    ]
    return sides[0] * sides[1] == int(region.sum())


def test_seams_tell_apart_what_is_foretold_and_what_is_honest(plans: list[Plan]) -> None:
    model, honest, images = small(), small(), pictures()
    found = value(partial(seams_unrecognised, honest=honest), model, images)
    sharp, feathered = plans
    assert (sharp.seams, feathered.seams) == ("sharp", "feathered")
    assert torch.equal(sharp.region, feathered.region)
    with torch.no_grad():
        answers = model(pasted(images, feathered)).diff(dim=1).numpy()
        wanted = honest(pasted(images, feathered)).diff(dim=1).numpy()
    error = np.mean((answers - wanted) ** 2) / np.var(wanted)
    consistent = plain_inconsistency(model, images, sharp)
    assert found.item() == pytest.approx((consistent + error) / 2, rel=1e-9)


def test_seams_of_both_kinds_count_alike(plans: list[Plan]) -> None:
    model, images = small(), 2 * torch.randn(5, 2, 16, 16, dtype=torch.float64)
    model[0] = nn.Conv2d(2, 3, 5, stride=4, padding=1).double()  # cells of 4 pixels have soft seams
    found = value(inconsistency_whatever_the_seams, model, images)
    assert [plan.seams for plan in plans] == ["sharp", "feathered"]
    assert torch.equal(*(plan.region for plan in plans))
    own = model(images).detach().diff(dim=1)[:, 0]
    features = model[:2](images).detach()
    difference = (features * model[4].weight.diff(dim=0)[0][:, None, None]).sum(1).detach()
    difference = difference / difference[0].numel()
    expected = []
    for plan in plans:
        foretold, alike, actual = [], [], model(pasted(images, plan)).detach().diff(dim=1)[:, 0]
        for receiver, donor, region in zip(plan.receiver, plan.donor, plan.region, strict=True):
            change = (difference[donor] - difference[receiver])[region].sum()
            foretold.append(own[receiver] + change)
            share = region.double().mean()
            alike.append((1 - share) * own[receiver] + share * own[donor])
        errors = ((actual - torch.stack(guess)).square().sum() for guess in (foretold, alike))
        expected.append(np.divide(*(float(one) for one in errors)))
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-9)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_every_image_receives_a_rectangle_of_one_of_the_other_class(plans: list[Plan]) -> None:
    model, images = small(), pictures()
    for _ in range(60):
        value(composite_inconsistency, model, images)
    donors: dict[int, set[int]] = {number: set() for number in range(5)}
    sizes = set()
    for plan in plans:
        assert plan.receiver.tolist() == [0, 1, 2, 3, 4]
        for receiver, donor, region in zip(*(plan.receiver, plan.donor, plan.region), strict=True):
            donors[int(receiver)].add(int(donor))
            height, width = (int(region.any(axis).sum()) for axis in (1, 0))
            assert height * width == region.sum()
            sizes.add((height, width))
    assert donors == {0: {1, 2, 4}, 3: {1, 2, 4}, **{label: {0, 3} for label in (1, 2, 4)}}
    possible = set(product(range(1, 5), repeat=2))
    assert sizes == {size for size in possible if 0.2 * 16 <= size[0] * size[1] <= 0.8 * 16}


def test_a_batch_of_one_class_is_pasted_into_itself(plans: list[Plan]) -> None:
    for _ in range(40):
        value(composite_inconsistency, small(), pictures(3), torch.ones(3, dtype=torch.int64))
    pairs = {
        pair
        for plan in plans
        for pair in zip(*torch.stack([plan.receiver, plan.donor]).tolist(), strict=True)
    }
    assert pairs == {(i, j) for i, j in product(range(3), repeat=2) if i != j}


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(
    "term",
    [
        composite_inconsistency,
        gradient_disagreement,
        every_test_failed,
        inconsistency_whatever_the_seams,
        partial(seams_unrecognised, honest=nn.Sequential(nn.Flatten(), nn.Linear(128, 2)).double()),
    ],
)
def test_gradients_are_the_differences_of_the_loss(term: Term, outputs: int) -> None:
    """Through maps, composites and all that the terms are relative to."""
    model, images = small(outputs), pictures()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same regions
        return value(term, model, images, state=dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(loss, parameters)
    gradients = torch.autograd.grad(loss(*parameters), parameters, materialize_grads=True)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-4


def test_smaller_margins_are_no_way_to_consistency() -> None:
    model, images = small(), pictures()
    parts = list(model[4].parameters())
    torch.manual_seed(3)
    slopes = torch.autograd.grad(value(composite_inconsistency, model, images), parts)
    along = sum((part * slope).sum() for part, slope in zip(parts, slopes, strict=True))
    assert abs(along) < 1e-12 < max(slope.abs().max() for slope in slopes)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_disagreement_is_one_minus_pearsons_correlation(outputs: int) -> None:
    model, images = small(outputs), pictures()
    found = value(gradient_disagreement, model, images)
    scores = model(images).detach()
    if outputs == 1:
        scores = torch.cat([-scores, scores], 1)  # only the pair's order counts
    rows = model[4].weight.detach()
    rows = torch.cat([-rows, rows]) if outputs == 1 else rows
    wanted = []
    for image, score, label in zip(images, scores, LABELS.tolist(), strict=True):
        other = int(score.masked_fill(torch.arange(len(score)) == label, -torch.inf).argmax())
        row = (rows[label] - rows[other]).numpy()
        before = model[0](image[None])[0].detach().numpy()
        map_ = np.abs((np.log1p(np.exp(before)) * row[:, None, None]).sum(0))
        slope = row[:, None, None] / (1 + np.exp(-before))  # of softplus
        gradient = np.zeros((2, 10, 10))
        for channel, y, x in product(range(3), range(4), range(4)):
            kernel = model[0].weight[channel].detach().numpy()
            gradient[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3] += slope[channel, y, x] * kernel
        pixels = np.abs(gradient[:, 1:9, 1:9]).sum(0)
        cells = pixels.reshape(4, 2, 4, 2).mean((1, 3))
        wanted.append(1 - np.corrcoef(map_.flat, cells.flat)[0, 1])
    assert found.item() == pytest.approx(np.mean(wanted), rel=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_maps_of_nothing_have_finite_terms_and_gradients(scale: float) -> None:
    model, images = small().float(), pictures().float()
    with torch.no_grad():
        model[4].weight.mul_(scale)
        model[4].bias.fill_(1)
    for term, wanted in ((composite_inconsistency, 0), (gradient_disagreement, 1)):
        found = value(term, model, images)
        assert found.dtype == torch.float32
        assert 0 <= found <= 2
        if scale == 0:
            assert found == wanted
        for gradient in torch.autograd.grad(
            found, list(model.parameters()), materialize_grads=True
        ):
            assert gradient.isfinite().all()


def test_what_has_no_composites_is_refused(refused: Callable[[str], Any]) -> None:
    model, images = small(3), pictures()
    with refused("two classes.*not 3, 5 and 16"):
        value(composite_inconsistency, model, images)
    with refused("not 2, 1 and 16: choose another objective, or a larger batch size"):
        value(composite_inconsistency, small(), images[:1], LABELS[:1])
    with refused("not 2, 5 and 1:"):
        value(composite_inconsistency, small(), images[..., :2, :2])
