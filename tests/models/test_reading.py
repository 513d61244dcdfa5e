"""From bytes to tensors: nothing in a file runs, and what is no file of weights is told."""

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from diffsal.errors import DiffsalError
from diffsal.models.checkpoints import load_model

SMALL = "shufflenet_v2_x0_5"


WHOLE = "is damaged, or no file of PyTorch weights"


CONVERT = r"torch\.save\(model\.state_dict\(\), 'weights\.pt'\).*diffsal\.explain\(model, images\)"


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "net", "resnet"])
def test_containers(name, small, save, same_outputs, zeros, prefixed):
    optimizer = torch.optim.Adam(small.parameters())
    small(torch.randn(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": torch.tensor(3),
        "optimizer": optimizer.state_dict(),
        f"{name}_ema": prefixed(zeros(SMALL), "module."),
        name: small.state_dict(),
    }
    assert same_outputs(small, load_model(save(checkpoint)).model)


def test_only_an_average_is_taken(small, save, same_outputs):
    assert same_outputs(small, load_model(save({"state_dict_ema": small.state_dict()})).model)


def test_lightning_checkpoint(small, save, same_outputs, zeros, prefixed):
    state = {
        **prefixed(zeros(SMALL), "ema_model.module."),
        **prefixed(small.state_dict(), "model."),
        "criterion.weight": torch.ones(2),
        "loss.projection.weight": torch.ones(2, 2),
        "val_confusion.matrix": torch.ones(2, 2),
    }
    checkpoint = {
        "state_dict": state,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1, "classes": ["a", "b"]},
    }
    loaded = load_model(save(checkpoint))
    assert same_outputs(small, loaded.model)
    assert loaded.notes[0].startswith("passed over what stands beside the model: ema_model.module.")


def test_several_models_are_not_chosen_from(small, save, rejects):
    checkpoint = {"teacher": small.state_dict(), "student": small.state_dict()}
    rejects(save(checkpoint), r"several models \(teacher, student\): save one of them")


class Settings:
    def __init__(self):
        self.rate = 0.1


def test_objects_beside_the_weights_are_passed_over(small, save, same_outputs):
    checkpoint = {
        "model": small.state_dict(),
        "args": argparse.Namespace(lr=0.1, path=Path("runs")),
        "best": np.float64(0.5),
        "history": np.ones(3),
        "settings": Settings(),
    }
    assert same_outputs(small, load_model(save(checkpoint)).model)


def test_safetensors(network, tmp_path, rejects, monkeypatch, same_outputs):
    model = network("mnasnet0_5", num_classes=2)  # torchvision loads no mnasnet without metadata
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    assert same_outputs(model, load_model(path).model)
    path.write_bytes(path.read_bytes()[:-1])
    rejects(path, WHOLE)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    rejects(path, r"pip install 'diffsal\[safetensors\]'")


class Payload:
    """Makes a file when unpickled by a reader that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_nothing_in_a_file_is_run(archive, beside, small, save, tmp_path):
    canary = tmp_path / "canary"
    content = {"model": small.state_dict(), "args": Payload(canary)} if beside else Payload(canary)
    path = save(content, _use_new_zipfile_serialization=archive)
    if archive and beside:
        load_model(path)
    else:
        with pytest.raises(DiffsalError, match=CONVERT):
            load_model(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the payload is none"


@pytest.mark.parametrize("archive", [True, False])
def test_pickled_models(archive, small, save, rejects):
    rejects(save(small, _use_new_zipfile_serialization=archive), CONVERT)
    rejects(save({"model": small}, _use_new_zipfile_serialization=archive), CONVERT)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs(tmp_path, rejects):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    image = torch.ones(1, 3, 8, 8)
    torch.jit.trace(model, image).save(tmp_path / "script.pt")
    rejects(
        tmp_path / "script.pt", r"TorchScript program, .*torch\.jit\.load\(PATH\)\.state_dict\(\)"
    )
    torch.export.save(torch.export.export(model, (image,)), tmp_path / "program.pt2")
    rejects(
        tmp_path / "program.pt2", r"exported program, .*torch\.export\.load\(PATH\)\.state_dict"
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"\n <!DOCTYPE html>\n<html></html>", "is a web page"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.4.1:", f"is an ONNX graph.*{CONVERT}"),
        (b"\x08\x08:\x90\x01", "is an ONNX graph"),
        (b"hello\n", WHOLE),
        (bytes(range(256)) * 8, WHOLE),
        (b"PK\x03\x04" + bytes(100), WHOLE),
        (pickle.dumps({"a": 1}), WHOLE),
        (pickle.dumps({"a": 1}, protocol=2), WHOLE),
    ],
)
def test_bytes_that_are_no_weights(content, pattern, tmp_path, rejects):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    rejects(path, pattern)


def test_onnx_by_its_suffix(tmp_path, rejects):
    path = tmp_path / "network.onnx"
    path.write_bytes(b"\x08\x08\x22\x00")
    rejects(path, "is an ONNX graph")


@pytest.mark.parametrize("archive", [True, False])
def test_truncated_file(archive, small, save, rejects):
    path = save(small.state_dict(), _use_new_zipfile_serialization=archive)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rejects(path, WHOLE)


def test_no_file(tmp_path, rejects):
    rejects(tmp_path / "weights.pt", "No such file or directory")
    rejects(tmp_path, "is a folder without a config.json: name the file of weights in it")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ([torch.ones(2, 2)], "holds a list, not a state_dict"),
        (torch.ones(2, 2), "holds a Tensor, not a state_dict"),
        ({}, "holds no weights, but an empty dict"),
        ({"epoch": 3, "loss": 0.5}, "holds no weights, but epoch, loss"),
        (
            {"conv.weight": torch.ones(2, 3, 3, 3)},
            r"has these parameters \(conv.weight\): pass --a",
        ),
    ],
)
def test_content_that_is_no_model(content, pattern, save, rejects):
    rejects(save(content), pattern)
