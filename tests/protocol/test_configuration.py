"""The grid: what it is made of, and what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsal.data.datasets import DecodedImages, ImageDataset
from diffsal.faithfulness.localisation import energy_inside, pointing_game
from diffsal.maps.salience import explain
from diffsal.maps.target_layers import find_target_layer
from diffsal.protocol.configuration import METHODS, Job, read_protocol
from diffsal.protocol.experiments import ATTACKS
from diffsal.protocol.jobs import run
from diffsal.training.loop import fit
from diffsal.training.losses import ContrastSalienceLoss
from diffsal.training.run import new_model, training_set

SUBSETS = ("bar", "dot")
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen plain tiles and ten with each kind of defect; a group is two photographs."""
    folder = tmp_path_factory.mktemp("tiles")
    generator = np.random.default_rng(0)
    rows = []
    for subset, count in (("", 16), *((subset, 10) for subset in SUBSETS)):
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


def write(folder, text=GRID, name="grid.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def grid(data):
    return read_protocol(write(data))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """The grid with experiment (a), undisturbed."""
    out = tmp_path_factory.mktemp("done")
    outcome = run(read_protocol(write(data, GRID + FOOLING)), out, device="cpu")
    assert not outcome.failed
    assert len(outcome.done) == 10
    return out


def test_the_grid_is_task_method_subset_seed_and_early_results_span_it(grid):
    jobs = grid.jobs()
    assert jobs[:4] == [
        Job("tiles", "cross-entropy", "bar", 0),
        Job("tiles", "contrast", "bar", 0),
        Job("tiles", "cross-entropy", "dot", 0),
        Job("tiles", "contrast", "dot", 0),
    ]
    assert [job.seed for job in jobs] == [0] * 4 + [1] * 4
    assert len({job.file for job in jobs}) == 8


def test_the_six_methods_are_the_papers_and_the_reader_s(data):
    text = GRID.partition("[methods")[0]
    protocol = read_protocol(write(data, text))
    assert list(protocol.methods) == list(METHODS)
    losses = {name: protocol.training(Job("tiles", name, "bar", 3)).criterion() for name in METHODS}
    assert [type(one).__name__ for one in losses.values()] == [
        *("CrossEntropyLoss", "BaselineSalienceLoss", "DifferenceSalienceLoss"),
        *("PerClassSalienceLoss", "ContrastSalienceLoss", "ContrastSalienceLoss"),
    ]
    assert losses["contrast"].weights == ContrastSalienceLoss(0.3, 0.3, 0.3).weights
    assert losses["contrast-alpha-0.5"].weights == ContrastSalienceLoss(0.5, 0.3, 0.3).weights
    assert losses["baseline"].weights["cross_entropy"] == 0.5


def test_methods_by_their_weights(data):
    text = GRID + '[methods.strong]\nmethod = "per-class"\nbeta = 2.0\npool = "max"\n'
    protocol = read_protocol(write(data, text))
    config = protocol.training(Job("tiles", "strong", "bar", 7))
    assert (config.method, config.beta, config.pool, config.seed) == ("per-class", 2.0, "max", 7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 2", "sedes = 2", "the key 'sedes' is unknown; known: seeds"),
        ("seeds = 2", "seeds = [1, 1]", "a seed is there twice"),
        ("seeds = 2", 'seeds = "2"', "a number of seeds, or a list"),
        ("seeds = 2", "seeds = 0", "a number of seeds, or a list"),
        ("epochs = 1", "epoch = 1", "the key 'epoch' is unknown; near: epochs"),
        ("epochs = 1", 'epochs = "1"', "epochs must be int"),
        ("epochs = 1", "epochs = 1\nseed = 4", "seed is none of it; methods and seeds are"),
        (
            "[tasks.tiles]",
            "[fooling]\nsize = 32\n[tasks.tiles]",
            r"\[fooling\]: size is none of it",
        ),
        ("[tasks.tiles]", "[fooling]\nlr = -1.0\n[tasks.tiles]", "lr must be"),
        ("seeds = 2", "seeds = 2\nfooling = true", "is a table of training settings, not True"),
        ('index = "index.csv"', 'index = "index.csv"\ntraining = 3', "is a table of training"),
        ('index = "index.csv"', 'index = "index.csv"\nclasses = "normal"', "a list of names"),
        ('index = "index.csv"', 'index = "index.csv"\nmaps = 5', "needs index"),
        ('weights = "none"', "weights = 5", "weights must be str"),
        ("[tasks.tiles]", f"[tasks.{'t' * 200}]", "is too long for a file; shorten the names"),
        ("epochs = 1", 'epochs = 1\nmethod = "contrast"', "method is none of it"),
        ("epochs = 1", 'epochs = 1\nselect = "best-auroc"', "select is none of it"),
        ('"index.csv"', '"nowhere.csv"', "nowhere.csv: No such file"),
        ('index = "index.csv"', "leave_out = true", "needs index"),
        ('index = "index.csv"', 'index = "index.csv"\nlabels = 2', "the key 'labels' is unknown"),
        ('index = "index.csv"', 'index = "index.csv"\nleave_out = 1', "leave_out is true or false"),
        ('index = "index.csv"', 'index = "index.csv"\nfraction = 0.01', "cannot be held out"),
        ('"none"', '"weights.pt"', "there are no weights .*weights.pt; make them first"),
        ("[methods.contrast]", "[methods.mine]", "needs method, one of cross-entropy"),
        ("[methods.contrast]", "[methods.contrast]\nlr = 1", "the key 'lr' is unknown"),
        ("[methods.contrast]", "[methods.fooling]", "choose another name"),
        ("[methods.contrast]", "[methods.contrast]\nmethod = 'baseline'", "name of another loss"),
        (
            "[methods.contrast]",
            "[methods.contrast]\nalpha = 'x'",
            r"methods.contrast\]: alpha must",
        ),
        (
            "[methods.contrast]",
            "[methods.cross-entropy-2]\nmethod='cross-entropy'\nbeta=1.0",
            "beta",
        ),
        ("[tasks.tiles]", "[other.tiles]", "the key 'other' is unknown"),
        ("[tasks.tiles]", "[training.tiles]", "unknown|at least one"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(data, refused, old, new, message):
    assert old in GRID
    with refused(message):
        read_protocol(write(data, GRID.replace(old, new, 1), "bad.toml"))


def test_two_jobs_do_not_share_a_file(data, refused):
    text = GRID + '[methods."a b"]\nmethod = "contrast"\n[methods."a:b"]\nmethod = "contrast"\n'
    with refused("two jobs would write tiles--a-b--bar--seed0.json; rename one"):
        read_protocol(write(data, text, "bad.toml"))


def test_maps_are_asked_for_only_where_they_are_learnt_from(data, refused):
    rows = list(csv.reader((data / "index.csv").open(encoding="utf-8")))
    without = [[row[0], row[1], *row[3:]] for row in rows]
    with (data / "no-maps.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(without)
    text = GRID.replace("index.csv", "no-maps.csv")
    with refused("no training sample has a human map"):
        read_protocol(write(data, text, "bad.toml"))
    read_protocol(write(data, text.replace("[methods.contrast]", ""), "plain.toml"))


def rewritten(data, name, change):
    """An index with every row changed; the file's name."""
    rows = list(csv.DictReader((data / "index.csv").open(encoding="utf-8")))
    changed = [change(number, row) for number, row in enumerate(rows)]
    with (data / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, changed[0])
        writer.writeheader()
        writer.writerows(changed)
    return GRID.replace("index.csv", name)


def test_a_method_without_maps_by_another_name_needs_none(data):
    text = rewritten(data, "mapless.csv", lambda _, row: {**row, "map": ""})
    text = text.replace("[methods.contrast]", "[methods.plain]\nmethod = 'cross-entropy'")
    assert len(read_protocol(write(data, text, "plain.toml")).jobs()) == 8


def test_what_would_make_no_table_is_refused_before_any_work(data, refused):
    in_set = 'leave_out = false\nindex = "'
    text = rewritten(data, "n.csv", lambda _, row: {**row, "subset": row["subset"] or "plain"})
    with refused("AUROC is undefined, the tested samples of .* are all of one class"):
        read_protocol(write(data, text.replace('index = "', in_set), "bad.toml"))
    text = rewritten(
        data, "m.csv", lambda _, row: {**row, "subset": row["subset"].replace("bar", "mean")}
    )
    with refused("a subset called 'mean' would look like a column"):
        read_protocol(write(data, text, "bad.toml"))
    splits = ("train", "test")
    text = rewritten(data, "g.csv", lambda n, row: {**row, "split": splits[n % 2]})
    with refused("the group .* is in train and in test; correct the splits"):
        read_protocol(write(data, text.replace('index = "', in_set), "bad.toml"))


def test_the_hash_is_of_what_results_depend_on_and_of_nothing_else(data, tmp_path, grid):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in data.iterdir():
        if file.suffix in (".png", ".csv"):
            (elsewhere / file.name).write_bytes(file.read_bytes())
    assert read_protocol(write(elsewhere)).hash() == grid.hash()
    for old, new in (
        ("seeds = 2", "seeds = 3"),
        ("lr = 0.01", "lr = 0.02"),
        ("[methods.contrast]", "[methods.contrast]\nbeta = 0.4"),
        ('index = "index.csv"', 'index = "index.csv"\nfraction = 0.25'),
    ):
        assert read_protocol(write(data, GRID.replace(old, new), "new.toml")).hash() != grid.hash()
    index = (elsewhere / "index.csv").read_text("utf-8")
    (elsewhere / "index.csv").write_text(index.replace(",bar,bar0", ",bar,bar1"), "utf-8")
    assert read_protocol(write(elsewhere)).hash() != grid.hash()


def test_weights_count_by_their_content(data):
    text = GRID.replace('"none"', '"start.pt"')
    model = torch.nn.Linear(1, 1)
    hashes = set()
    for _ in range(2):
        torch.nn.init.normal_(model.weight)
        torch.save(model.state_dict(), data / "start.pt")
        hashes.add(read_protocol(write(data, text, "weights.toml")).hash())
    assert len(hashes) == 2


def test_a_job_is_what_the_library_does_by_hand(data, done):
    """The file's logits and measures, from the public functions that a script would call."""
    protocol = read_protocol(write(data, GRID + FOOLING))
    job = Job("tiles", "contrast", "dot", 1)
    found = json.loads((done / job.file).read_text("utf-8"))

    config = replace(protocol.training(job), device="cpu")
    index = protocol.task("tiles").split("dot")
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


def test_files_hold_the_hash_and_no_path_of_this_machine(done, data):
    protocol = json.loads((done / "protocol.json").read_text("utf-8"))
    assert protocol["hash"] == read_protocol(write(data, GRID + FOOLING)).hash()
    for file in (done / "protocol.json", *(done / "jobs").iterdir()):
        text = file.read_text("utf-8")
        assert str(data) not in text
        assert protocol["hash"] in text


def test_nothing_is_done_twice_and_what_is_missing_is_done(data, done, tmp_path):
    protocol = read_protocol(write(data, GRID + FOOLING))
    before = {file: file.stat().st_mtime_ns for file in (done / "jobs").iterdir()}
    again = run(protocol, done, device="cpu")
    assert (len(again.done), len(again.there)) == (0, 10)
    assert {file: file.stat().st_mtime_ns for file in (done / "jobs").iterdir()} == before
    lost = Job("tiles", "contrast", "bar", 1)
    kept = (done / lost.file).read_text("utf-8")
    (done / lost.file).unlink()
    assert run(protocol, done, device="cpu").done == (lost,)
    first, second = json.loads(kept), json.loads((done / lost.file).read_text("utf-8"))
    assert first["models"] == second["models"]


def test_an_interrupt_ends_it_at_once_and_its_workers(data, tmp_path, grid):
    command = [sys.executable, "-m", "diffsal", "protocol", "run", str(data / "grid.toml")]
    command += ["--out", str(tmp_path), "--jobs", "2", "--device", "cpu"]
    write(data, GRID.replace("epochs = 1", "epochs = 100000"))
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while len(busy := [child for child in children(process.pid) if seconds(child) > 8]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) != 0
    while any(map(is_alive, busy)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert not list((tmp_path / "jobs").glob("*"))


def seconds(pid):
    """Processor time of a process: of a worker, first what it imports, then what it trains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def children(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_decoded_images_are_shared_by_pickling(data, tmp_path, grid):
    """What a worker gets is a path to the files, not the files' content."""
    import pickle

    samples = grid.tasks[0].index.samples
    read = DecodedImages(samples, grid.tasks[0].training.preprocessing(), tmp_path)
    read(samples[0], grid.tasks[0].training.preprocessing())
    assert len(pickle.dumps(read)) < 200 * len(samples)
    assert os.path.getsize(next(tmp_path.glob("*.images.npy"))) > 36 * 32 * 32 * 3
