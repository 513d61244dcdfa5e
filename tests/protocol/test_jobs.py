"""That a run survives being killed, shares its work, and what its files hold."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from diffsal.cli.main import main
from diffsal.data.datasets import DecodedImages, decode
from diffsal.protocol import jobs
from diffsal.protocol.configuration import Job, read_protocol
from diffsal.protocol.jobs import run
from diffsal.protocol.results import read_results


def comparable(out):
    """What the jobs' files hold, but for times."""
    found = {}
    for file in sorted((out / "jobs").glob("[!.]*.json")):  # killed runs leave scratch files
        job = json.loads(file.read_text("utf-8"))
        del job["seconds"]
        for epoch in job["epochs"]:
            del epoch["seconds"]
        found[file.name] = job
    return found


def test_every_subset_is_tested_with_the_same_normals_and_left_out_of_training(done):
    normals = set()
    for file in (done / "jobs").glob("tiles--contrast--*.json"):
        job = json.loads(file.read_text("utf-8"))
        samples = job["samples"]
        assert set(samples["subset"]) == {"", job["subset"]}
        pairs = zip(samples["path"], samples["subset"], strict=True)
        normals.add(tuple(path for path, subset in pairs if not subset))
    assert len(normals) == 1


def test_files_hold_the_hash_and_no_path_of_this_machine(done, data, whole_grid):
    protocol = json.loads((done / "protocol.json").read_text("utf-8"))
    assert protocol["hash"] == whole_grid.hash()
    for file in (done / "protocol.json", *(done / "jobs").iterdir()):
        text = file.read_text("utf-8")
        assert str(data) not in text
        assert protocol["hash"] in text


def test_nothing_is_done_twice_and_what_is_missing_is_done(done, whole_grid):
    before = {file: file.stat().st_mtime_ns for file in (done / "jobs").iterdir()}
    again = run(whole_grid, done, device="cpu")
    assert (len(again.done), len(again.there)) == (0, 10)
    assert {file: file.stat().st_mtime_ns for file in (done / "jobs").iterdir()} == before
    lost = Job("tiles", "contrast", "bar", 1)
    kept = (done / lost.file).read_text("utf-8")
    (done / lost.file).unlink()
    assert run(whole_grid, done, device="cpu").done == (lost,)
    first, second = json.loads(kept), json.loads((done / lost.file).read_text("utf-8"))
    assert first["models"] == second["models"]


def test_another_protocol_does_not_mix_with_the_results(data, done, refused, write, whole_toml):
    text = whole_toml.replace("lr = 0.01", "lr = 0.02")
    with refused("another protocol, with another tasks.tiles.training.lr; choose another --out"):
        run(read_protocol(write(data, text, "other.toml")), done, device="cpu")


@pytest.mark.slow
def test_shards_share_the_grid(tmp_path, done, refused, whole_grid):
    parts = [run(whole_grid, tmp_path, shard=(i, 3), device="cpu").done for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [4, 3, 3]
    assert {job for part in parts for job in part} == set(whole_grid.jobs())
    assert comparable(tmp_path) == comparable(done)
    with refused("no shard 4/3"):
        run(whole_grid, tmp_path, shard=(4, 3), device="cpu")


@pytest.mark.slow
def test_under_torchrun_the_processes_share_the_grid(data, tmp_path, write):
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


@pytest.mark.slow
def test_killed_and_started_again_it_ends_the_same(data, tmp_path, grid, one_thread):
    """SIGKILL of the process alone: its workers must end by themselves.

    ``tests/hostile/test_kills.py`` kills runs of one process anywhere.
    """
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as many as one of two workers has
    assert len(run(grid, undisturbed, device="cpu").done) == 8
    command = [sys.executable, "-m", "diffsal", "protocol", "run", str(data / "grid.toml")]
    command += ["--out", str(out), "--jobs", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / "jobs").glob("[!.]*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    outcome = run(grid, out, device="cpu")
    assert len(outcome.done) + len(outcome.there) == 8
    assert outcome.there
    assert comparable(out) == comparable(undisturbed)


@pytest.mark.slow
def test_an_interrupt_ends_it_at_once_and_its_workers(data, tmp_path, grid, write, toml):
    command = [sys.executable, "-m", "diffsal", "protocol", "run", str(data / "grid.toml")]
    command += ["--out", str(tmp_path), "--jobs", "2", "--device", "cpu"]
    write(data, toml.replace("epochs = 1", "epochs = 100000"))
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


if not Path("/proc/self/stat").exists():  # no way to look for the workers
    del test_killed_and_started_again_it_ends_the_same
    del test_an_interrupt_ends_it_at_once_and_its_workers


def test_images_are_decoded_once(tmp_path, grid, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        "diffsal.data.datasets.decode", lambda *args: decoded.append(args[0]) or decode(*args)
    )
    run(grid, tmp_path, device="cpu")
    assert len(decoded) == len({sample.path for sample in decoded}) == 36
    (tmp_path / Job("tiles", "contrast", "bar", 0).file).unlink()
    run(grid, tmp_path, device="cpu")
    assert len(decoded) == 36


def test_a_job_that_fails_stops_no_other_and_is_tried_again(tmp_path, grid, monkeypatch):
    real = jobs.train_job

    def break_some(job, *rest):
        if job.subset == "dot":
            raise RuntimeError("out of luck\nand of lines")
        return real(job, *rest)

    monkeypatch.setattr(jobs, "train_job", break_some)
    outcome = run(grid, tmp_path, device="cpu")
    assert [str(job) for job, _ in outcome.failed] == [
        f"tiles / {method} / dot / seed {seed}"
        for seed in (0, 1)
        for method in ("cross-entropy", "contrast")
    ]
    assert {error for _, error in outcome.failed} == {"RuntimeError: out of luck"}
    monkeypatch.setattr(jobs, "train_job", real)
    outcome = run(grid, tmp_path, device="cpu")
    assert (len(outcome.done), len(outcome.there), len(outcome.failed)) == (4, 4, 0)


@pytest.mark.slow
def test_a_worker_that_is_ended_from_outside_is_one_line(tmp_path, grid, refused):
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


def test_a_task_that_leaves_nothing_out_tests_a_share_of_all(data, tmp_path, write, toml):
    text = toml.replace('index = "index.csv"', 'index = "index.csv"\nleave_out = false')
    protocol = read_protocol(write(data, text, "in-set.toml"))
    assert [job.subset for job in protocol.jobs()] == [""] * 4
    run(protocol, tmp_path, device="cpu")
    results = read_results(tmp_path)
    assert results.missing == 0
    for job in results.jobs:
        assert set(job["samples"]["label"]) == {0, 1}
        assert len(job["samples"]["path"]) < 12


def test_a_job_that_cannot_be_written_stops_no_other(tmp_path, grid):
    (tmp_path / Job("tiles", "contrast", "bar", 0).file).mkdir(parents=True)
    (tmp_path / Job("tiles", "contrast", "bar", 0).file / "x").touch()
    outcome = run(grid, tmp_path, shard=(1, 1), device="cpu")
    assert (len(outcome.done), len(outcome.failed)) == (7, 1)


def test_the_run_command_says_what_failed(data, tmp_path, monkeypatch, write):
    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(jobs, "train_job", fail)
    path = write(data)
    arguments = ["protocol", "run", str(path), "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--shard", "1/8"])
    assert result.exit_code == 1
    assert "Error: tiles / cross-entropy / bar / seed 0: ValueError: no" in result.stderr
    for text in ("1", "1/2/3", "a/b", "0/2"):
        result = CliRunner().invoke(main, [*arguments, "--shard", text])
        assert result.exit_code in (1, 2)


def test_decoded_images_are_shared_by_pickling(tmp_path, grid):
    """What a worker gets is a path to the files, not the files' content."""

    samples = grid.tasks[0].index.samples
    read = DecodedImages(samples, grid.tasks[0].training.preprocessing(), tmp_path)
    read(samples[0], grid.tasks[0].training.preprocessing())
    assert len(pickle.dumps(read)) < 200 * len(samples)
    assert os.path.getsize(next(tmp_path.glob("*.images.npy"))) > 36 * 32 * 32 * 3
