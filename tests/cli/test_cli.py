"""Train, explain, fool and audit by command line alone, on files made here."""

import csv
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.models import resnet18

import diffsal
from diffsal.cli.main import main

pytestmark = pytest.mark.usefixtures("few_draws")

TINY = """
architecture = "torchvision:DenseNet"
arguments = { growth_rate = 4, block_config = [2, 2], num_init_features = 8 }
weights = "none"
size = 32
batch_size = 8
lr = 0.05
schedule = "none"
device = "cpu"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """48 small pictures: a bright square on the left (ill) or on the right (well), and its map."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with Path("index.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "map", "split"])
        for number in range(48):
            label = ("ill", "well")[number % 2]
            pixels = rng.integers(0, 60, (32, 32), np.uint8)
            mask = np.zeros((32, 32), np.uint8)
            left = 2 if label == "ill" else 20
            top = int(rng.integers(2, 20))
            pixels[top : top + 10, left : left + 10] += 180
            mask[top : top + 10, left : left + 10] = 255
            Image.fromarray(pixels).save(f"{number}.png")
            Image.fromarray(mask).save(f"{number}-map.png")
            split = ("train", "train", "val", "test")[number // 12]
            rows.writerow([f"{number}.png", label, f"{number}-map.png", split])
    Path("tiny.toml").write_text(TINY)
    return tmp_path


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_from_training_to_a_report(folder):
    train = ["train", "index.csv", "--config", "tiny.toml", "--epochs", 4, "--out", "run"]
    printed = json.loads(run(*train, "--method", "contrast", "--json").stdout)
    assert [record["epoch"] for record in printed["epochs"]] == [1, 2, 3, 4]
    assert printed["epochs"][-1]["auroc"] > 0.9
    assert {"cross_entropy", "true", "contrast", "loss"} <= printed["epochs"][0].keys()
    assert "resume" in run(*train, status=1).stderr

    run("explain", "0.png", "--model", "run/best.pt", "--device", "cpu")  # no further options
    explained = json.loads(Path("explanations/manifest.json").read_text())
    assert explained["classes"] == ["ill", "well"]
    assert explained["preprocessing"]["size"] == [32, 32]

    fool = ["fool", "index.csv", "--model", "run/best.pt", "--device", "cpu"]
    shifted = run(*fool, "--method", "head-shift", "--out", "shifted.pt", "--json")
    numbers = json.loads(shifted.stdout)
    assert numbers["agreement"] == 1
    assert numbers["largest_probability_change"] < 1e-5
    assert numbers["fooled"]["true"] < numbers["honest"]["true"]
    assert "--overwrite" in run(*fool, "--out", "shifted.pt", status=1).stderr
    trained = run(*fool, "--out", "fooled.pt", "--epochs", 1, "--objective", "both")
    assert "common-mode share" in trained.stdout
    once = [*fool, "--target", "middle", "--epochs", 1, "--out"]
    found = {
        name: json.loads(run(*once, f"{name}.pt", "--objective", name, "--json", *options).stdout)
        for name, options in {
            "composite": ["--gamma", 0.3],
            "gradient": ["--gamma", 0.3],
            "control": [],
        }.items()
    }
    assert {(one["target"], one["measure"]) for one in found.values()} == {
        ("middle", "target_distance")
    }
    assert found["control"]["fooled"] != found["composite"]["fooled"] != found["gradient"]["fooled"]
    assert "has no gamma" in run(*once, "other.pt", "--gamma", 0.3, status=1).stderr

    audit = ["audit", "index.csv", "--model", "shifted.pt", "--reference", "run/best.pt"]
    options = ["--device", "cpu", "--limit", 8, "--precision", 1]
    found = json.loads(run(*audit, *options, "--out", "audit", "--json").stdout)
    assert found == json.loads(Path("audit/audit.json").read_text())
    assert Path("audit/report.html").read_text().startswith("<!doctype html>")
    assert len(Path("audit/per-image.csv").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.csv", "--out", "run"], "nowhere.csv"),
        (["train", "index.csv", "--out", "run", "--method", "magic"], "magic"),
        (["train", "index.csv", "--out", "run", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "index.csv", "--out", "run", "--weights", "nowhere.pt"], "nowhere.pt"),
        (["train", "index.csv", "--out", "run", "--epochs", "0"], "epochs"),
        (["train", "index.csv", "--out", "run", "--classes", "ill,healthy"], "well"),
        (["audit", "index.csv", "--model", "nowhere.pt", "--out", "audit"], "nowhere.pt"),
        (["fool", "index.csv", "--model", "0.png", "--out", "fooled.pt"], "0.png"),
        (["explain", "0.png", "--model", "tiny.pt", "--out", "tiny.toml/out"], "written to"),
        (["train", "index.csv", "--out", "tiny.toml/run"], "written to"),
        (["audit", "index.csv", "--model", "tiny.pt", "--out", "tiny.toml/out"], "written to"),
        (["fool", "index.csv", "--model", "tiny.pt", "--out", "tiny.toml/f.pt"], "written to"),
        (["train", "splits", "--out", "run"], "splits, not classes"),
    ],
)
def test_wrong_usage_is_one_clear_line(folder, arguments, message):
    for split in ("train", "test"):
        Path("splits", split, "ill").mkdir(parents=True)
    result = run(*arguments, status=1)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("run").exists()
    assert not Path("audit").exists()


def test_a_damaged_checkpoint_is_told(folder):
    train = ["train", "index.csv", "--config", "tiny.toml", "--epochs", 1, "--out", "run"]
    run(*train, "--method", "cross-entropy")
    Path("run/last.pt").write_bytes(b"garbage")
    result = run(*train, "--method", "cross-entropy", "--resume", status=1)
    assert "damaged" in result.stderr


def test_a_run_is_not_resumed_with_other_human_maps(folder):
    train = ["train", "index.csv", "--config", "tiny.toml", "--epochs", 1, "--out", "run"]
    run(*train)
    index = Path("index.csv").read_text()
    Path("index.csv").write_text(index.replace("0-map.png", "2-map.png"))
    assert "samples" in run(*train, "--resume", status=1).stderr


def test_pictures_of_an_earlier_run_are_not_explained(folder):
    run("train", "index.csv", "--config", "tiny.toml", "--epochs", 1, "--out", "run")
    Path("some").mkdir()
    Path("0.png").rename("some/0.png")
    explain = ["explain", "some", "--recursive", "--model", "run/best.pt", "--out", "some/out"]
    for options in ([], ["--overwrite"]):
        run(*explain, *options)
        assert len(json.loads(Path("some/out/manifest.json").read_text())["images"]) == 1


@pytest.mark.parametrize("names", ["ill,", "ill,ill"])
def test_class_names_are_distinct(folder, names):
    run("explain", "0.png", "--model", "tiny.pt", "--classes", names, status=2)


def test_version_and_help():
    assert diffsal.__version__ in run("--version").stdout
    commands = run("--help").stdout
    for command in ("explain", "train", "fool", "audit", "demo"):
        assert command in commands
        assert "--debug" in run(command, "--help").stdout


GREY = """
from torch import nn

def net():
    head = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 2)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), *head)
"""


def test_a_grey_network_by_every_command(folder, monkeypatch):
    Path("grey_net.py").write_text(GREY)
    monkeypatch.syspath_prepend(folder)
    own = ["--weights", "none", "--size", 32, "--epochs", 2, "--device", "cpu"]
    arch = ["--arch", "grey_net:net"]
    run("train", "index.csv", *arch, *own, "--method", "contrast", "--out", "run")
    model = ["--model", "run/best.pt", *arch, "--device", "cpu"]
    manifest = json.loads(run("explain", "1.png", *model, "--json").stdout)
    assert manifest["preprocessing"]["channels"] == len(manifest["preprocessing"]["mean"]) == 1
    run("audit", "index.csv", *model, "--precision", 1, "--out", "audit")
    run("fool", "index.csv", *model, "--epochs", 1, "--out", "fooled.pt")
    again = ["--weights", "run/best.pt", "--size", 32, "--epochs", 1, "--device", "cpu"]
    run("train", "index.csv", *arch, *again, "--method", "cross-entropy", "--out", "again")


@pytest.mark.slow
def test_the_classes_assumed_order_is_told(folder):
    train = ["train", "index.csv", "--config", "tiny.toml", "--epochs", 4, "--out", "run"]
    run(*train, "--method", "cross-entropy")
    bare = torch.load("run/best.pt", weights_only=True) | {"classes": None}
    torch.save(bare, "bare.pt")
    model = ["--model", "bare.pt", "--device", "cpu"]
    swapped = [*model, "--classes", "well,ill"]
    wrong = run("audit", "index.csv", *swapped, "--precision", 1, "--out", "wrong").stderr
    assert "Note: assumed: output 0 = well, output 1 = ill\n" in wrong
    assert "the classes may be in the other order" in wrong
    head_shift = ["--method", "head-shift", "--out", "fooled.pt"]
    assert "in the other order" in run("fool", "index.csv", *swapped, *head_shift).stderr
    right = run("audit", "index.csv", *model, "--precision", 1, "--out", "right").stderr
    assert "does not name the classes" in right
    assert "other order" not in right


def test_thresholds_of_the_user(folder):
    run("train", "index.csv", "--config", "tiny.toml", "--epochs", 1, "--out", "run")
    model = ["index.csv", "--model", "run/best.pt", "--device", "cpu", "--precision", 1]
    never, always = ["--fail-on", "correct < 0"], ["--fail-on", "correct >= 0"]
    run("audit", *model, "--out", "passes", *never)
    assert 'failures="0"' in Path("passes/junit.xml").read_text()
    told = run("audit", *model, "--out", "fails", *never, *always, status=4).stderr
    assert told.splitlines()[-1].startswith("Failed: correct is ")
    assert 'tests="2" failures="1"' in Path("fails/junit.xml").read_text()
    run("audit", *model, "--out", "none", "--fail-on", "correct", status=1)
    assert not Path("none").exists()


def test_serve_says_what_to_do_where_its_extra_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for module in ("run", "web"):
        monkeypatch.delitem(sys.modules, f"diffsal.serving.{module}", raising=False)
    result = run("serve", "--model", "missing.pt", status=1)
    assert result.stderr == (
        "Error: the page needs starlette and uvicorn: pip install 'diffsal[serve]'\n"
    )


def test_serve_says_that_its_port_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        torch.save(resnet18(num_classes=2).state_dict(), "weights.pt")
        result = run("serve", "--model", "weights.pt", "--port", port, status=1)
    assert f"Error: cannot listen on 127.0.0.1, port {port}" in result.stderr
    assert "--port" in result.stderr
    assert result.stdout == ""
