"""Maps in a file, and back."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffsal import SalienceMaps, explain


@pytest.fixture
def maps():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2), nn.Sigmoid()
    return explain(nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(3, 3, 8, 8), [0, 1, 1])


def test_what_is_loaded_is_what_was_saved(maps, tmp_path):
    maps.save(tmp_path / "maps")
    again = SalienceMaps.load(tmp_path / "maps.npz")
    for field in fields(maps):
        saved, loaded = getattr(maps, field.name), getattr(again, field.name)
        if isinstance(saved, torch.Tensor):
            assert saved.dtype == loaded.dtype
            assert torch.equal(saved, loaded)
        else:
            assert saved == loaded
    assert again.squash == "sigmoid"


def test_maps_in_a_graph_are_saved_as_they_are(maps, tmp_path):
    maps.true.requires_grad_()
    maps.save(tmp_path / "maps.npz")
    assert torch.equal(SalienceMaps.load(tmp_path / "maps.npz").true, maps.true)
    assert maps.numpy()["difference"].shape == (3, 6, 6)


def test_other_files_are_one_line(tmp_path, refused):
    with refused("no such file"):
        SalienceMaps.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", true=np.zeros(3))
    with refused("holds no maps"):
        SalienceMaps.load(tmp_path / "other.npz")
    Path(tmp_path, "text.npz").write_text("no archive")
    with refused("cannot be read as maps"):
        SalienceMaps.load(tmp_path / "text.npz")
    np.savez(tmp_path / "pickle.npz", format=np.array([{}], object))
    with refused("cannot be read as maps"):
        SalienceMaps.load(tmp_path / "pickle.npz")


def test_resized_maps_keep_their_values(maps):
    found = maps.resized((12, 24))
    assert found.difference.shape == (3, 12, 24)
    torch.testing.assert_close(found.difference, found.true - found.false)
    assert found.true.max() <= maps.true.max()
    np.testing.assert_array_equal(maps.numpy()["margin"], maps.margin.numpy())
