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


@pytest.mark.parametrize(
    ("name", "size", "epochs"), [("magnetic-tile", 224, 40), ("magnetic-tile-small", 128, 12)]
)
def test_magnetic_tile_is_the_full_grid(tmp_path, name, size, epochs):
    shutil.copy(EXAMPLES / f"{name}.toml", tmp_path)
    (tmp_path / "lite0").mkdir()
    torch.save({}, tmp_path / "lite0" / "weights.pt")
    rows = [("normal", "", "", f"n{number // 2}") for number in range(40)]
    rows += [("defect", one, "", f"{one}{n // 2}") for one in DEFECTS for n in range(20)]
    write_index(tmp_path / "magnetic-tile" / "index.csv", rows)
    text = (tmp_path / "magnetic-tile" / "index.csv").read_text("utf-8")
    lines = [line.rpartition(",")[0] for line in text.splitlines()]  # without the column split
    (tmp_path / "magnetic-tile" / "index.csv").write_text("\n".join(lines), "utf-8")
    protocol = read_protocol(tmp_path / f"{name}.toml")
    assert len([job for job in protocol.jobs() if job.method != "fooling"]) == 6 * 5 * 10
    training = protocol.training(protocol.jobs()[-1])
    assert (training.size, training.epochs, training.batch_size) == (size, epochs, 32)
    assert (training.lr, training.momentum, training.weight_decay) == (0.02, 0.9, 1e-4)
    assert training.schedule == "cosine"
    assert training.augment == ("horizontal-flip", "vertical-flip")
