"""The configurations in examples/protocol are what they say, on stand-ins for the data."""

import csv
import importlib.util
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.protocol.configuration import read_protocol

EXAMPLES = Path(__file__).parents[2] / "examples" / "protocol"
ATTACKS = (
    *("artificial", "contacts+print", "diseased", "post-mortem", "printouts", "synthetics"),
    "textured-contacts",
)
GENERATORS = ("StarGAN", "ProGAN", "StyleGAN", "StyleGAN2", "StyleGAN3", "StyleGAN2-ADA")
DEFECTS = ("blowhole", "break", "crack", "fray", "uneven")
ANGLES = tuple(f"angle-{degrees:03}" for degrees in (0, 45, 90, 180, 225, 270, 315))


@pytest.fixture(scope="module")
def write_digits():
    specification = importlib.util.spec_from_file_location("w", EXAMPLES / "write_digits.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(write_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocol")
    write_digits.write(folder / "digits")
    shutil.copy(EXAMPLES / "digits.toml", folder)
    return folder


def write_index(path, rows):
    """An index whose images and maps are one image each, under many names."""
    path.parent.mkdir(parents=True)
    lines = []
    for number, (label, subset, split, group) in enumerate(rows):
        for name in ("image", "map"):
            Image.new("L", (8, 8), number % 200).save(path.parent / f"{name}{number}.png")
        lines.append([f"image{number}.png", f"map{number}.png", label, subset, group, split])
    with path.open("w", newline="", encoding="utf-8") as file:
        header = ["path", "map", "label", "subset", "group", "split"]
        csv.writer(file).writerows([header, *lines])


def test_digits_is_the_grid_that_is_promised(digits):
    protocol = read_protocol(digits / "digits.toml")
    jobs = protocol.jobs()
    assert len([job for job in jobs if job.method != "fooling"]) == 6 * 3 * 10
    assert len(jobs) == 190
    (task,) = protocol.tasks
    assert task.subsets() == ["1", "3", "9"]
    for subset in task.subsets():
        index = task.split(subset)
        assert subset not in {sample.subset for sample in index.split("train")}
        assert {sample.subset for sample in index.split("test")} == {"", subset}


def test_the_shortcut_is_in_training_and_tells_nothing_in_the_test(digits, write_digits):
    counts = {}
    with (digits / "digits" / "index.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            pixels = np.asarray(Image.open(digits / "digits" / row["path"]))
            noisy = bool(pixels[:8].any())
            counts.setdefault((row["split"], row["label"]), []).append(noisy)
            human = np.asarray(Image.open(digits / "digits" / row["map"])) > 0
            assert human.any()
            assert not human[:8].any()
            assert (pixels[human] > 64).all()
    for place, noisy in counts.items():
        share = np.mean(noisy)
        assert abs(share - write_digits.NOISY[place]) < 4 * np.sqrt(0.25 / len(noisy)), place
    assert len(counts) == 4


def test_no_digit_is_in_both_parts(digits):
    with (digits / "digits" / "index.csv").open(encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert len(paths) == len(set(paths)) > 700


def test_the_papers_three_tasks(tmp_path):
    shutil.copy(EXAMPLES / "divisive-decisions.toml", tmp_path)
    splits = ("train", "test")
    write_index(
        tmp_path / "chest-xray" / "index.csv",
        [(label, "", split, "") for label in ("normal", "abnormal") for split in splits],
    )
    write_index(
        tmp_path / "iris" / "index.csv",
        [("real", "", split, "") for split in splits]
        + [("spoof", one, split, "") for one, split in itertools.product(ATTACKS, splits)],
    )
    write_index(
        tmp_path / "faces" / "index.csv",
        [(label, "", "train", "") for label in ("real", "synthetic")]
        + [("real", "", "test", "")]
        + [("synthetic", one, "test", "") for one in GENERATORS],
    )
    protocol = read_protocol(tmp_path / "divisive-decisions.toml")
    jobs = protocol.jobs()
    assert len(jobs) == 10 * (6 * (1 + len(ATTACKS) + 1) + 3)
    training = protocol.training(jobs[-1])
    described = ("densenet121", "DEFAULT", 224, 50, 0.002)
    found = (training.architecture, training.weights, training.size, training.epochs, training.lr)
    assert found == described
    iris = protocol.task("iris").split("diseased")
    assert {sample.subset for sample in iris.split("train")} == {"", *ATTACKS} - {"diseased"}
    assert len(iris.split("test")) == 2  # a real iris and a diseased one, both of its test


def read_fine_tuned(folder, name, data, rows):
    """A protocol that starts from weights, and whose index names no splits."""
    shutil.copy(EXAMPLES / f"{name}.toml", folder)
    (folder / "lite0").mkdir()
    torch.save({}, folder / "lite0" / "weights.pt")
    index = folder / data / "index.csv"
    write_index(index, rows)
    lines = [line.rpartition(",")[0] for line in index.read_text("utf-8").splitlines()]
    index.write_text("\n".join(lines), "utf-8")  # without the column split
    return read_protocol(folder / f"{name}.toml")


@pytest.mark.parametrize(
    ("name", "size", "epochs"), [("magnetic-tile", 224, 40), ("magnetic-tile-small", 128, 12)]
)
def test_magnetic_tile_is_the_full_grid(tmp_path, name, size, epochs):
    rows = [("normal", "", "", f"n{number // 2}") for number in range(40)]
    rows += [("defect", one, "", f"{one}{n // 2}") for one in DEFECTS for n in range(20)]
    protocol = read_fine_tuned(tmp_path, name, "magnetic-tile", rows)
    assert len([job for job in protocol.jobs() if job.method != "fooling"]) == 6 * 5 * 10
    training = protocol.training(protocol.jobs()[-1])
    assert (training.size, training.epochs, training.batch_size) == (size, epochs, 32)
    assert (training.lr, training.momentum, training.weight_decay) == (0.02, 0.9, 1e-4)
    assert training.schedule == "cosine"
    assert training.augment == ("horizontal-flip", "vertical-flip")


@pytest.fixture
def places():
    """Ten places photographed four times, each worn in the end; others once, worn or not."""
    rows = [
        ("pitting" if time > 1 else "intact", ANGLES[n % 7] if time > 1 else "", "", f"place{n}")
        for n, time in itertools.product(range(10), range(4))
    ]
    rows += [("intact", "", "", f"n{number}") for number in range(20)]
    return rows + [("pitting", "other-screw", "", f"o{number}") for number in range(20)]


def test_ball_screw_leaves_each_place_out(tmp_path, places):
    protocol = read_fine_tuned(tmp_path, "ball-screw", "ball-screw", places)
    assert len(protocol.jobs()) == 10 * (6 * (len(ANGLES) + 1) + 1)
    training = protocol.training(protocol.jobs()[-1])
    assert (training.size, training.epochs, training.amp) == (224, 40, "bf16")
    assert training.pool == "max"
    for subset in (*ANGLES, "other-screw"):
        index = protocol.task("ball-screw").split(subset)
        tested = {sample.group for sample in index.split("test")}
        assert tested.isdisjoint(sample.group for sample in index.split("train"))


def test_a_fifth_of_ball_screw_small_is_experiment_a(tmp_path, places):
    """As the file says of its first command."""
    protocol = read_fine_tuned(tmp_path, "ball-screw-small", "ball-screw", places)
    jobs = protocol.jobs()
    assert len(jobs) == 3 * 5
    assert {job.method for job in jobs[::5]} == {"fooling"}
    assert "fooling" not in {job.method for job in set(jobs) - {*jobs[::5]}}
    training = protocol.training(jobs[-1])
    assert (training.size, training.epochs, training.pool) == (128, 6, "max")
    assert protocol.fooling.epochs == 4
