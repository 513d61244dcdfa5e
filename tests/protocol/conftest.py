"""What the tests of the protocol share: a small grid on tiles, and made-up results of jobs."""

import csv
import itertools

import numpy as np
import pytest
from PIL import Image

from diffsal.protocol.configuration import read_protocol
from diffsal.protocol.experiments import ATTACKS
from diffsal.protocol.jobs import run
from diffsal.protocol.tables import make_tables

TILES = ("bar", "dot")
TRAINING = """
[training]
architecture = "torchvision:DenseNet"
arguments = { growth_rate = 4, block_config = [1, 1], num_init_features = 8 }
weights = "none"
size = 32
epochs = 1
batch_size = 8
lr = 0.01
"""
GRID = f"""
seeds = 2
{TRAINING}
[tasks.tiles]
index = "index.csv"
[methods.cross-entropy]
[methods.contrast]
"""
FOOLING = """
[fooling]
epochs = 1
batch_size = 8
"""

METHODS = ("cross-entropy", "baseline", "contrast", "contrast-alpha-0.5")
SUBSETS = ("a", "b", "c")
SEEDS = (0, 1, 2, 3, 5)
MEASURES = (
    *("pointing_true", "pointing_difference", "energy_true", "energy_difference"),
    *("marked_share", "common_mode_share"),
)
FOOLED = ("honest", *ATTACKS)
EDGES = ("edges_true", "edges_difference", "occlusion_true", "occlusion_difference")

# The paper's Tables 3 and 4 (arXiv, Piland, Sweet, Czajka): means by subset, in its order.
PAPER = {
    "iris": {
        "baseline": (0.685, 0.706, 0.730, 0.718, 0.887, 0.858, 0.919),
        "difference": (0.662, 0.682, 0.710, 0.698, 0.880, 0.848, 0.912),
        "per-class": (0.641, 0.649, 0.693, 0.675, 0.862, 0.838, 0.904),
        "contrast": (0.691, 0.712, 0.735, 0.724, 0.889, 0.861, 0.920),
    },
    "face": {
        "baseline": (0.376, 0.576, 0.637, 0.713, 0.602, 0.710),
        "difference": (0.348, 0.555, 0.710, 0.804, 0.693, 0.797),
        "per-class": (0.351, 0.576, 0.704, 0.801, 0.678, 0.796),
        "contrast": (0.452, 0.557, 0.624, 0.715, 0.599, 0.707),
    },
}
TABLE_2 = {
    "iris": {
        "baseline": (0.786, 0.091),
        "difference": (0.770, 0.097),
        "per-class": (0.752, 0.103),
        "contrast": (0.790, 0.089),
    },
    "face": {
        "baseline": (0.602, 0.029),
        "difference": (0.651, 0.041),
        "per-class": (0.651, 0.023),
        "contrast": (0.609, 0.029),
    },
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Sixteen plain tiles and ten with each kind of defect; a group is two photographs."""
    folder = tmp_path_factory.mktemp("tiles")
    generator = np.random.default_rng(0)
    rows = []
    for subset, count in (("", 16), *((subset, 10) for subset in TILES)):
        for number in range(count):
            pixels = generator.integers(0, 80, (40, 40, 3), dtype=np.uint8)
            mask = np.zeros((40, 40), np.uint8)
            if subset:
                height = 4 if subset == "bar" else 10
                mask[8 : 8 + height, 10:30] = 255
                pixels[mask > 0] = 250
            name = f"{subset or 'plain'}{number}.png"
            Image.fromarray(pixels).save(folder / name)
            human_map = ""
            if subset:
                human_map = f"mask-{name}"
                Image.fromarray(mask).save(folder / human_map)
            label = "defect" if subset else "normal"
            rows.append([name, label, human_map, subset, f"{subset}{number // 2}"])
    with (folder / "index.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "map", "subset", "group"], *rows])
    return folder


@pytest.fixture(scope="session")
def toml():
    """Two methods, two seeds, two subsets."""
    return GRID


@pytest.fixture(scope="session")
def whole_toml():
    """The same with experiment (a)."""
    return GRID + FOOLING


@pytest.fixture(scope="session")
def write():
    """Write a configuration; its path."""

    def write(folder, text=GRID, name="grid.toml"):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def grid(data, write):
    return read_protocol(write(data))


@pytest.fixture
def whole_grid(data, write):
    """With experiment (a)."""
    return read_protocol(write(data, GRID + FOOLING))


@pytest.fixture(scope="session")
def done(data, write, tmp_path_factory):
    """The grid with experiment (a), undisturbed."""
    out = tmp_path_factory.mktemp("done")
    outcome = run(read_protocol(write(data, GRID + FOOLING)), out, device="cpu")
    assert not outcome.failed
    assert len(outcome.done) == 10
    return out


def columns(generator, count, names):
    return {
        name: [
            None if generator.random() < 0.2 else float(generator.random()) for _ in range(count)
        ]
        for name in names
    }


def job(method, subset, seed, count=24, logits=2):
    generator = np.random.default_rng([METHODS.index(method), SUBSETS.index(subset), seed])
    labels = [position % 2 for position in range(count)]
    scores = (
        generator.normal(size=(count, logits)) + np.array(labels)[:, None] * [-0.3, 0.8][-logits:]
    )
    return {
        "task": "t",
        "method": method,
        "subset": subset,
        "seed": seed,
        "samples": {
            "path": [f"{position}.png" for position in range(count)],
            "label": labels,
            "subset": [subset if label else "" for label in labels],
        },
        "models": {method: {"logits": scores.tolist(), **columns(generator, count, MEASURES)}},
    }


@pytest.fixture(scope="session")
def make_job():
    """Makes what the file of a job holds, drawn at random by what the job is."""
    return job


def fooling_job(seed, count=20):
    generator = np.random.default_rng([99, seed])
    return {
        "task": "t",
        "method": "fooling",
        "subset": "",
        "seed": seed,
        "samples": {"label": [position % 2 for position in range(count)], "subset": [""] * count},
        "models": {
            name: {
                "logits": generator.normal(size=(count, 2)).tolist(),
                **columns(generator, count, (*EDGES, "smoothgrad_difference", "common_mode_share")),
                "composite_skill": {
                    "rectangles": float(generator.normal()),
                    # Of one model alone too few seeds have it to tell anything.
                    "marked": None if seed > 1 and name == "head-shifted" else seed / 10,
                },
            }
            for name in FOOLED
        },
    }


@pytest.fixture(scope="session")
def jobs():
    grid = itertools.product(METHODS, SUBSETS, SEEDS)
    return [job(*one) for one in grid] + [fooling_job(seed) for seed in SEEDS]


@pytest.fixture(scope="session")
def protocol():
    return {
        "methods": {name: {} for name in METHODS},
        "tasks": {"t": {"subsets": list(SUBSETS)}},
        "seeds": list(SEEDS),
    }


@pytest.fixture(scope="session")
def tables(protocol, jobs):
    return {table.name: table for table in make_tables(protocol, jobs)}


@pytest.fixture(scope="session")
def paper():
    """Task and method to the paper's means by subset."""
    return PAPER


@pytest.fixture(scope="session")
def table_2():
    """Task and method to the mean and the spread that the paper gives for them."""
    return TABLE_2
