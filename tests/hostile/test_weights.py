"""Weights files that cost far more than they are, or that are no numbers."""

import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffsal.models.checkpoints import load_model

Refused = Callable[[str], AbstractContextManager[None]]


def nested(levels: int, kind: Callable[..., object] = lambda *parts: list(parts)) -> object:
    """A value in a value and so on, each twice: 2**levels in all, in ``levels`` of memory."""
    value: object = kind()
    for _ in range(levels):
        value = kind(value, value)
    return value


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_what_has_no_end_is_refused_at_once(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        with refused("is a pipe, device or socket"):
            load_model(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.pt"))
        with refused("No such device"):
            load_model(tmp_path / "socket.pt")


def test_a_pipe_in_a_folder_of_the_hub(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "generation_config.json")
    with refused("generation_config.json is no file"):
        load_model(tmp_path)


def test_expanded_tensors_take_no_more_than_the_file(
    tmp_path: Path, plain_state: dict[str, Tensor], refused: Refused
) -> None:
    head = torch.ones(1, 1).expand(1_000_000, 1024)
    path = saved(tmp_path / "a.pt", plain_state | {"fc.weight": head})
    with refused("its tensors take 4... MB, of a file of"):
        load_model(path)


def test_archives_that_inflate(tmp_path: Path, refused: Refused) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(50_000_000))
    with refused("unpacks from 0 MB to 50 MB"):
        load_model(tmp_path / "a.pt")


def test_storages_beyond_their_record_are_not_read(tmp_path: Path, refused: Refused) -> None:
    """Otherwise memory that is not the file's would become weights."""
    path = saved(tmp_path / "a.pt", {"weight": torch.ones(4, 4)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:16] if name.endswith("/data/0") else content)
    with refused("is damaged"):
        load_model(path)


@pytest.mark.parametrize("entry", ["classes", "preprocessing", "architecture"])
def test_shared_values_that_are_endless_when_shown(
    entry: str, own_file: Callable[..., Path], refused: Refused
) -> None:
    value = {
        "classes": nested(40),
        "preprocessing": {"size": nested(40)},
        "architecture": {"name": "DenseNet", "arguments": {"layers": nested(40)}},
    }[entry]
    with refused("more than 200000 values, or 32 levels"):
        load_model(own_file(**{entry: value}))


def test_shared_tuples_that_are_endless_when_hashed(tmp_path: Path, refused: Refused) -> None:
    tuples = nested(40, lambda *parts: parts)
    path = saved(tmp_path / "a.pt", {"a": tuples})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    start, end = b"X\x01\x00\x00\x00aq\x01", b"s."  # {"a": tuples} becomes {tuples: None}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                content = content.replace(start, b"").removesuffix(end) + b"Ns."
            archive.writestr(name, content)
    with refused("holds tuples in tuples"):
        load_model(path)


def test_a_bytearray_by_its_length(tmp_path: Path, refused: Refused) -> None:
    asked = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", asked)
        archive.writestr("archive/version", "3")
    with refused("holds a bytearray"):
        load_model(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "arguments", "pattern"),
    [
        ("DenseNet", {"block_config": [20_000]}, "far larger than the weights"),
        ("DenseNet", {"block_config": [10_000_000]}, "asks for torchvision:DenseNet with 10000000"),
        ("DenseNet", {"growth_rate": 100_000}, "far larger than the weights"),
        (
            "VisionTransformer",
            {"image_size": 32_000, "patch_size": 16, "num_layers": 1, "num_heads": 1}
            | {"hidden_dim": 768, "mlp_dim": 8},
            "far larger than the weights",
        ),
        (
            "SwinTransformer",
            {"patch_size": [4, 4], "embed_dim": 8, "depths": [2], "num_heads": [1]}
            | {"window_size": [300, 300]},
            "far larger than the weights",
        ),
        ("timm:vit_giant_patch14_224", {}, "far larger than the weights"),
    ],
)
def test_networks_that_the_file_is_too_small_for(
    name: str,
    arguments: dict[str, object],
    pattern: str,
    own_file: Callable[..., Path],
    refused: Refused,
) -> None:
    with refused(pattern):
        load_model(own_file(architecture={"name": name, "arguments": arguments}))


@pytest.mark.slow  # reading so many names takes seconds; what is quadratic, much longer
@pytest.mark.parametrize("stem", ["conv1.0.weight", "features.conv0.weight"])
def test_many_wrappers_are_looked_through_once(
    stem: str, tmp_path: Path, own_file: Callable[..., Path], refused: Refused
) -> None:
    state = {f"net{number}.{stem}": torch.ones(1, 1) for number in range(20_000)}
    with refused("no torchvision classification model"):
        load_model(saved(tmp_path / "a.pt", state))
    with refused("layers that it does not have|no classification head"):
        load_model(own_file(state_dict=state))


_SPARSE = torch.ones(2, 1024).to_sparse()


@pytest.mark.parametrize(
    ("tensor", "pattern"),
    [
        (torch.ones(2, 1024, device="meta"), "on the meta device"),
        (torch.ones(2, 1024).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2, 1024, dtype=torch.complex64), "complex64"),
        (_SPARSE, "sparse_coo"),
        (_SPARSE.to_sparse_csr(), "sparse_csr"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (torch.quantize_per_tensor(torch.ones(2, 1024), 0.1, 0, torch.qint8), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_numbers(
    tensor: Tensor,
    pattern: str,
    tmp_path: Path,
    plain_state: dict[str, Tensor],
    refused: Refused,
) -> None:
    path = saved(tmp_path / "a.pt", plain_state | {"fc.weight": tensor})
    with refused(f"fc.weight is .*{pattern}.*: save plain tensors"):
        load_model(path)


@pytest.mark.parametrize("name", ["fc.forward", "fc.", "fc.append.0", "fc." + "a" * 2_000])
def test_heads_of_impossible_names(
    name: str, tmp_path: Path, plain_state: dict[str, Tensor], refused: Refused
) -> None:
    renamed = {key.replace("fc.", f"{name}."): value for key, value in plain_state.items()}
    with refused("no layer can be called|has 20.. characters"):
        load_model(saved(tmp_path / "a.pt", renamed))


@pytest.mark.parametrize(
    "entries",
    [
        {"architecture": {"name": "DenseNet", "arguments": {3: 4}}},
        {"architecture": {"name": "DenseNet", "arguments": {"growth_rate": 10**400}}},
        {"architecture": {"name": "DenseNet", "arguments": {"growth_rate": torch.ones(2)}}},
        {"preprocessing": {"size": [8, 8], "resize": "squash", "mean": [10**400], "std": [1.0]}},
        {"preprocessing": {3: 4}},
        {"classes": [10**400]},
        {"classes": [("a",) * 300_000]},
        {"state_dict": {3: torch.ones(2), (4, "a"): torch.ones(2)}},
    ],
)
def test_entries_of_other_kinds(
    entries: dict[str, object], own_file: Callable[..., Path], refused: Refused
) -> None:
    with refused("own.pt: "):
        load_model(own_file(**entries))


def test_networks_without_parameters(
    tmp_path: Path, plain_state: dict[str, Tensor], refused: Refused
) -> None:
    with refused("torch.nn:Identity has no parameters"):
        load_model(saved(tmp_path / "a.pt", plain_state), arch="torch.nn:Identity")


def test_a_path_that_is_too_long(tmp_path: Path, refused: Refused) -> None:
    with refused("File name too long"):
        load_model(tmp_path / ("a" * 300))


def test_tensors_that_share_memory_still_load(tmp_path: Path) -> None:
    """Bounds are for large files that are not; a few zeros that are one do not matter."""
    state = small().state_dict() | {"0.bias": torch.zeros(()).expand(64)}
    path = saved(tmp_path / "a.pt", state)
    loaded = load_model(path, arch="hostile.test_weights:small")
    assert torch.equal(loaded.model.get_parameter("0.bias"), torch.zeros(64))


def small() -> nn.Module:
    """A factory's network."""
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.Linear(64, 2))


@pytest.mark.parametrize(
    ("file", "told", "pattern"),
    [
        ("config.json", {"model_args": 3}, "wrong ones"),
        (
            "config.json",
            {"pretrained_cfg": {"input_size": [3, 8, 8], "mean": 1, "std": 1}},
            "wrong",
        ),
    ],
)
def test_configurations_of_wrong_values(
    file: str, told: dict[str, object], pattern: str, tmp_path: Path, refused: Refused
) -> None:
    cfg = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    whole = {"architecture": "resnet18", "pretrained_cfg": cfg}
    (tmp_path / file).write_text(json.dumps(whole | told))
    saved(tmp_path / "pytorch_model.bin", {"fc.weight": torch.ones(2, 512)})
    with refused(pattern):
        load_model(tmp_path)
