"""Shared folders, full disks, killed runs, and cells that a spreadsheet would run."""

import csv
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from auditing.samples import loaded_model, model_file, settings
from click.testing import CliRunner
from training.samples import TINY

from diffsal.auditing import settings as auditing
from diffsal.auditing.log import is_ours
from diffsal.auditing.run import audit
from diffsal.cli.main import main
from diffsal.data.index import Index, read_index
from diffsal.demo import write_demo
from diffsal.errors import DiffsalError
from diffsal.explaining.explanations import Settings, explain_images
from diffsal.fooling.attack import FINE_TUNING
from diffsal.fooling.run import fool
from diffsal.models.checkpoints import load_model
from diffsal.protocol.formats import written
from diffsal.protocol.statistics import Estimate, Table
from diffsal.system.files import replacing, write_json
from diffsal.system.locks import remove_scratch, sole_writer
from diffsal.training.run import train

Refused = Callable[[str], AbstractContextManager[None]]
QUICK = replace(TINY, epochs=3, batch_size=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def stop_after(epochs: int, index: Index, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle, between two epochs."""

    def broken(*arguments: object) -> bool:
        nonlocal epochs
        epochs -= 1
        if epochs < 0:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr("diffsal.training.run.is_best", broken)
        with pytest.raises(KeyboardInterrupt):
            train(index, out, QUICK)


def test_equal_runs_leave_equal_bytes_resumed_or_not(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again, resumed = (tmp_path / name for name in ("whole", "a/gain", "resumed"))
    train(index, whole, QUICK)
    train(index, again, QUICK)
    stop_after(2, index, resumed, monkeypatch)
    assert len((resumed / "log.jsonl").read_text().splitlines()) == 2
    train(index, resumed, QUICK, resume=True)
    for name in ("best.pt", "last.pt"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    lines = (resumed / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] > 0 for line in lines] == [True] * 3


def test_equal_attacks_leave_equal_bytes(index: Index, tmp_path: Path) -> None:
    honest = load_model(train(index, tmp_path / "run", replace(QUICK, epochs=1)))
    config = replace(FINE_TUNING, epochs=1, device="cpu")
    for name in ("a.pt", "b.pt"):
        fool(index, honest, tmp_path / name, config=config)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


HOLD = """
import sys, time
from pathlib import Path
from diffsal.system.files import replacing
from diffsal.system.locks import sole_writer

out = Path(sys.argv[1])
with sole_writer(out), replacing(out / "last.pt") as scratch:
    scratch.write_text("half")
    print(flush=True)
    time.sleep(600)
"""


@contextmanager
def another_run(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing to ``out``; killed at the end."""
    command = [sys.executable, "-c", HOLD, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_one_writer_and_a_killed_one_leaves_nothing(
    index: Index, tmp_path: Path, refused: Refused
) -> None:
    out, quick = tmp_path / "run", replace(QUICK, epochs=1)
    mine = tmp_path / "run" / ".notes.pt"
    with another_run(out) as other:
        mine.touch()
        assert any(name.startswith(".diffsal-") for name in names(out))
        with refused("run is being written by another run; choose another --out, or wait"):
            train(index, out, quick)
        remove_scratch(out)
        other.kill()
        other.wait()
        assert len(names(out)) == 3  # the living one's scratch was let be; now nobody holds it
        train(index, out, quick)
    assert names(out) == [".notes.pt", "best.pt", "last.pt", "log.jsonl"]


def test_what_writes_to_a_folder_or_a_file_is_alone_there(
    folder: Path, index: Index, tmp_path: Path, refused: Refused
) -> None:
    loaded = load_model(train(index, tmp_path / "run", replace(QUICK, epochs=1)))
    assert loaded.preprocessing is not None
    device = torch.device("cpu")
    calls = {
        "explained": lambda: explain_images(
            [folder / "0.png"],
            loaded,
            tmp_path / "explained",
            Settings(loaded.preprocessing, device),
        ),
        "audited": lambda: audit(
            index, loaded, tmp_path / "audited", auditing.Settings(loaded.preprocessing, device)
        ),
        "demo": lambda: write_demo(tmp_path / "demo"),
        "fooled.pt": lambda: fool(index, loaded, tmp_path / "fooled.pt"),
    }
    for name, call in calls.items():
        place = (tmp_path, name) if name.endswith(".pt") else (tmp_path / name, "")
        with sole_writer(*place), refused(f"{name} is being written by another run"):
            call()
        assert names(tmp_path) == ["run"]
    with sole_writer(tmp_path, "a.pt"), sole_writer(tmp_path, "b.pt"):
        pass


def test_other_processes_of_a_protocol_may_write_to_its_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "job.json") as scratch:
        scratch.write_text("half")
        (tmp_path / ".diffsal-left.json").touch()
        remove_scratch(tmp_path)
        assert names(tmp_path) == [scratch.name]
    assert names(tmp_path) == ["job.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        synced.append((is_file, os.fstat(descriptor).st_size if is_file else names(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", 1)
    assert synced == [(True, 2), (False, ["a.json"])]


def test_the_demo_writes_over_nothing_but_an_earlier_demo(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_digits(*_: object) -> None:
        raise DiffsalError("trains")

    monkeypatch.setattr("diffsal.demo.train_digits", train_digits)
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for place, error in (("file", "no folder"), ("mine", "holds other files, as thesis.tex")):
        with refused(f"{place}: {error}"):
            write_demo(tmp_path / place)
    (tmp_path / "demo").mkdir()
    for name in ("image.png", "weights.pt"):
        (tmp_path / "demo" / name).touch()
    with refused("trains"):
        write_demo(tmp_path / "demo")


def test_no_cell_of_a_table_is_a_formula(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    files = ["=HYPERLINK(1).png", "@SUM(1).png", "+1.png", "a=b.png", "../-2+3.png"]
    for number, file in enumerate(files):
        shutil.copy(folder / f"{number}.png", file)
    lines = [f"{file},{'+good' if number % 2 else '-1'}" for number, file in enumerate(files)]
    Path("index.csv").write_text("\n".join(["path,label", *lines]))
    found = audit(read_index("index.csv"), loaded_model(tmp_path), tmp_path / "audit", settings())
    with (tmp_path / "audit" / "per-image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        *("'=HYPERLINK(1).png", "'@SUM(1).png", "'+1.png", "a=b.png", "../-2+3.png")
    ]
    assert [row["label"] for row in rows] == ["-1", "'+good", "-1", "'+good", "-1"]
    margins = [float(row["margin"]) for row in rows]  # numbers are numbers, negative ones too
    assert min(margins) < 0 or min(-margin for margin in margins) < 0
    assert found["data"]["outside"] == 1
    page = (tmp_path / "audit" / "report.html").read_text("utf-8")
    assert "1 of the images and human maps do not lie in the folder of the index" in page


def test_an_audit_replaces_no_log_but_an_audits(
    index: Index, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(document={}, save=lambda *_: None)
    monkeypatch.setattr("diffsal.auditing.run.gather", lambda *_: None)
    monkeypatch.setattr("diffsal.auditing.run.Audit", lambda _: found)
    log, loaded = tmp_path / "audit.log", loaded_model(tmp_path)
    log.write_text("1 May: the auditors came")
    with refused("audit.log is there already: pass --overwrite, or name another folder"):
        audit(index, loaded, tmp_path, settings())
    assert log.read_text() == "1 May: the auditors came"
    audit(index, loaded, tmp_path, settings(), overwrite=True)
    assert is_ours(log)
    audit(index, loaded, tmp_path, settings())
    log.unlink()
    os.mkfifo(log)  # writing to it would wait for ever
    with refused("audit.log is there already"):
        audit(index, loaded, tmp_path, settings())


def test_a_protocols_table_has_no_formula_either() -> None:
    table = Table("auroc", "=task", "", "", ("-0.5", "@a"), (("+b", (Estimate(-0.5),) * 2),))
    first, second = written([table], "csv").splitlines()[1:]
    assert first.startswith("auroc,'=task,'+b,-0.5,-0.5,")
    assert second.startswith("auroc,'=task,'+b,'@a,-0.5,")


def test_classes_of_one_name_are_refused(folder: Path, tmp_path: Path, refused: Refused) -> None:
    with refused("index.csv: 2 classes are called 'top'; name them apart"):
        read_index(folder / "index.csv", classes=("top", "bottom", "top"))
    checkpoint = torch.load(model_file(tmp_path / "weights.pt"), weights_only=True)
    torch.save({**checkpoint, "classes": ["a", "a"]}, tmp_path / "weights.pt")
    with refused("weights.pt: its classes: 2 classes are called 'a'; name them apart"):
        load_model(tmp_path / "weights.pt")


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can be longer than ``size`` bytes; Python ignores the signal, so that writes fail."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


FULL = r"cannot be written \(File too large\); make room, or name another --out"


@pytest.mark.parametrize("size", [1_000, 10_000])
def test_training_on_a_full_disk_loses_the_epoch_that_it_is_in_and_no_other(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    size: int,
) -> None:
    stop_after(2, index, tmp_path / "run", monkeypatch)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with disk_of(size), refused(f"run/best.pt: {FULL}"):
        train(index, tmp_path / "run", QUICK, resume=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_log_without_room_is_told(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr("diffsal.training.run.is_best", lambda *_: False)
    with disk_of(10), refused(f"run/log.jsonl: {FULL}"):
        train(index, tmp_path / "run", QUICK)


def test_a_folder_that_is_gone_is_told(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    def remove(*_: object) -> bool:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()
        return True

    monkeypatch.setattr("diffsal.training.run.is_best", remove)
    with refused(r"run/best.pt: cannot be written \((File exists|Not a directory)\)"):
        train(index, tmp_path / "run", QUICK)


def test_other_commands_on_a_full_disk_say_so_in_a_line(
    folder: Path, index: Index, tmp_path: Path
) -> None:
    model = str(train(index, tmp_path / "run", replace(QUICK, epochs=1)))
    given = [str(folder / "index.csv"), "--model", model, "--device", "cpu"]
    image = [str(folder / "0.png"), *given[1:]]
    commands = {
        "a.pt": ["fool", *given, "--epochs", "1", "--out", str(tmp_path / "a.pt")],
        "audit": ["audit", *given, "--out", str(tmp_path / "audit")],
        "explained": ["explain", *image, "--out", str(tmp_path / "explained")],
    }
    for name, command in commands.items():
        with disk_of(300):
            result = CliRunner().invoke(main, command)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert re.search("(?m)^Error: .*File too large", result.stderr), result.stderr
        assert "Traceback" not in result.output
        shutil.rmtree(tmp_path / "audit", ignore_errors=True)  # its log
        assert name == "explained" or names(tmp_path) == ["run"], names(tmp_path)


def test_an_output_without_room_is_told(folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "diffsal", "layers", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Error: the output: No space left on device; make room"
