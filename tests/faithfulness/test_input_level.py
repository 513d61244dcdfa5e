"""Gradients to the pixels against captum, closed forms in float64 and plain loops."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from captum.attr import NoiseTunnel, Saliency
from scipy import stats
from torch import nn

from diffsal.faithfulness.input_level import receptive_share, smoothgrad, smoothgrad_agreement
from diffsal.maps.salience import explain

GRID = (4, 6)  # of 16 × 24 pixels, as the convnet's own


def pooled(*layers, width=6, logits=2):
    """Layers with a pooled linear head, float64, whose evidence differs widely between cells."""
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, logits))
    with torch.no_grad():
        model[-1].weight.mul_(20)
    return model.double()


def patches(width=6, cell=4):
    return nn.Conv2d(3, width, cell, stride=cell)


class MeanOfAll(nn.Module):
    """Every cell becomes the mean over cells: a mixing layer of which nothing local is left."""

    def forward(self, features):
        return features.mean((2, 3), keepdim=True).expand_as(features).clone()


def cell_means(pixels, grid=GRID):
    """(B, h, w) of (B, H, W), pixel by pixel."""
    count, height, width = pixels.shape
    cells = [[[[] for _ in range(grid[1])] for _ in range(grid[0])] for _ in range(count)]
    for b, y, x in product(range(count), range(height), range(width)):
        cells[b][y * grid[0] // height][x * grid[1] // width].append(pixels[b, y, x])
    return torch.stack(
        [
            torch.stack([torch.stack(cell).mean() for row in image for cell in row])
            for image in cells
        ]
    ).view(count, *grid)


def margin_gradient(model, image, true, false):
    image = image.clone().requires_grad_()
    logits = model(image[None])[0]
    return torch.autograd.grad(logits[true] - logits[false], image)[0]


def seen_by(model, run):
    """The batches that a model is given during ``run``, and what ``run`` returns."""
    batches = []
    handle = model.register_forward_pre_hook(lambda _, given: batches.append(given[0].detach()))
    result = run()
    handle.remove()
    return batches, result


@pytest.mark.parametrize("grid", [GRID, (3, 5), (1, 1)])
def test_smoothgrad_equals_a_plain_loop(convnet, images, grid):
    model, inputs = convnet(classes=4).double().eval(), images().double()
    true, false, draws = [0, 1, 3], [2, 0, 1], 4
    run = partial(smoothgrad, model, inputs, true, false, grid=grid, draws=draws, batch_size=5)
    batches, found = seen_by(model, run)
    assert [len(batch) for batch in batches] == [3, 5, 5, 2]
    copies = torch.cat(batches[1:]).view(3, draws, 3, 16, 24)
    expected = []
    for index in range(3):
        total = torch.zeros(16, 24).double()
        for copy in copies[index]:
            total += margin_gradient(model, copy, true[index], false[index]).abs().sum(0)
        expected.append(total / draws)
    torch.testing.assert_close(found, cell_means(torch.stack(expected), grid))


def test_the_noise_is_of_the_stated_size_seeded_and_the_same_for_all_images(images):
    inputs = images(height=64, width=64) * torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def copies(inputs, seed=0, noise=0.15):
        run = partial(smoothgrad, model, inputs, grid=(2, 2), draws=6, noise=noise, seed=seed)
        batches, _ = seen_by(model, run)
        (count,) = {len(inputs)}
        return torch.cat(batches)[count:].view(count, 6, 3, 64, 64)

    state = torch.get_rng_state()
    noisy = copies(inputs)
    span = inputs.amax((1, 2, 3)) - inputs.amin((1, 2, 3))
    patterns = (noisy - inputs[:, None]) / span.view(3, 1, 1, 1, 1) / 0.15
    torch.testing.assert_close(patterns, patterns[:1].expand_as(patterns), atol=1e-4, rtol=1e-4)
    flat = patterns[0].flatten(1)
    assert flat.mean(1).abs().max() < 0.05
    assert (flat.std(1) - 1).abs().max() < 0.05
    assert (flat.corrcoef() - torch.eye(6)).abs().max() < 0.05
    expected = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patterns[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(noisy, copies(inputs))
    assert not torch.equal(noisy, copies(inputs, seed=1))
    torch.testing.assert_close(copies(inputs[2:]), noisy[2:])
    assert torch.equal(copies(inputs, noise=0), inputs[:, None].expand_as(noisy))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise", [0, 0.15, 10])
@pytest.mark.parametrize("logits", [1, 2])
def test_smoothgrad_of_a_linear_model_is_its_weights_size(images, noise, logits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 24, logits)).double()
    weight = model[1].weight.detach().view(logits, 3, 16, 24)
    weight = weight[0] if logits == 1 else weight[1] - weight[0]
    found = smoothgrad(model, images().double(), [0, 1, 1], grid=GRID, draws=3, noise=noise)
    torch.testing.assert_close(found, cell_means(weight.abs().sum(0)[None]).expand(3, *GRID))


def test_without_noise_it_is_captums_saliency(convnet, images):
    model, inputs, labels = convnet().double().eval(), images().double(), torch.tensor([0, 1, 1])
    rows = torch.arange(3)
    saliency = Saliency(lambda x: model(x)[rows, labels] - model(x)[rows, 1 - labels])
    expected = saliency.attribute(inputs, abs=True).sum(1)
    found = smoothgrad(model, inputs, labels, grid=GRID, draws=1, noise=0)
    torch.testing.assert_close(found, cell_means(expected))
    assert torch.equal(smoothgrad(model, inputs, labels, grid=GRID, draws=2, noise=0), found)


def test_with_noise_it_is_captums_noise_tunnel_on_average(images):
    # Captum draws other noise, so that only averages over many draws can be compared.
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.Tanh(), nn.Conv2d(8, 6, 3, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    ).double()  # fmt: skip
    image = 3 * images(1).double()
    tunnel = NoiseTunnel(Saliency(lambda x: model(x)[:, 1] - model(x)[:, 0]))
    stdev = 0.3 * float(image.max() - image.min())
    expected = tunnel.attribute(image, nt_type="smoothgrad", nt_samples=1500, stdevs=stdev)
    found = smoothgrad(model, image, 1, grid=GRID, draws=1500, noise=0.3, batch_size=500)
    torch.testing.assert_close(found, cell_means(expected.sum(1)), rtol=0.03, atol=0)
    plain = smoothgrad(model, image, 1, grid=GRID, draws=1, noise=0)
    assert ((plain / found - 1).abs() > 0.1).any()  # or the noise would not have been tested


def test_classes_are_settled_on_the_untouched_image(convnet, images):
    model, inputs = convnet(classes=4).eval(), images()
    with torch.no_grad():
        first, second = model(inputs).topk(2).indices.unbind(1)
    run = partial(smoothgrad, model, inputs, grid=GRID, draws=20, noise=3)
    batches, found = seen_by(model, run)
    with torch.no_grad():
        assert (model(torch.cat(batches[1:])).argmax(1) != first.repeat_interleave(20)).any()
    torch.testing.assert_close(found, run(first, second))
    torch.testing.assert_close(run(first), found)
    scores = [lambda z, k=k: z[k] for k in first.tolist()]
    torch.testing.assert_close(run(scores, second), found)


def test_smoothgrad_depends_on_neither_batch_nor_place(convnet, images):
    model, inputs = convnet().double().eval(), images().double()
    run = partial(smoothgrad, model, grid=GRID, draws=5)
    together = run(inputs, batch_size=1000)
    torch.testing.assert_close(run(inputs, batch_size=1), together)
    torch.testing.assert_close(run(inputs[2:]), together[2:])
    torch.testing.assert_close(run(inputs.flip(0)), together.flip(0))


@pytest.mark.parametrize("squash", [nn.Sigmoid(), nn.Flatten(0)])
def test_outputs_are_read_as_everywhere(convnet, images, squash):
    model, inputs = convnet(classes=1).eval(), images()
    for measure in (partial(smoothgrad, grid=GRID, draws=2), receptive_share):
        expected = measure(model, inputs, 1)
        torch.testing.assert_close(measure(nn.Sequential(model, squash), inputs, 1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_float32(convnet, images, dtype):
    model, inputs = convnet().eval(), images()
    for measure in (partial(smoothgrad, grid=GRID, draws=2), receptive_share):
        expected = measure(model.float(), inputs, 1)
        found = measure(model.to(dtype), inputs.to(dtype), 1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.2, atol=0.02 * float(expected.max()))


def test_agreement_is_spearmans_of_the_maps_size_with_the_cells():
    generator = torch.Generator().manual_seed(4)
    maps, cells = torch.randn(3, 4, 6, generator=generator), torch.rand(3, 4, 6)
    found = smoothgrad_agreement(maps, cells)
    for one, cell, value in zip(maps, cells, found, strict=True):
        expected = stats.spearmanr(one.abs().flatten(), cell.flatten()).statistic
        assert float(value) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(smoothgrad_agreement(-maps.numpy(), cells), found)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 6)
    finer = maps.repeat_interleave(2, 1).repeat_interleave(2, 2) * signs  # of mean 0 in a cell
    torch.testing.assert_close(smoothgrad_agreement(finer, cells), found)
    assert smoothgrad_agreement(maps[:1] * 0 - 2, cells[:1]).isnan().all()


def test_a_map_of_where_the_model_looks_agrees_with_the_pixels(images):
    mask = torch.linspace(-2, 3, 24).view(GRID)  # how much a cell counts, and which way
    grey = images().double()

    class Weighed(nn.Module):
        def forward(self, x):
            cells = nn.functional.avg_pool2d(x.sum(1), 4).flatten(1)
            score = cells @ mask.double().flatten()
            return torch.stack([-score, score], 1)

    cells = smoothgrad(Weighed(), grey, 1, grid=GRID, draws=2)
    maps = mask.expand(3, *GRID).double()
    assert smoothgrad_agreement(maps, cells).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("logits", [1, 2])
def test_a_bag_of_features_looks_at_a_cells_own_pixels(images, logits):
    model = pooled(patches(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), logits=logits)
    share = receptive_share(model, images().double())
    assert share.tolist() == [1, 1, 1]


def test_one_convolution_over_cells_reaches_the_neighbours_and_two_further(images):
    once = pooled(patches(), nn.Conv2d(6, 6, 3, padding=1))
    assert receptive_share(once, images().double(), 1).tolist() == [1, 1, 1]
    twice = pooled(patches(), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1))
    share = receptive_share(twice, images().double(), 1)
    assert (share < 0.99).all()
    assert (share > 0.3).all()


def test_where_all_pixels_count_alike_the_share_is_that_of_the_area(images):
    model = pooled(patches(), MeanOfAll())
    # The evidence is everywhere the same: as many draws as cells take each of them once.
    share = receptive_share(model, images().double(), 1, target_layers="1", cells_per_image=24)
    neighbours = (2 + 3 + 3 + 2) * (2 + 3 + 3 + 3 + 3 + 2)
    one_patch = model[0].weight  # the same for all cells
    assert one_patch.abs().min() > 0
    assert share.tolist() == pytest.approx([neighbours / 24**2] * 3)
    assert neighbours / 24**2 < 9 / 24


def shares_of_all_cells(maps_of, image, grid=GRID):
    """(h·w,) evidence and (h·w,) shares: one backward pass for each cell, pixel by pixel."""
    pixels = image[None].clone().requires_grad_()
    values = maps_of(pixels)[0].flatten()
    shares = []
    for cell, value in enumerate(values):
        (gradient,) = torch.autograd.grad(value, pixels, retain_graph=True)
        inside, total = 0.0, 0.0
        for y, x in product(range(16), range(24)):
            energy = float(gradient[0, :, y, x].square().sum())
            rows = y * grid[0] // 16 - cell // grid[1]
            columns = x * grid[1] // 24 - cell % grid[1]
            total += energy
            inside += energy if max(abs(rows), abs(columns)) <= 1 else 0.0
        shares.append(inside / total if total else math.nan)
    return values.detach(), torch.tensor(shares, dtype=torch.float64)


class MeanCubed(nn.Module):
    """Behind the layer, what a cell adds depends on all the others: Σ_c w·(mean of A_c)³."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6))

    def forward(self, features):
        return features.mean((2, 3)) ** 3 @ self.weight.T


def case(name):
    """A model in float64, its layer, and its difference map of class 1, written out."""
    torch.manual_seed(7)
    mixing = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
    if name == "linear head":
        model = pooled(patches(), nn.Tanh(), mixing, nn.ReLU(), mixing, nn.Tanh())
        body, layer = model[:6], "5"

        def maps_of(pixels):
            weight = (model[-1].weight[1] - model[-1].weight[0]).view(1, 6, 1, 1)
            return (weight * body(pixels)).sum(1) / 24

    elif name == "norm behind the pooling":  # whose scale depends on every cell
        norm = nn.LayerNorm(6)
        model = pooled(patches(), nn.Tanh(), mixing)
        model.insert(5, norm.double())
        body, layer = model[:3], "2"
        nn.init.normal_(norm.weight)

        def maps_of(pixels):
            weight = norm.weight * (model[-1].weight[1] - model[-1].weight[0])
            features = body(pixels)
            scale = (features.mean((2, 3)).var(1, correction=0) + norm.eps).rsqrt()
            centred = (weight - weight.mean()).view(1, 6, 1, 1) * scale.view(-1, 1, 1, 1)
            return (centred * features).sum(1) / 24

    else:
        model = nn.Sequential(patches(), nn.Tanh(), MeanCubed()).double()
        body, layer = model[:2], "1"

        def maps_of(pixels):
            weight = (model[-1].weight[1] - model[-1].weight[0]).view(1, 6, 1, 1)
            features = body(pixels)
            return (weight * 3 * features.mean((2, 3), keepdim=True) ** 2 * features / 24).sum(1)

    return model, layer, maps_of


@pytest.mark.parametrize("name", ["linear head", "norm behind the pooling", "cubic head"])
def test_shares_equal_a_backward_pass_for_each_cell_weighted_by_evidence(images, name):
    model, layer, maps_of = case(name)
    inputs = images().double()
    difference = explain(model, inputs, 1, target_layers=layer).difference
    torch.testing.assert_close(difference, maps_of(inputs).detach())
    found = receptive_share(model, inputs, 1, target_layers=layer, cells_per_image=600)
    one = receptive_share(model, inputs, 1, target_layers=layer, cells_per_image=1, seed=2)
    for image, share, single in zip(inputs, found, one, strict=True):
        evidence, shares = shares_of_all_cells(maps_of, image)
        expected = (evidence.abs() * shares).sum() / evidence.abs().sum()
        assert float(share) == pytest.approx(float(expected), abs=2e-3)
        assert (shares - single).abs().min() < 1e-9  # exactly that of one cell


def test_cells_are_drawn_as_often_as_their_evidence_is_large(images):
    # Of three columns of cells, the left is local, the middle is a mean of all, the right is 0.
    class Columns(nn.Module):
        def forward(self, x):
            cells = nn.functional.avg_pool2d(x, 4)
            mean = cells.mean((2, 3), keepdim=True).expand_as(cells)
            return torch.cat([3 * cells[..., :1], mean[..., 1:2], 0 * cells[..., 2:]], 3)

    model = nn.Sequential(Columns(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    nn.init.ones_(model[-1].weight)
    nn.init.constant_(model[-1].weight[0], -1)
    inputs = torch.ones(2, 3, 4, 12)  # one row of three cells, evidence 3 : 1 : 0
    share = partial(receptive_share, model, inputs, 1, target_layers="0")
    assert share(cells_per_image=8).tolist() == [1, 1]  # of the mean, all three cells are near
    inputs = torch.ones(2, 3, 4, 24)
    inputs[1, :, :, :4] = -5  # evidence of -15 beside a mean of 0
    wide = receptive_share(model, inputs, 1, target_layers="0", cells_per_image=8)
    assert wide.tolist() == pytest.approx([(6 * 1 + 2 * 3 / 6) / 8, 1])
    seeds = [
        receptive_share(model, inputs[:1], 1, target_layers="0", cells_per_image=1, seed=seed)
        for seed in range(200)
    ]
    found = torch.cat(seeds)
    assert {round(float(value), 3) for value in found} == {1, 0.5}
    assert float((found == 1).float().mean()) == pytest.approx(0.75, abs=0.1)


def test_cells_that_no_pixel_moves_are_left_out_of_the_mean(images):
    class HalfBlind(nn.Module):
        def forward(self, features):
            return torch.cat([features[..., :3], torch.ones_like(features[..., 3:])], 3)

    model = pooled(patches(), HalfBlind())
    share = receptive_share(model, images().double(), 1, target_layers="1", cells_per_image=50)
    assert share.tolist() == [1, 1, 1]


def test_tokens_are_brought_onto_a_grid(images):
    class Tokens(nn.Module):
        def forward(self, features):
            return features.flatten(2).transpose(1, 2)

    class Mean(nn.Module):
        def forward(self, tokens):
            return tokens.mean(1)

    model = nn.Sequential(patches(), Tokens(), Mean(), nn.Linear(6, 2))

    def share(reshape):
        return receptive_share(model, images(), 1, target_layers="1", reshape_transform=reshape)

    assert share(lambda one: one.transpose(1, 2).reshape(-1, 6, *GRID)).tolist() == [1, 1, 1]
    turned = share(lambda one: one.flip(1).transpose(1, 2).reshape(-1, 6, *GRID))
    assert (turned < 0.7).all()  # as a cell is given to the pixels of the one across


def test_receptive_shares_are_of_the_classes_that_are_named(convnet, images):
    model, inputs = convnet(classes=4).double().eval(), images().double()
    found = receptive_share(model, inputs, [0, 1, 3], [2, 0, 1])
    pair = convnet().double().eval()
    for index, rows in enumerate([[2, 0], [0, 1], [1, 3]]):
        pair.load_state_dict(
            {name: value[rows] if name[0] == "9" else value
             for name, value in model.state_dict().items()}
        )  # fmt: skip
        expected = receptive_share(pair, inputs[index : index + 1], 1)
        torch.testing.assert_close(found[index : index + 1], expected)


@pytest.mark.parametrize("measure", [partial(smoothgrad, grid=GRID), receptive_share])
def test_inputs_made_in_inference_mode_will_do(convnet, images, measure):
    model, inputs = convnet(), images()
    expected = measure(model, inputs)
    with torch.inference_mode():
        made = images()
        torch.testing.assert_close(measure(model, made), expected)
    torch.testing.assert_close(measure(model, made), expected)


def test_receptive_shares_depend_on_neither_batch_nor_place(convnet, images):
    model, inputs = convnet().double().eval(), images().double()
    share = partial(receptive_share, model, true=1)
    together = share(inputs)
    assert together.dtype == torch.float64
    torch.testing.assert_close(share(inputs[2:]), together[2:])
    torch.testing.assert_close(share(inputs.flip(0)), together.flip(0))
    torch.testing.assert_close(share(1e-15 * inputs, seed=0).isnan().any(), torch.tensor(False))


def test_small_gradients_have_shares_too(images):
    model = pooled(patches(), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)).float()
    expected = receptive_share(model, images(), 1)
    with torch.no_grad():
        model[-1].weight.mul_(1e-28)
    torch.testing.assert_close(receptive_share(model, images(), 1), expected)


def test_a_map_that_is_zero_or_that_no_pixel_moves_has_no_share(images):
    model, inputs = pooled(patches(), nn.ReLU()), images().double()
    with torch.no_grad():
        model[0].weight.zero_()
    assert receptive_share(model, inputs, 1).isnan().all()  # the bias is all the evidence
    with torch.no_grad():
        model[0].bias.fill_(-1)
    assert receptive_share(model, inputs, 1).isnan().all()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_callers_mode_and_the_model_stay_as_they_were(convnet, images, mode, frozen):
    model = convnet().train()
    model[1].eval()
    model.insert(0, nn.ReLU(inplace=True))  # an input that is changed in place
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = []
    share = partial(receptive_share, target_layers="6")
    for measure in (partial(smoothgrad, grid=GRID, draws=3), share):
        expected.append(measure(model, images() - 0.5, 1))
        with mode():
            inputs = images() - 0.5  # of which a ReLU in place would change half
            original = inputs.clone()
            found = measure(model, inputs, torch.tensor([1, 1, 1]))
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
            assert not found.requires_grad
            assert not inputs.requires_grad
            assert torch.equal(inputs, original)
        torch.testing.assert_close(found, expected[-1])
    assert [module.training for module in model[:4]] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad != frozen for parameter in model.parameters())
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert all(p.grad is None for p in model.parameters() if p is not model[1].weight)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("measure", [partial(smoothgrad, grid=GRID), receptive_share])
def test_inputs_of_a_graph_keep_it_to_themselves(convnet, images, measure):
    model, leaf = convnet().eval(), images().requires_grad_()
    measure(model, 2 * leaf, 1)
    measure(model, leaf, 1)
    assert leaf.grad is None


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: smoothgrad(m, x[:, :, 0], grid=GRID), "are no images"),
        (lambda m, x: smoothgrad(m, x, grid=(17, 2)), "17 × 2 cells does not fit"),
        (lambda m, x: smoothgrad(m, x, grid=GRID, draws=0), "draws=0 and noise=0.15 give nothing"),
        (lambda m, x: smoothgrad(m, x, grid=GRID, noise=-1), "standard deviation of 0 or more"),
        (lambda m, x: smoothgrad(m, x, grid=GRID, noise=math.nan), "noise=nan"),
        (lambda m, x: smoothgrad(m, x.long(), grid=GRID), "torch.int64 have no gradient"),
        (lambda m, x: smoothgrad(m, x, 2, grid=GRID), "names class 2"),
        (lambda m, x: smoothgrad(nn.Sequential(Detached(), m), x, grid=GRID), "no gradient flows"),
        (lambda m, x: smoothgrad(nn.Sequential(m, Detached()), x, grid=GRID), "no gradient flows"),
        (lambda m, x: smoothgrad_agreement(torch.zeros(2, 4, 6), torch.zeros(3, 4, 6)), "3 images"),
        (lambda m, x: receptive_share(m, x[:, :, 0]), "are no images"),
        (lambda m, x: receptive_share(m, x[:, :, None]), "are no images"),
        (lambda m, x: receptive_share(m, x.long()), "torch.int64 have no gradient"),
        (lambda m, x: receptive_share(m, x, cells_per_image=0), "cells_per_image is 0"),
        (lambda m, x: receptive_share(m, x, 2), "names class 2"),
        (lambda m, x: receptive_share(m, x, target_layers="99"), "'99'"),
        (lambda m, x: receptive_share(nn.Sequential(Detached(), m), x), "to the pixels"),
        (
            lambda m, x: receptive_share(nn.Sequential(nn.Upsample(scale_factor=2), m), x,
                                         target_layers="1.0"),
            "does not fit images of 16 × 24 pixels",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(convnet, images, refused, call, message):
    with refused(message):
        call(convnet(), images())


@pytest.mark.parametrize("measure", [partial(smoothgrad, grid=GRID), receptive_share])
def test_a_model_made_in_inference_mode_is_refused(convnet, images, refused, measure):
    with torch.inference_mode():
        model = convnet()
    with refused("made in inference mode"):
        measure(model, images())
