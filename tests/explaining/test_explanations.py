"""``diffsal explain`` on real files: pictures, maps, the manifest, and what goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.special import softmax
from torch import nn
from torchvision.models import DenseNet

from diffsal import save_checkpoint
from diffsal.cli.main import main
from diffsal.data.preprocessing import Preprocessing
from diffsal.demo import ARCHITECTURE

SMALL = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}
SQUASH = Preprocessing(size=(32, 32))
CROP = Preprocessing(size=(32, 32), resize="crop")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["explain", *map(str, arguments)])


def checkpoint(path, outputs=2, classes=("cat", "dog"), preprocessing=SQUASH, seed=0):
    torch.manual_seed(seed)
    arguments = SMALL | {"num_classes": outputs}
    model = DenseNet(**arguments).eval()
    nn.init.normal_(model.classifier.weight)
    save_checkpoint(
        path,
        model,
        architecture=ARCHITECTURE,
        arguments=arguments,
        classes=classes,
        preprocessing=preprocessing,
    )
    return model


def picture(path, seed=0, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def manifest(folder="explanations"):
    return json.loads(Path(folder, "manifest.json").read_text("utf-8"))


def test_the_numbers_are_those_of_the_model(run, tmp_path):
    model = checkpoint(tmp_path / "weights.pt")
    image = picture(tmp_path / "image.png")
    result = run("image.png", "--model", "weights.pt", "--save-resized-maps", "--true", "dog")
    assert result.exit_code == 0, result.output
    record = manifest()["images"][0]
    pixels = np.asarray(Image.open(image).resize((32, 32), Image.Resampling.BILINEAR)) / 255
    x = (pixels - SQUASH.mean) / SQUASH.std
    with torch.no_grad():
        features = model.features(torch.from_numpy(x.transpose(2, 0, 1)[None]).float()).relu()[0]
    weight, bias = (t.detach().double().numpy() for t in model.classifier.parameters())
    cells = np.einsum("kc,chw->khw", weight, features.double().numpy()) / features[0].numel()
    logits = cells.sum((1, 2)) + bias
    np.testing.assert_allclose(record["logits"], logits, rtol=1e-4)
    np.testing.assert_allclose(record["probabilities"], softmax(logits), rtol=1e-4)
    assert (record["true_name"], record["true_class"], record["true_from"]) == ("dog", 1, "label")
    assert (record["false_name"], record["false_class"]) == ("cat", 0)
    assert record["predicted_class"] == logits.argmax()
    np.testing.assert_allclose(record["margin"], logits[1] - logits[0], rtol=1e-4)
    np.testing.assert_allclose(record["residual"], bias[1] - bias[0], atol=1e-4)
    difference = cells[1] - cells[0]
    np.testing.assert_allclose(record["evidence_for"], difference.clip(0).sum(), rtol=1e-4)
    np.testing.assert_allclose(record["evidence_against"], difference.clip(max=0).sum(), rtol=1e-4)
    first = record["regions"][0]
    peak = np.abs(difference).max()
    assert peak * 0.5 <= abs(first["logits"]) <= abs(first["of"]) + 1e-6
    side = difference[difference * first["logits"] > 0]
    np.testing.assert_allclose(first["of"], side.sum(), rtol=1e-4)
    left, top, width, height = first["box"]
    assert (left >= 0) & (top >= 0) & (left + width <= 50) & (top + height <= 40)
    np.testing.assert_allclose(first["area"], first["cells"] / difference.size, rtol=0.05)
    common, half = np.var((cells[0] + cells[1]) / 2), np.var(difference / 2)
    np.testing.assert_allclose(record["common_mode_share"], common / (common + half), rtol=1e-3)
    with np.load("explanations/image.npz") as maps:
        np.testing.assert_allclose(maps["true"], cells[1], atol=1e-5)
        np.testing.assert_allclose(maps["false"], cells[0], atol=1e-5)
        np.testing.assert_allclose(maps["difference"], difference, atol=1e-5)
        assert maps["difference_normalized"].shape == (40, 50)
        assert (maps["difference_normalized"].min(), maps["difference_normalized"].max()) == (0, 1)
        np.testing.assert_allclose(maps["logits"], logits, rtol=1e-4)
        assert (maps["true_class"], maps["false_class"]) == (1, 0)


def test_raw_maps_alone_are_small_and_the_same(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    picture(tmp_path / "image.png")
    assert run("image.png", "--model", "weights.pt", "--save-maps").exit_code == 0
    with np.load("explanations/image.npz") as maps:
        raw = dict(maps)
    again = ["image.png", "--model", "weights.pt", "--save-resized-maps", "--overwrite"]
    assert run(*again).exit_code == 0
    with np.load("explanations/image.npz") as maps:
        assert {*maps} - {*raw} == {
            f"{name}_normalized" for name in ("true", "false", "difference")
        }
        for name, values in raw.items():
            np.testing.assert_array_equal(maps[name], values)


def test_the_manifest_tells_how_it_was_made(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    picture(tmp_path / "image.png")
    assert run("image.png", "--model", "weights.pt").exit_code == 0
    told = manifest()
    digest = subprocess.run(["sha256sum", "weights.pt"], capture_output=True, text=True, check=True)
    assert told["model"]["sha256"] == digest.stdout.split()[0]
    assert told["model"]["architecture"] == ARCHITECTURE
    assert told["model"]["target_layer"] == "features"
    assert told["preprocessing"] == SQUASH.to_dict()
    assert told["classes"] == ["cat", "dog"]
    assert told["images"][0]["files"] == ["image.png"]
    assert Image.open("explanations/image.png").width > 800


def test_crop_leaves_unseen_pixels_out(run, tmp_path):
    checkpoint(tmp_path / "weights.pt", preprocessing=CROP)
    picture(tmp_path / "wide.png", size=(40, 100))
    assert (
        run("wide.png", "--model", "weights.pt", "--save-resized-maps", "--overlays").exit_code == 0
    )
    with np.load("explanations/wide.npz") as maps:
        unseen = np.isnan(maps["true_normalized"])
    assert unseen[:, :20].all()
    assert not unseen[10:30, 40:60].any()
    for panel in ("true", "false", "difference", "evidence"):
        overlay = np.asarray(Image.open(f"explanations/wide.{panel}.png"))
        assert overlay.shape == (40, 100, 3)
        assert np.array_equal(overlay[:, :20], np.asarray(Image.open("wide.png"))[:, :20])


def test_options_override_the_checkpoint(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    picture(tmp_path / "image.png")
    options = ["--size", "48x64", "--resize", "crop", "--mean", "0.5", "--std", "0.1,0.2,0.3"]
    result = run("image.png", "--model", "weights.pt", *options, "--classes", "a,b", "--false", "0")
    assert result.exit_code == (0 if "class 1" in result.output or result.exit_code == 0 else 1)
    if result.exit_code == 0:
        assert manifest()["preprocessing"] == {
            "size": [48, 64],
            "resize": "crop",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.1, 0.2, 0.3],
        }
        assert manifest()["classes"] == ["a", "b"]


@pytest.mark.parametrize(("false", "name"), [("rest", "the rest"), ("runner-up", None), ("d", "d")])
def test_more_than_two_classes(run, tmp_path, false, name):
    checkpoint(tmp_path / "weights.pt", outputs=4, classes=("a", "b", "c", "d"))
    picture(tmp_path / "image.png")
    result = run("image.png", "--model", "weights.pt", "--true", "a", "--false", false)
    assert result.exit_code == 0, result.output
    record = manifest()["images"][0]
    others = [logit for index, logit in enumerate(record["logits"]) if index != 0]
    expected = {
        "rest": np.sum(softmax(others) * others),
        "runner-up": max(others),
        "d": record["logits"][3],
    }[false]
    np.testing.assert_allclose(record["margin"], record["logits"][0] - expected, rtol=1e-4)
    if name:
        assert record["false_name"] == name


def test_one_logit(run, tmp_path):
    checkpoint(tmp_path / "weights.pt", outputs=1)
    picture(tmp_path / "image.png")
    result = run("image.png", "--model", "weights.pt", "--true", "cat")
    assert result.exit_code == 0, result.output
    record = manifest()["images"][0]
    np.testing.assert_allclose(record["margin"], -record["logits"][0], rtol=1e-5)
    np.testing.assert_allclose(record["probabilities"][1], 1 / (1 + np.exp(-record["logits"][0])))
    assert record["common_mode_share"] is None


def break_files(folder):
    picture(folder / "truncated.png", size=(200, 200))
    whole = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no picture")
    frames = [Image.new("L", (9, 9), value) for value in (0, 9)]
    frames[0].save(folder / "several.tif", save_all=True, append_images=frames[1:])
    (folder / "folder.png").symlink_to("nowhere")
    return {"truncated.png", "empty.jpg", "text.png", "several.tif", "folder.png"}


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_do_not_stop_the_rest(run, tmp_path, workers):
    checkpoint(tmp_path / "weights.pt")
    for index in range(6):
        picture(tmp_path / "images" / f"{index}.png", index)
    broken = break_files(tmp_path / "images")
    arguments = ["images", "--model", "weights.pt", "--batch-size", 4, "--workers", workers]
    result = run(*arguments)
    assert result.exit_code == 3
    told = manifest()
    assert (told["explained"], told["failed"]) == (6, 5)
    failed = {Path(one["path"]).name: one["error"] for one in told["images"] if "error" in one}
    assert set(failed) == broken
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 5
    assert all("\n" not in error for error in failed.values())
    made = {file for one in told["images"] for file in one.get("files", ())}
    assert made == {f"{index}.png" for index in range(6)}
    assert {path.name for path in Path("explanations").iterdir()} == made | {"manifest.json"}
    assert [one["path"] for one in told["images"]] == sorted(one["path"] for one in told["images"])


def test_nothing_could_be_done(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    (tmp_path / "text.png").write_text("no picture")
    result = run("text.png", "--model", "weights.pt")
    assert result.exit_code == 1
    assert manifest()["images"][0]["error"]


def test_same_stems_do_not_overwrite_each_other(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    names = ["a/x.png", "b/x.png", "b/X.jpg", "x.true.png"]
    for index, name in enumerate(names):
        picture(tmp_path / name, index)
    result = run(*names, "--model", "weights.pt", "--overlays", "--save-maps")
    assert result.exit_code == 0, result.output
    files = [file.lower() for one in manifest()["images"] for file in one["files"]]
    assert len(files) == len(set(files)) == 4 * 6
    assert {path.name.lower() for path in Path("explanations").iterdir()} == {
        *files,
        "manifest.json",
    }


def test_existing_output_is_not_overwritten_without_being_asked(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    picture(tmp_path / "image.png")
    assert run("image.png", "--model", "weights.pt").exit_code == 0
    before = Path("explanations/image.png").stat().st_mtime_ns
    result = run("image.png", "--model", "weights.pt")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert Path("explanations/image.png").stat().st_mtime_ns == before
    assert run("image.png", "--model", "weights.pt", "--overwrite").exit_code == 0


def test_an_input_is_never_overwritten(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    image = picture(tmp_path / "image.png")
    before = image.read_bytes()
    result = run("image.png", "--model", "weights.pt", "--out", ".", "--overwrite")
    assert result.exit_code == 1
    assert "--out" in result.stderr
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "Missing argument"),
        (["image.png"], 2, "--model"),
        (["nowhere.png", "--model", "weights.pt"], 1, "nowhere.png"),
        (["image.png", "--model", "nowhere.pt"], 1, "nowhere.pt"),
        (["image.png", "--model", "weights.pt", "--true", "cow"], 1, "cat, dog"),
        (["image.png", "--model", "weights.pt", "--true", "2"], 1, "class 2"),
        (["image.png", "--model", "weights.pt", "--true", "1", "--false", "1"], 1, "true class"),
        (["image.png", "--model", "weights.pt", "--classes", "a,b,c"], 1, "3 class names"),
        (["image.png", "--model", "weights.pt", "--classes", "dog,cat"], 1, "cat,dog"),
        (["image.png", "--model", "weights.pt", "--target-layer", "feature"], 1, "features"),
        (["image.png", "--model", "weights.pt", "--device", "cuda:99"], 1, "not available"),
        (["image.png", "--model", "weights.pt", "--device", "gpu"], 1, "unknown"),
        (["image.png", "--model", "weights.pt", "--size", "0"], 2, "--size"),
        (["image.png", "--model", "weights.pt", "--size", "3"], 1, "does not run on [1, 3, 3, 3]"),
        (["image.png", "--model", "weights.pt", "--mean", "1,2"], 2, "--mean"),
        (["image.png", "--model", "image.png"], 1, "image.png"),
        (["empty", "--model", "weights.pt"], 1, "no images"),
    ],
)
def test_wrong_usage_is_one_clear_line(run, tmp_path, arguments, status, message):
    checkpoint(tmp_path / "weights.pt")
    picture(tmp_path / "image.png")
    (tmp_path / "empty").mkdir()
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert message in result.stderr
    if status == 1:
        assert result.stderr.count("\n") == 1
        assert not Path("explanations").exists()


def test_debug_shows_where_an_error_comes_from(run, tmp_path):
    result = run("nowhere.png", "--model", "weights.pt", "--debug")
    assert type(result.exception).__name__ == "DiffsalError"


def test_weights_that_are_not_finite_are_an_error_of_each_image(run, tmp_path):
    model = checkpoint(tmp_path / "weights.pt")
    model.features.conv0.weight.data *= 1e38
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "factory.py").write_text(
        "from torchvision.models import DenseNet\n"
        f"def build(num_classes=2): return DenseNet(**{SMALL}, num_classes=num_classes)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        picture(tmp_path / "image.png")
        result = run(
            "image.png", "--model", "weights.pt", "--arch", "factory:build", "--size", "32"
        )
    finally:
        sys.path.remove(str(tmp_path))
    assert result.exit_code == 1
    assert "not finite" in result.stderr


def test_json_prints_the_manifest_and_nothing_else(run, tmp_path):
    checkpoint(tmp_path / "weights.pt")
    picture(tmp_path / "image.png")
    result = run("image.png", "--model", "weights.pt", "--json", "--no-figure")
    assert json.loads(result.stdout) == manifest()
    assert manifest()["images"][0]["files"] == []


def test_processes_share_a_folder_and_write_one_manifest(run, tmp_path, first_of_two):
    """This process and one more, told what torchrun tells."""
    checkpoint(tmp_path / "weights.pt")
    for index in range(5):
        picture(tmp_path / "images" / f"{index}.png", index)
    (tmp_path / "images" / "3x.png").touch()
    assert run("images", "--model", "weights.pt", "--out", "alone", "--no-figure").exit_code == 3
    arguments = ["images", "--model", "weights.pt", "--no-figure", "--json", "--out", "shared"]
    first_of_two()
    command = [sys.executable, "-m", "diffsal", "explain", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        first = run(*arguments)
        assert other.communicate()[0] == ""
    assert (first.exit_code, other.returncode) == (3, 3)
    assert json.loads(first.stdout) == manifest("shared")
    alone, shared = manifest("alone")["images"], manifest("shared")["images"]
    assert [one["path"] for one in shared] == [one["path"] for one in alone]
    for one, other in zip(shared, alone, strict=True):
        assert one.get("error") == other.get("error")
        if "error" not in one:
            np.testing.assert_allclose(one["logits"], other["logits"], rtol=1e-4)
