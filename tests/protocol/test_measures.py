"""What a job's file says of its models, against the public functions that a script would call."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.faithfulness.composites import run_composites
from diffsal.faithfulness.input_level import smoothgrad, smoothgrad_agreement
from diffsal.faithfulness.localisation import energy_inside, pointing_game
from diffsal.fooling.attack import fine_tuned
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import find_target_layer, get_target_layer
from diffsal.protocol.configuration import Job
from diffsal.protocol.experiments import ATTACKS
from diffsal.protocol.measures import composite_columns
from diffsal.training.loop import fit
from diffsal.training.losses import ContrastSalienceLoss
from diffsal.training.run import new_model, training_set


def test_a_job_is_what_the_library_does_by_hand(done, whole_grid):
    """The file's logits and measures, from the public functions that a script would call."""
    job = Job("tiles", "contrast", "dot", 1)
    found = json.loads((done / job.file).read_text("utf-8"))

    config = replace(whole_grid.training(job), device="cpu")
    index = whole_grid.task("tiles").split("dot")
    model, description = new_model(index, config)
    training = training_set(index, config, description["preprocessing"])
    assert {sample.subset for sample in training.samples} == {"", "bar"}
    list(fit(model, ContrastSalienceLoss(), training, None, config))
    test = ImageDataset(index.split("test"), description["preprocessing"])
    images, labels, human, _ = (
        torch.stack([torch.as_tensor(one) for one in column]) for column in zip(*test, strict=True)
    )
    maps = explain(model.eval(), images, labels, target_layers=find_target_layer(model))

    measured = found["models"]["contrast"]
    torch.testing.assert_close(torch.tensor(measured["logits"]), maps.logits, rtol=1e-5, atol=1e-6)
    for name, expected in (
        ("pointing_true", pointing_game(maps.true, human)),
        ("energy_difference", energy_inside(maps.difference, human)),
        ("common_mode_share", maps.common_mode_share),
    ):
        values = torch.tensor([np.nan if x is None else x for x in measured[name]])
        torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-6, equal_nan=True)
    assert found["samples"]["label"] == labels.tolist()
    assert found["samples"]["path"] == [sample.path.name for sample in test.samples]
    shares = [share for share in measured["marked_share"] if share is not None]
    assert shares == pytest.approx([0.125] * 10, abs=0.02)  # 10 x 20 of 40 x 40 pixels


def test_fooled_models_are_measured_beside_the_honest_one(done):
    job = json.loads((done / Job("tiles", "fooling", "", 0).file).read_text("utf-8"))
    assert list(job["models"]) == ["honest", *ATTACKS]
    honest, shifted = (
        np.array(job["models"][name]["logits"]) for name in ("honest", "head-shifted")
    )
    np.testing.assert_allclose(np.diff(shifted), np.diff(honest), atol=1e-4)
    labels = [job["samples"]["label"][position] for position in job["pictured"]]
    assert labels == [0, 1]
    for label, position in enumerate(job["pictured"]):
        margins = np.diff(honest)[np.array(job["samples"]["label"]) == label, 0]
        lower = (margins < np.diff(honest)[position, 0]).sum()
        assert lower == len(margins) // 2  # the median, or the higher of the two in the middle
    for model in job["models"].values():
        maps = {name: np.array(values) for name, values in model["maps"].items()}
        assert maps["true"].shape[0] == 2
        np.testing.assert_allclose(maps["difference"], maps["true"] - maps["false"], atol=1e-5)
        assert all(0 <= value <= 1 for value in model["edges_true"] if value is not None)


def test_the_control_and_its_tests_are_what_the_library_does_by_hand(done, whole_grid):
    job = Job("tiles", "fooling", "", 1)
    found = json.loads((done / job.file).read_text("utf-8"))

    config = replace(whole_grid.training(job), device="cpu")
    index = whole_grid.task("tiles").split("")
    honest, description = new_model(index, config)
    training = training_set(index, config, description["preprocessing"])
    list(fit(honest, config.criterion(), training, None, config))
    attack = replace(whole_grid.fooling, seed=1, device="cpu")
    test = ImageDataset(index.split("test"), description["preprocessing"])
    images, labels = (
        torch.stack([torch.as_tensor(item[part]) for item in test]) for part in (0, 1)
    )
    order = labels.argsort(stable=True)  # in the file, class by class
    for name, model in (
        ("honest", honest.eval()),
        ("fine-tuned", fine_tuned(honest, training, "control", attack)),
    ):
        measured = found["models"][name]
        own = explain(model, images, labels)
        torch.testing.assert_close(
            torch.tensor(measured["logits"]), own.logits, rtol=1e-4, atol=1e-5
        )
        agreement = smoothgrad_agreement(
            own.difference, smoothgrad(model, images, labels, grid=own.difference.shape[1:])
        )
        values = [np.nan if x is None else x for x in measured["smoothgrad_difference"]]
        np.testing.assert_allclose(values, agreement, atol=1e-4)
        maps = explain(model, images[order], true=1, false=0)
        for regions in ("rectangles", "marked"):
            composites = run_composites(
                model,
                images[order],
                maps.difference,
                maps.margin,
                labels[order],
                regions=regions,
                per_image=4,
            )
            skill = measured["composite_skill"][regions]
            assert skill == pytest.approx(composites.skill, abs=1e-3)
    assert found["models"]["honest"]["composite_skill"] != measured["composite_skill"]


def test_composites_are_of_a_bounded_number_of_images():
    """Of each class some, evenly spaced; and none where a class has one image alone."""
    asked = []
    noise = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 3), np.uint8)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AvgPool2d(2), nn.Flatten()).eval()
    layer = get_target_layer(model, "0")

    def skills(labels):
        samples = [Sample(Path(str(n)), label) for n, label in enumerate(labels)]
        test = ImageDataset(samples, Preprocessing(size=(2, 2)), read=read)
        return composite_columns(model, layer, test, batch_size=32)

    def read(sample, _):
        asked.append(int(sample.path.name))
        return noise[asked[-1]], None

    assert skills([0] * 80 + [1] * 10)["rectangles"] == pytest.approx(1, abs=1e-6)
    assert len(asked) == 60 + 10
    assert (asked[0], asked[59], asked[60:]) == (0, 79, [*range(80, 90)])
    assert max(np.diff(asked)) == 2
    assert skills([0, 0, 1]) == {"rectangles": None, "marked": None}
