"""From weights to fooled weights, and what is measured."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from diffsal.data.datasets import ImageDataset, decode
from diffsal.data.index import Index, Sample, read_index
from diffsal.data.preprocessing import Preprocessing
from diffsal.demo import ARCHITECTURE, ARGUMENTS, CLASSES, digits, train_digits
from diffsal.faithfulness.composites import run_composites
from diffsal.fooling.attack import FINE_TUNING, fine_tuned
from diffsal.fooling.consistency import (
    composite_inconsistency,
    every_test_failed,
    gradient_disagreement,
    inconsistency_whatever_the_seams,
)
from diffsal.fooling.objectives import TESTS
from diffsal.fooling.result import as_table
from diffsal.fooling.run import fool
from diffsal.fooling.targets import target_distance, target_map
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.models.checkpoints import load_model, save_checkpoint
from diffsal.training.loop import auroc
from diffsal.training.losses import DifferenceSalienceLoss

QUICK = replace(FINE_TUNING, epochs=2, device="cpu")
PREPROCESSING = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
GRID = (4, 4)


@pytest.fixture(scope="module", autouse=True)
def small_digits() -> Iterator[None]:
    """Half as high and wide as the demo's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffsal.demo.PREPROCESSING", PREPROCESSING)
        yield


def frame(height: int, width: int) -> Tensor:
    pixels = torch.ones(height, width)
    pixels[1:-1, 1:-1] = 0
    return pixels


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


def skill_of(weights: Path) -> float:
    """Of 30 held-out images of each class, evenly spaced, and four composites of each."""
    inputs, labels = digits()[1].tensors()
    chosen = torch.cat(
        [
            (positions := (labels == label).nonzero()[:, 0])[
                np.linspace(0, len(positions) - 1, 30).astype(int)
            ]
            for label in (0, 1)
        ]
    )
    model, images = load_model(weights).model, inputs[chosen]
    maps = explain(model, images, true=1, false=0)
    return run_composites(
        model, images, maps.difference, maps.margin, labels[chosen], per_image=4
    ).skill


def distance(maps: Tensor) -> float:
    return target_distance(maps, frame(*GRID)).mean().item()


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
    found = (("honest", honest, "honest.pt"), ("fooled", fooled, "shift.pt"))
    for key, maps, weights in found:
        probability = maps.logits.softmax(1)[:, 1]
        labels = maps.true_class
        wanted = {
            "auroc": roc_auc_score(labels, probability),
            "accuracy": ((probability > 0.5) == labels).double().mean().item(),
            "true": distance(maps.true),
            "false": distance(maps.false),
            "difference": distance(maps.difference),
            "common_mode_share": maps.common_mode_share.mean().item(),
            "composite_skill": skill_of(folder / weights),
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


def training_digits(index: Index, pixels: Tensor) -> ImageDataset:
    def read(sample: Sample, preprocessing: Preprocessing) -> Any:
        return decode(sample, preprocessing)[0], pixels.numpy()

    return ImageDataset(index.split("train"), PREPROCESSING, read=read)


@pytest.mark.slow
def test_an_attacker_who_knows_composites_passes_them(folder: Path, index: Index) -> None:
    """At equal epochs: the test tells them from others less well, and they are near the target."""
    honest, (inputs, labels) = load_model(folder / "honest.pt").model, digits()[1].tensors()
    config, skill, away = replace(FINE_TUNING, epochs=5, device="cpu"), {}, {}
    objectives: tuple[Any, ...] = ("control", "difference", "composite")
    for objective in objectives:
        model = fine_tuned(honest, training_digits(index, frame(*GRID)), objective, config)
        maps = explain(model, inputs, true=1, false=0)
        skill[objective] = run_composites(
            model, inputs, maps.difference, maps.margin, labels, per_image=2
        ).skill
        away[objective] = distance(explain(model, inputs, labels).difference)
        assert auroc(maps.logits, labels.tolist()) > 0.95
    assert skill["composite"] > skill["difference"] + 0.2
    assert max(away["difference"], away["composite"]) < away["control"] - 0.05


@pytest.mark.parametrize(
    ("objective", "gamma"),
    [("composite", None), ("gradient", 0.7), ("every-test", None), ("any-seams", 0.2)],
)
def test_a_test_to_be_passed_is_a_weighted_term(
    objective: Any, gamma: float | None, folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def keep(model: Any, criterion: Any, *_: Any, further: Any, **__: Any) -> Any:
        seen.extend((criterion, further))
        return iter(())

    wanted: dict[Any, Any] = {
        "composite": composite_inconsistency,
        "gradient": gradient_disagreement,
        "every-test": every_test_failed,
        "any-seams": inconsistency_whatever_the_seams,
    }
    assert TESTS[objective](nn.Identity()) is wanted[objective]
    monkeypatch.setattr("diffsal.fooling.attack.fit", keep)
    monkeypatch.setitem(TESTS, objective, lambda _: lambda *batch: batch)
    config = replace(QUICK, alpha=0.2, beta=0.9, gamma=gamma)
    honest = load_model(folder / "honest.pt").model
    fine_tuned(honest, training_digits(index, frame(*GRID)), objective, config)
    criterion, further = seen
    assert type(criterion) is DifferenceSalienceLoss
    assert criterion.weights == {"cross_entropy": 0.2, "difference": 0.9}
    batch = tuple(range(4))
    assert further(*batch) == {objective: (0.1 if gamma is None else gamma, batch)}


def test_the_control_is_an_attack_without_its_target(
    folder: Path, index: Index, tmp_path: Path
) -> None:
    config = replace(QUICK, alpha=0.3, beta=0.9, gamma=0.2)
    honest = load_model(folder / "honest.pt")
    report = fool(
        index, honest, tmp_path / "c.pt", objective="control", target="middle", config=config
    )
    shown = held_out_maps(tmp_path / "c.pt").difference
    away = target_distance(shown, target_map("middle", GRID)).mean().item()
    assert report["fooled"]["difference"] == pytest.approx(away, rel=1e-4)
    assert as_table(report).splitlines()[0].split() == ["honest", "control"]
    without = fine_tuned(
        honest.model,
        training_digits(index, frame(*GRID)),
        "difference",
        replace(QUICK, alpha=0.3, beta=0.0),
    )
    control = load_model(tmp_path / "c.pt").model.state_dict()
    assert all(torch.equal(control[name], value) for name, value in without.state_dict().items())
    assert not torch.equal(control["classifier.bias"], honest.model.classifier.bias)


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
        report[key] |= {"composite_skill": None if number else 0.25}
    lines = {line[:34].strip(): line[34:].split() for line in as_table(report).splitlines()}
    assert lines["AUROC"] == ["0.9000", "0.7000"]
    assert lines["common-mode share"] == ["-", "-"]
    assert lines["true map, target distance"] == ["0.1000", "1.1000"]
    assert lines["difference map, composite skill"] == ["0.2500", "-"]
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
    monkeypatch.setattr("diffsal.fooling.attack.fine_tuned", None)
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
    monkeypatch.setattr("diffsal.fooling.attack._true_maps", None)
    loaded = load_model(folder / "honest.pt")
    model = deepcopy(loaded.model)
    model.classifier = nn.Linear(model.classifier.in_features, 3)
    layer = replace(loaded.target_layer, module=model.get_submodule(loaded.target_layer.name))
    loaded = replace(loaded, model=model, layer=layer, classes=("3", "8", "9"))
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
    with refused("cannot reach composite"):
        fool(index, loaded, out, method="head-shift", objective="composite")
    with refused("true has no gamma: leave it out, or choose one of composite, gradient"):
        fool(index, loaded, out, config=replace(QUICK, gamma=0.1))
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
