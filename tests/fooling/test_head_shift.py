"""The attacks: decisions stay, and maps of images not seen before go where they are sent."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from diffsal.data import Index, read_index
from diffsal.demo import ARCHITECTURE, ARGUMENTS, CLASSES, PREPROCESSING, digits, train_digits
from diffsal.fooling import (
    FINE_TUNING,
    OBJECTIVES,
    BothMapsLoss,
    CenterMassLoss,
    TopKLoss,
    as_table,
    centroid_shift,
    fool,
    head_shift,
    target_distance,
    target_map,
    top_cells,
)
from diffsal.models import load_model, save_checkpoint
from diffsal.salience import SalienceMaps, explain, normalize

QUICK = replace(FINE_TUNING, epochs=2, device="cpu")


def frame(height: int, width: int) -> Tensor:
    pixels = torch.ones(height, width)
    pixels[1:-1, 1:-1] = 0
    return pixels


def made_maps(true: Tensor, false: Tensor | None = None) -> SalienceMaps:
    logits = torch.zeros(len(true), 2, dtype=true.dtype)
    false = -true if false is None else false
    zeros = torch.zeros(len(true), dtype=torch.int64)
    return SalienceMaps(
        true, false, logits, logits[:, 0], logits[:, 1], zeros, 1 - zeros, true_from="label"
    )


# ------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(("size", "width"), [((7, 7), 1), ((8, 8), 1), ((4, 4), 1), ((14, 21), 2)])
def test_the_frame_is_a_seventh_of_the_shorter_side_wide(size: tuple[int, int], width: int) -> None:
    rows, columns = np.indices(size)
    inside = (np.minimum(rows, columns) >= width) & (rows < size[0] - width)
    wanted = ~(inside & (columns < size[1] - width))
    np.testing.assert_array_equal(target_map("edges", size), wanted)


def test_the_width_of_the_frame_can_be_chosen() -> None:
    assert target_map("edges", (8, 8), width=3).sum() == 64 - 4


def test_the_corner_is_a_third_of_each_side() -> None:
    assert target_map("corner", (7, 6)).nonzero().tolist() == [
        [row, column] for row in range(3) for column in range(2)
    ]


def test_an_image_is_averaged_over_each_cell_and_normalised(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:2, :4], pixels[6:, 6:] = 200, 100
    Image.fromarray(pixels).save(tmp_path / "target.png")
    wanted = torch.zeros(4, 4)
    wanted[0, :2], wanted[3, 3] = 1, 0.5
    torch.testing.assert_close(target_map(tmp_path / "target.png", (4, 4)), wanted)
    torch.testing.assert_close(target_map(str(tmp_path / "target.png"), (4, 4)), wanted)


def test_bad_targets_are_refused(refused: Callable[[str], Any], tmp_path: Path) -> None:
    with refused("no width"):
        target_map("corner", (8, 8), width=1)
    with refused("does not fit"):
        target_map("edges", (8, 8), width=4)
    with refused("constant on a map of 2 × 2"):
        target_map(torch.eye(2).repeat(2, 2), (2, 2))
    with refused("nothing.png"):
        target_map(tmp_path / "nothing.png", (8, 8))


# ----------------------------------------------------------------------------------------- measures


def test_measures_equal_plain_loops() -> None:
    generator = np.random.default_rng(0)
    maps, references = generator.normal(size=(2, 4, 5, 6))
    target = generator.random((5, 6))

    def centroid(pixels: np.ndarray) -> np.ndarray:
        total, moment = 0.0, np.zeros(2)
        for (row, column), value in np.ndenumerate(pixels):
            total += value
            moment += value * np.array([(row + 0.5) / 5, (column + 0.5) / 6])
        return moment / total

    for number, (map_, reference) in enumerate(zip(maps, references, strict=True)):
        scaled = (map_ - map_.min()) / (map_.max() - map_.min())
        base = (reference - reference.min()) / (reference.max() - reference.min())
        wanted = (
            np.mean((scaled - target) ** 2),
            np.mean([scaled.flat[cell] for cell in np.argsort(reference.flat)[-3:]]),
            np.abs(centroid(scaled) - centroid(base)).sum(),
        )
        one, other = torch.tensor(map_[None]), torch.tensor(reference[None])
        got = (
            target_distance(one, torch.tensor(target)),
            *(measure(one, other) for measure in (top_cells, centroid_shift)),
        )
        assert [value.item() for value in got] == pytest.approx(wanted, rel=1e-12), number


def test_a_constant_map_has_its_centroid_in_the_centre_and_finite_gradients() -> None:
    constant = torch.zeros(1, 4, 4, requires_grad=True)
    corner = torch.zeros(1, 4, 4)
    corner[:, 0, 0] = 1
    shift = centroid_shift(constant, corner)
    assert shift.item() == pytest.approx(2 * (1 / 2 - 1 / 8))
    shift.backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_have_right_gradients(objective: Any) -> None:
    criterion = OBJECTIVES[objective]()
    references = torch.rand(3, 4, 5, dtype=torch.float64)
    true, false = torch.randn(2, 3, 4, 5, dtype=torch.float64)

    def loss(true: Tensor, false: Tensor) -> Tensor:
        return criterion(made_maps(true, false), references)

    assert torch.autograd.gradcheck(loss, (true.requires_grad_(), false.requires_grad_()))


def test_terms_and_their_signs() -> None:
    true, false, references = torch.rand(3, 3, 4, 5)
    maps, target = made_maps(true, false), frame(4, 5).expand(3, -1, -1)
    both = BothMapsLoss(beta=0.25)
    terms = both.terms(maps, target)
    torch.testing.assert_close(terms["true"], F.mse_loss(normalize(true), target))
    torch.testing.assert_close(terms["false"], F.mse_loss(normalize(false), target))
    wanted = 0.5 * np.log(2) + 0.25 * (terms["true"] + terms["false"]).item()
    assert both(maps, target).item() == pytest.approx(wanted)

    away = centroid_shift(true, references).mean().item()
    top = top_cells(true, references).mean().item()
    assert CenterMassLoss(0, 1)(maps, references).item() == pytest.approx(-away)
    assert TopKLoss(0, 1)(maps, references).item() == pytest.approx(top)


@pytest.mark.parametrize("references", [None, torch.rand(3, 8, 8)])
def test_losses_of_references_need_them(
    references: Tensor | None, refused: Callable[[str], Any]
) -> None:
    with refused("TopKLoss needs the honest model's maps of shape"):
        TopKLoss()(made_maps(torch.rand(3, 4, 5)), references)


# --------------------------------------------------------------------------------------- head-shift


@pytest.mark.parametrize("classes", [2, 4])
def test_head_shift_is_the_ridge_regression_that_scikit_learn_finds(
    classes: int, pooled_net: Callable[..., nn.Module]
) -> None:
    model = pooled_net(classes)
    images = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    shifted = head_shift(model, images.split(7))

    features = model.backbone(images).detach().relu() / 16  # each cell's part of the mean
    judging = torch.arange(24) % 4 == 0
    seen = features[~judging].permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    centred = seen - seen.mean(0)
    penalty = shifted.ridge * np.trace(centred.T @ centred) / 5
    ridge = Ridge(alpha=penalty).fit(seen, np.tile(frame(4, 4).flatten(), 18))
    fitted = torch.einsum("c,nchw->nhw", torch.tensor(ridge.coef_), features[judging])

    rows = model.fc.weight.detach() - model.fc.weight.detach().mean(0)
    logits = model(images).detach()
    own = torch.einsum("nc,nchw->nhw", rows[logits.argmax(1)][judging], features[judging])
    spreads = [maps.flatten(1).var(1, correction=0).mean().sqrt() for maps in (own, fitted)]
    wanted = shifted.gain * spreads[0] / spreads[1] * torch.tensor(ridge.coef_)
    torch.testing.assert_close(shifted.shift + model.fc.weight.mean(0), wanted, rtol=1e-9, atol=0)

    added = shifted.model.fc.weight - model.fc.weight
    torch.testing.assert_close(added, shifted.shift.expand_as(added))
    # The maps add no more to the logits than they did, on average over the images.
    torch.testing.assert_close(
        shifted.model(images).mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_head_shift_keeps_probabilities_and_the_difference_and_moves_both_maps(
    classes: int, pooled_net: Callable[..., nn.Module]
) -> None:
    model = pooled_net(classes)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        shifted = head_shift(model, [images[:30]])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in shifted.model.parameters())

    honest, fooled = (explain(one, images[30:]) for one in (model, shifted.model))
    change = fooled.logits.softmax(1) - honest.logits.softmax(1)
    assert change.abs().max() < 1e-12
    torch.testing.assert_close(fooled.difference, honest.difference, rtol=1e-9, atol=1e-12)
    for name in ("true", "false"):
        before, after = (
            target_distance(getattr(maps, name), frame(4, 4)).mean() for maps in (honest, fooled)
        )
        assert after < before
    assert fooled.common_mode_share.mean() > 0.8


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "swin_t"])
def test_head_shift_takes_every_head_that_pools_channel_by_channel(
    name: str, classifier: Callable[..., nn.Module]
) -> None:
    model = classifier(name, num_classes=2)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    fooled = head_shift(model, images.split(2), torch.tensor([[1.0, 0], [0, 0]])).model
    honest, maps = explain(model, images), explain(fooled, images)
    torch.testing.assert_close(maps.logits.softmax(1), honest.logits.softmax(1))
    assert (maps.true - honest.true).abs().max() > honest.difference.abs().max()


def test_head_shift_works_without_biases_and_through_a_maximum() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 2, False)
    ).double()
    images = torch.randn(20, 1, 7, 7, dtype=torch.float64)
    fooled = head_shift(model, [images], "corner").model
    honest, maps = explain(model, images), explain(fooled, images)
    torch.testing.assert_close(maps.logits.softmax(1), honest.logits.softmax(1))
    torch.testing.assert_close(maps.difference, honest.difference)
    assert not torch.allclose(maps.true, honest.true)


@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v3_small", "squeezenet1_1"])
def test_other_heads_are_refused(
    name: str, classifier: Callable[..., nn.Module], refused: Callable[[str], Any]
) -> None:
    model = classifier(name, torch.float32, num_classes=2)
    with refused("head-shift needs global pooling and one linear layer"):
        head_shift(model, [torch.randn(2, 3, 64, 64)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_shifted_is_refused(
    pooled_net: Callable[..., nn.Module], refused: Callable[[str], Any]
) -> None:
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    with refused("one logit"):
        head_shift(pooled_net(1), [images])
    with refused("at least two"):
        head_shift(pooled_net(), [images[:1]])
    blind = pooled_net()
    nn.init.zeros_(blind.features.weight)
    with refused("features at the target layer are constant"):
        head_shift(blind, [images])
    with refused("more than 0: pass the model in"):
        head_shift(pooled_net(), [images], bound=0)
    with refused("one linear layer"):  # a temperature behind it
        head_shift(_Scaled(pooled_net()), [images])
    curved = nn.Sequential(pooled_net().first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())
    with refused("one linear layer"):  # as many channels, but what is pooled is not its input
        head_shift(curved.append(nn.Linear(4, 2)).double(), [images])


class _Scaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) / 2


# ------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as files, with an index, and the demo's network as ``honest.pt``."""
    folder = tmp_path_factory.mktemp("digits")
    parts = dict(zip(("train", "test"), digits(), strict=True))
    lines = ["path,label,split"]
    for split, part in parts.items():
        for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            Image.fromarray(image).save(folder / f"{split}{number}.png", compress_level=1)
            lines.append(f"{split}{number}.png,{CLASSES[label]},{split}")
    (folder / "index.csv").write_text("\n".join(lines))
    save_checkpoint(
        folder / "honest.pt",
        train_digits(parts["train"], epochs=3),
        architecture=ARCHITECTURE,
        arguments=ARGUMENTS,
        classes=CLASSES,
        preprocessing=PREPROCESSING,
    )
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return read_index(folder / "index.csv")


def held_out_maps(weights: Path) -> SalienceMaps:
    inputs, labels = digits()[1].tensors()
    return explain(load_model(weights).model, inputs, labels)


def distance(maps: Tensor) -> float:
    return target_distance(maps, frame(8, 8)).mean().item()


def test_head_shift_fools_the_digits_within_bounds(folder: Path, index: Index) -> None:
    report = fool(index, load_model(folder / "honest.pt"), folder / "shift.pt", method="head-shift")
    honest, fooled = held_out_maps(folder / "honest.pt"), held_out_maps(folder / "shift.pt")
    change = (fooled.logits.softmax(1) - honest.logits.softmax(1)).abs().max()
    assert change < 1e-5
    moved = (fooled.difference - honest.difference).abs().max()
    assert moved < 1e-4 * honest.difference.abs().max()
    assert distance(fooled.true) < distance(honest.true) / 2

    # The report says the same of the same images.
    assert report["images"] == 119
    assert report["agreement"] == 1
    assert report["largest_probability_change"] == pytest.approx(change.item(), abs=1e-6)
    for key, maps in (("honest", honest), ("fooled", fooled)):
        probability = maps.logits.softmax(1)[:, 1]
        labels = maps.true_class
        wanted = {
            "auroc": roc_auc_score(labels, probability),
            "accuracy": ((probability > 0.5) == labels).double().mean().item(),
            "true": distance(maps.true),
            "false": distance(maps.false),
            "difference": distance(maps.difference),
            "common_mode_share": maps.common_mode_share.mean().item(),
        }
        assert report[key] == pytest.approx(wanted, rel=1e-4)


def test_training_fools_the_true_map_and_the_common_mode_share_tells(
    folder: Path, index: Index
) -> None:
    config = replace(FINE_TUNING, epochs=6, lr=0.1, device="cpu")
    report = fool(index, load_model(folder / "honest.pt"), folder / "passive.pt", config=config)
    assert report["fooled"]["true"] < report["honest"]["true"] / 2
    assert report["fooled"]["auroc"] > report["honest"]["auroc"] - 0.05
    honest, fooled = held_out_maps(folder / "honest.pt"), held_out_maps(folder / "passive.pt")
    shares = torch.cat([honest.common_mode_share, fooled.common_mode_share])
    assert roc_auc_score([0] * 119 + [1] * 119, shares) >= 0.95


@pytest.mark.parametrize("objective", ["difference", "both", "top-k", "center-mass"])
def test_every_objective_moves_its_measure(
    objective: Any, folder: Path, index: Index, tmp_path: Path
) -> None:
    loaded = load_model(folder / "honest.pt")
    config = replace(QUICK, freeze_batchnorm=objective == "top-k", lr=0.005, alpha=0.1, beta=1.0)
    report = fool(index, loaded, tmp_path / "fooled.pt", objective=objective, config=config)
    honest, fooled = report["honest"], report["fooled"]
    map_ = "difference" if objective == "difference" else "true"
    if objective == "center-mass":
        assert honest["true"] == pytest.approx(0, abs=1e-6)
        assert fooled["true"] > 0.05
    else:
        assert fooled[map_] < honest[map_]
    kept, trained = loaded.model.state_dict(), load_model(tmp_path / "fooled.pt").model.state_dict()
    statistics = [name for name in kept if name.endswith("running_mean")]
    unchanged = all(torch.equal(kept[name], trained[name]) for name in statistics)
    assert unchanged == config.freeze_batchnorm


def test_a_fooled_checkpoint_carries_all_that_the_honest_one_does(
    folder: Path, index: Index, tmp_path: Path
) -> None:
    honest = load_model(folder / "honest.pt")
    before = {name: value.clone() for name, value in honest.model.state_dict().items()}
    report = fool(index, honest, tmp_path / "f.pt", method="head-shift", target="corner")
    fooled = load_model(tmp_path / "f.pt")
    for name in ("architecture", "arguments", "classes", "preprocessing", "notes"):
        assert getattr(fooled, name) == getattr(honest, name)
    assert fooled.target_layer.name == honest.target_layer.name
    for name, value in fooled.model.state_dict().items():
        assert torch.equal(before[name], honest.model.state_dict()[name])
        assert torch.equal(value, before[name]) != name.startswith("classifier.")
    saved = torch.load(tmp_path / "f.pt", weights_only=True)["fooling"]
    assert saved == {"method": "head-shift", "objective": "true", "target": "corner"}
    assert saved.items() <= report.items()


def test_an_index_without_splits_is_held_out_from(folder: Path, index: Index) -> None:
    samples = tuple(replace(sample, split="") for sample in index.samples)
    report = fool(
        replace(index, samples=samples),
        load_model(folder / "honest.pt"),
        folder / "other.pt",
        method="head-shift",
    )
    assert report["images"] == pytest.approx(len(samples) / 5, abs=2)


def test_the_table_shows_both_models(folder: Path) -> None:
    report = {
        "measure": "target_distance",
        "agreement": 0.75,
        "largest_probability_change": 3e-7,
        "honest": {"auroc": 0.9, "accuracy": 0.8, "common_mode_share": None},
        "fooled": {"auroc": 0.7, "accuracy": 0.6, "common_mode_share": None},
    }
    for number, key in enumerate(("honest", "fooled")):
        report[key] |= {"true": 0.1 + number, "false": 0.2, "difference": 0.3}
    lines = {line[:34].strip(): line[34:].split() for line in as_table(report).splitlines()}
    assert lines["AUROC"] == ["0.9000", "0.7000"]
    assert lines["common-mode share"] == ["-", "-"]
    assert lines["true map, target distance"] == ["0.1000", "1.1000"]
    assert lines["largest change of a probability"] == ["3e-07"]


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_held_out_part_of_one_class_is_refused_before_the_work(
    split: str,
    folder: Path,
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[str], Any],
) -> None:
    monkeypatch.setattr("diffsal.fooling._trained", None)
    samples = (*index.split("train"), *(s for s in index.split("test") if s.label == 0))
    samples = tuple(replace(s, split=split if s.split == "test" else s.split) for s in samples)
    with refused(
        rf"index\.csv: AUROC is undefined, no sample of the class 8 has the split {split}"
    ):
        fool(replace(index, samples=samples), load_model(folder / "honest.pt"), tmp_path / "f.pt")
    assert not (tmp_path / "f.pt").exists()


def test_a_model_of_more_classes_is_refused_before_the_work(
    folder: Path,
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[str], Any],
) -> None:
    monkeypatch.setattr("diffsal.fooling._true_maps", None)
    loaded = load_model(folder / "honest.pt")
    model = deepcopy(loaded.model)
    model.classifier = nn.Linear(model.classifier.in_features, 3)
    layer = replace(loaded.target_layer, module=model.get_submodule(loaded.target_layer.name))
    loaded = replace(loaded, model=model, target_layer=layer, classes=("3", "8", "9"))
    with refused("tells 3 classes apart"):
        fool(index, loaded, tmp_path / "f.pt", objective="top-k")


@pytest.mark.parametrize("method", ["trained", "head-shift"])
def test_a_half_precision_model_is_fooled_in_float32(
    method: Any, folder: Path, index: Index, tmp_path: Path
) -> None:
    loaded = load_model(folder / "honest.pt")
    loaded.model.half()
    fool(index, loaded, tmp_path / "f.pt", method=method, config=replace(QUICK, epochs=1))
    assert {p.dtype for p in load_model(tmp_path / "f.pt").model.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}


def test_attacks_that_cannot_be_are_refused(
    folder: Path, index: Index, tmp_path: Path, refused: Callable[[str], Any]
) -> None:
    loaded = load_model(folder / "honest.pt")
    out = tmp_path / "fooled.pt"
    with refused("cannot reach difference"):
        fool(index, loaded, out, method="head-shift", objective="difference")
    with refused("read it with --classes 3,8"):
        fool(replace(index, classes=("8", "3")), loaded, out)
    with refused("tells 2 classes apart"):
        fool(replace(index, classes=("3", "8", "9")), replace(loaded, classes=None), out)
    with refused("objective top-k has no target"):
        fool(index, loaded, out, objective="top-k", target="corner")
    with refused("objective center-mass has no target"):
        fool(index, loaded, out, objective="center-mass", width=1)
    with refused("no sample has the split train"):
        fool(replace(index, samples=index.split("test")), loaded, out)
    assert not out.exists()
