"""The grid's jobs: that they survive being killed, and what their files hold."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffsal.cli.main import main
from diffsal.data.datasets import decode
from diffsal.protocol import jobs as module
from diffsal.protocol.configuration import Job, read_protocol
from diffsal.protocol.experiments import train_job
from diffsal.protocol.jobs import run
from diffsal.protocol.results import read_results

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


def comparable(out):
    """What the jobs' files hold, but for times."""
    found = {}
    for file in sorted((out / "jobs").iterdir()):
        job = json.loads(file.read_text("utf-8"))
        del job["seconds"]
        for epoch in job["epochs"]:
            del epoch["seconds"]
        found[file.name] = job
    return found


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """The grid with experiment (a), undisturbed."""
    out = tmp_path_factory.mktemp("done")
    outcome = run(read_protocol(write(data, GRID + FOOLING)), out, device="cpu")
    assert not outcome.failed
    assert len(outcome.done) == 10
    return out


def test_every_subset_is_tested_with_the_same_normals_and_left_out_of_training(done, data):
    normals = set()
    for file in (done / "jobs").glob("tiles--contrast--*.json"):
        job = json.loads(file.read_text("utf-8"))
        samples = job["samples"]
        assert set(samples["subset"]) == {"", job["subset"]}
        pairs = zip(samples["path"], samples["subset"], strict=True)
        normals.add(tuple(path for path, subset in pairs if not subset))
    assert len(normals) == 1


def test_another_protocol_does_not_mix_with_the_results(data, done, refused):
    text = (GRID + FOOLING).replace("lr = 0.01", "lr = 0.02")
    with refused("another protocol, with another tasks.tiles.training.lr; choose another --out"):
        run(read_protocol(write(data, text, "other.toml")), done, device="cpu")


def test_shards_share_the_grid(data, tmp_path, done, refused):
    protocol = read_protocol(write(data, GRID + FOOLING))
    parts = [run(protocol, tmp_path, shard=(i, 3), device="cpu").done for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [4, 3, 3]
    assert {job for part in parts for job in part} == set(protocol.jobs())
    assert comparable(tmp_path) == comparable(done)
    with refused("no shard 4/3"):
        run(protocol, tmp_path, shard=(4, 3), device="cpu")


def test_under_torchrun_the_processes_share_the_grid(data, tmp_path):
    write(data)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "diffsal", "protocol", "run", str(data / "grid.toml"), "--out", str(out)]
    done = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 jobs done, 0 there before, 0 failed") == 2
    assert len(list((out / "jobs").iterdir())) == 8
    assert len(list((out / "cache").glob("*.npy"))) == 2


def test_killed_anywhere_and_started_again_it_ends_the_same(data, tmp_path, grid):
    """SIGKILL of the process alone, twice; its workers must end by themselves."""
    undisturbed, threads = tmp_path / "undisturbed", torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as many as one of two workers has
    assert len(run(grid, undisturbed, device="cpu").done) == 8
    torch.set_num_threads(threads)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffsal", "protocol", "run", str(data / "grid.toml")]
    command += ["--out", str(out), "--jobs", "2", "--device", "cpu"]
    for least in (1, 4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list((out / "jobs").glob("[!.]*.json"))) < least:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(map(is_alive, workers)):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert len(outcome["done"]) + len(outcome["there"]) == 8
    assert len(outcome["there"]) >= 4
    assert comparable(out) == comparable(undisturbed)


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


def test_images_are_decoded_once(data, tmp_path, grid, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "diffsal.data.datasets.decode", lambda *args: decoded.append(args[0]) or decode(*args)
    )
    run(grid, tmp_path, device="cpu")
    assert len(decoded) == len({sample.path for sample in decoded}) == 36
    (tmp_path / Job("tiles", "contrast", "bar", 0).file).unlink()
    run(grid, tmp_path, device="cpu")
    assert len(decoded) == 36


def test_a_job_that_fails_stops_no_other_and_is_tried_again(data, tmp_path, grid, monkeypatch):
    real = train_job

    def break_some(protocol, job, *rest):
        if job.subset == "dot":
            raise RuntimeError("out of luck\nand of lines")
        return real(protocol, job, *rest)

    monkeypatch.setattr(module, "train_job", break_some)
    outcome = run(grid, tmp_path, device="cpu")
    assert [str(job) for job, _ in outcome.failed] == [
        f"tiles / {method} / dot / seed {seed}"
        for seed in (0, 1)
        for method in ("cross-entropy", "contrast")
    ]
    assert {error for _, error in outcome.failed} == {"RuntimeError: out of luck"}
    monkeypatch.setattr(module, "train_job", real)
    outcome = run(grid, tmp_path, device="cpu")
    assert (len(outcome.done), len(outcome.there), len(outcome.failed)) == (4, 4, 0)


def test_a_worker_that_is_ended_from_outside_is_one_line(data, tmp_path, grid, refused):
    started = threading.Thread(target=end_a_worker, args=(tmp_path,), daemon=True)
    started.start()
    with refused("ended from outside"):
        run(grid, tmp_path, jobs=2, device="cpu")
    started.join()
    outcome = run(grid, tmp_path, jobs=2, device="cpu")
    assert len(outcome.done) + len(outcome.there) == 8


def end_a_worker(out):
    """Once there is a result, end one of the processes that work for this one."""
    while not list((out / "jobs").glob("[!.]*.json")):
        time.sleep(0.02)
    workers = [
        child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__
    ]
    os.kill(workers[0].pid, signal.SIGKILL)


def test_a_task_that_leaves_nothing_out_tests_a_share_of_all(data, tmp_path):
    text = GRID.replace('index = "index.csv"', 'index = "index.csv"\nleave_out = false')
    protocol = read_protocol(write(data, text, "in-set.toml"))
    assert [job.subset for job in protocol.jobs()] == [""] * 4
    run(protocol, tmp_path, device="cpu")
    results = read_results(tmp_path)
    assert results.missing == 0
    for job in results.jobs:
        assert set(job["samples"]["label"]) == {0, 1}
        assert len(job["samples"]["path"]) < 12


def test_unfinished_results_are_read_and_say_so(data, tmp_path, grid, refused):
    with refused("no protocol.json here"):
        read_results(tmp_path)
    run(grid, tmp_path, shard=(1, 4), device="cpu")
    assert read_results(tmp_path).missing == 6
    file = next((tmp_path / "jobs").iterdir())
    content = file.read_text("utf-8")
    # What a write that was cut off leaves behind, and what somebody put there, are no results.
    (tmp_path / "jobs" / ".scratch.json").write_text(content, "utf-8")
    (tmp_path / "jobs" / "copy.json").write_text(content, "utf-8")
    assert len(read_results(tmp_path).jobs) == 2
    file.write_text('{"hash": "0"}', "utf-8")
    with refused("is damaged; remove it and run again"):
        read_results(tmp_path)
    file.write_text(content[:100], "utf-8")
    with refused("cannot be read"):
        read_results(tmp_path)
    file.write_text(json.dumps({**json.loads(content), "hash": "0"}), "utf-8")
    with refused("is of another protocol"):
        read_results(tmp_path)


def test_the_table_command_prints_every_format_and_draws(done):
    invoke = CliRunner().invoke
    for form in ("text", "markdown", "latex", "csv", "json"):
        result = invoke(main, ["protocol", "table", str(done), "--format", form])
        assert result.exit_code == 0, result.output
        assert "contrast" in result.stdout
    assert json.loads(result.stdout)[0]["name"] == "overall"
    for name in ("tiles-auroc.png", "tiles-figure-1.png"):
        path = done / "plots" / name
        assert str(path) in result.stderr
        assert Image.open(path).size[0] > 600


def test_tables_are_printed_where_no_plot_can_be(done, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("cache", "plots"))
    (out / "plots").write_text("in the way", "utf-8")
    result = CliRunner().invoke(main, ["protocol", "table", str(out)])
    assert result.exit_code == 0
    assert "Note: no plots" in result.stderr
    assert "contrast" in result.stdout


def test_a_job_that_cannot_be_written_stops_no_other(data, tmp_path, grid):
    (tmp_path / Job("tiles", "contrast", "bar", 0).file).mkdir(parents=True)
    (tmp_path / Job("tiles", "contrast", "bar", 0).file / "x").touch()
    outcome = run(grid, tmp_path, shard=(1, 1), device="cpu")
    assert (len(outcome.done), len(outcome.failed)) == (7, 1)


def test_the_table_command_needs_a_baseline_that_is_there(done):
    result = CliRunner().invoke(main, ["protocol", "table", str(done)])
    assert result.exit_code == 0
    result = CliRunner().invoke(main, ["protocol", "table", str(done), "--baseline", "contrast"])
    assert result.exit_code == 0
    result = CliRunner().invoke(main, ["protocol", "table", str(done), "--baseline", "x"])
    assert result.exit_code == 1
    assert "no method 'x'" in result.stderr


def test_the_run_command_says_what_failed(data, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(module, "train_job", fail)
    path = write(data)
    arguments = ["protocol", "run", str(path), "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--shard", "1/8"])
    assert result.exit_code == 1
    assert "Error: tiles / cross-entropy / bar / seed 0: ValueError: no" in result.stderr
    for text in ("1", "1/2/3", "a/b", "0/2"):
        result = CliRunner().invoke(main, [*arguments, "--shard", text])
        assert result.exit_code in (1, 2)
