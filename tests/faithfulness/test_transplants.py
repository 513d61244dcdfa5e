"""Transplants against a plain loop, closed forms and pastes made by hand."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from diffsal.faithfulness.pasting import Plan, pasted
from diffsal.faithfulness.perturbation import around, occlusion_drops, occlusion_faithfulness
from diffsal.faithfulness.transplants import transplant_drops


def donors_of(count=3, each=2, height=16, width=24, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, each, 3, height, width, generator=generator)


def window_sums(maps, reach):
    """(B, h, w): by plain slices."""
    sums = torch.zeros_like(maps)
    for row, column in product(range(maps.shape[1]), range(maps.shape[2])):
        top, left = max(row - reach, 0), max(column - reach, 0)
        part = maps[:, top : row + reach + 1, left : column + reach + 1]
        sums[:, row, column] = part.sum((1, 2))
    return sums


def linear(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, 2)).double()
    return model, (model[1].weight[1] - model[1].weight[0]).view(3, 16, 24).detach()


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)])  # 16 × 24 pixels: even and uneven
@pytest.mark.parametrize("window", [1, 3, 5])
def test_drops_equal_a_plain_loop(convnet, images, grid, window):
    model, inputs, donors = convnet(classes=4).double().eval(), images().double(), donors_of()
    donors, true, false, reach = donors.double(), [0, 1, 3], [2, 0, 1], window // 2
    drops = transplant_drops(
        model, inputs, donors, true, false, grid=grid, window=window, per_cell=2, batch_size=5
    )
    assert drops.shape == (3, *grid)
    for index, (image, t, f) in enumerate(zip(inputs, true, false, strict=True)):
        for row, column in product(range(grid[0]), range(grid[1])):
            variants = [image]
            for donor in donors[index]:
                variant = image.clone()
                for y, x in product(range(16), range(24)):
                    rows, columns = y * grid[0] // 16 - row, x * grid[1] // 24 - column
                    if abs(rows) <= reach and abs(columns) <= reach:
                        variant[:, y, x] = donor[:, y, x]
                variants.append(variant)
            with torch.no_grad():
                logits = model(torch.stack(variants))
            margins = logits[:, t] - logits[:, f]
            expected = float(margins[0] - margins[1:].mean())
            assert float(drops[index, row, column]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("window", [1, 3])
def test_a_linear_models_drops_are_window_sums_of_what_differs(images, window):
    model, weight = linear()
    inputs, donors = images().double(), donors_of(each=1).double()
    cells = (weight * (inputs - donors[:, 0])).sum(1).view(3, 4, 4, 6, 4).sum((2, 4))
    drops = transplant_drops(model, inputs, donors, 1, grid=(4, 6), window=window)
    torch.testing.assert_close(drops, window_sums(cells, window // 2))
    sums = window_sums(cells, window // 2)
    assert occlusion_faithfulness(sums, drops).tolist() == pytest.approx([1, 1, 1])
    assert occlusion_faithfulness(-sums, drops).tolist() == pytest.approx([-1] * 3)


def test_an_image_that_donates_to_itself_drops_nothing(convnet, images):
    inputs = images()
    drops = transplant_drops(convnet().eval(), inputs, inputs[:, None], grid=(4, 6))
    assert drops.abs().max() < 1e-5


def test_a_window_of_one_is_a_paste_of_a_cell(convnet, images):
    model, inputs, donors = convnet().eval(), images(), donors_of(each=1)
    drops = transplant_drops(model, inputs, donors, 1, 0, grid=(4, 6), window=1)
    region = torch.eye(24).bool().view(24, 4, 6)
    for index in range(3):
        pair = torch.stack([inputs[index], donors[index, 0]])
        plan = Plan(torch.zeros(24).long(), torch.ones(24).long(), region, "sharp")
        with torch.no_grad():
            before, after = model(pair[:1]), model(pasted(pair, plan))
        expected = (before[:, 1] - before[:, 0]) - (after[:, 1] - after[:, 0])
        torch.testing.assert_close(drops[index].flatten(), expected, atol=1e-4, rtol=1e-4)


def test_a_flat_donor_of_the_mean_is_mean_occlusion(convnet, images):
    model, inputs = convnet().eval(), images()
    flat = inputs.mean((2, 3), keepdim=True).expand_as(inputs)[:, None]
    found = transplant_drops(model, inputs, flat, grid=(4, 6), window=1)
    expected = occlusion_drops(model, inputs, grid=(4, 6))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_classes_are_settled_on_the_untouched_image(convnet, images):
    model, inputs, donors = convnet(classes=4).eval(), images(), 5 * donors_of(each=1)
    with torch.no_grad():
        first, second = model(inputs).topk(2).indices.unbind(1)
    drops = partial(transplant_drops, model, inputs, donors, grid=(2, 3))
    torch.testing.assert_close(drops(), drops(first, second))


def test_every_cell_draws_its_donors_without_repeating_any(images):
    model, weight = linear()
    inputs, levels = images().double(), torch.tensor([1.0, 10.0, 100.0, 1000.0]).double()
    donors = inputs[:, None] - levels.view(1, 4, 1, 1, 1)
    cells = weight.sum(0).view(4, 4, 6, 4).sum((1, 3))

    def mean_levels(per_cell, seed=0):
        drops = partial(transplant_drops, model, grid=(4, 6), window=1, per_cell=per_cell)
        found = drops(inputs, donors, 1, seed=seed) / cells
        assert torch.allclose(found, found[:1])  # the draw is the same for all images
        alone = drops(inputs[2:], donors[2:], 1, seed=seed) / cells
        torch.testing.assert_close(alone, found[2:])
        return found[0].flatten() * per_cell

    state = torch.get_rng_state()
    assert {round(float(level)) for level in mean_levels(1)} == {1, 10, 100, 1000}
    pairs = {round(float(level)) for level in mean_levels(2)}
    assert pairs == {11, 101, 1001, 110, 1010, 1100}
    assert {round(float(level)) for level in mean_levels(4)} == {1111}
    assert torch.equal(mean_levels(1, seed=3), mean_levels(1, seed=3))
    assert not torch.allclose(mean_levels(1, seed=3), mean_levels(1, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_do_not_matter_and_the_model_is_left_alone(convnet, images):
    model, inputs, donors = convnet().train(), images(), donors_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    largest, seen = [], set()

    def watch(module, given):
        largest.append(len(given[0]))
        seen.add((module.training, torch.is_grad_enabled()))

    handle = model.register_forward_pre_hook(watch)
    small = transplant_drops(model, inputs, donors, grid=(4, 6), batch_size=7)
    handle.remove()
    assert (max(largest), seen) == (7, {(False, False)})
    torch.testing.assert_close(
        transplant_drops(model, inputs, donors, grid=(4, 6), batch_size=1000),
        small, atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_lies_around_is_counted_in_rows_and_columns():
    cells = torch.arange(20).view(4, 5)
    near = around(cells, torch.tensor([4, 7, 15]), columns=5, reach=1)
    assert [cells[one].tolist() for one in near] == [
        [3, 4, 8, 9], [1, 2, 3, 6, 7, 8, 11, 12, 13], [10, 11, 15, 16]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "a window of 2 cells has no middle"),
        ({"window": -1}, "has no middle"),
        ({"per_cell": 3}, "per_cell is 3, and of donors there are 2"),
        ({"per_cell": 0}, "every cell takes one or more"),
        ({"donors": donors_of(4)}, r"\(4, 2, 3, 16, 24\) do not fit inputs of \(3, 3, 16, 24\)"),
        ({"donors": donors_of()[:, 0]}, "do not fit inputs"),
        ({"donors": donors_of(height=8)}, "do not fit inputs"),
        ({"inputs": torch.zeros(3, 16, 24)}, "are no images"),
        ({"grid": (17, 2)}, "17 × 2 cells does not fit"),
        ({"true": 2}, "names class 2"),
    ],
)
def test_errors_say_what_to_do(convnet, images, refused, change, message):
    arguments = {"inputs": images(), "donors": donors_of(), "grid": (4, 6), **change}
    with refused(message):
        transplant_drops(convnet(), **arguments)
