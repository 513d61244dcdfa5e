"""Which images are audited, and those that cannot be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from auditing.samples import NAMES, loaded_model, model_file, read_rows, settings, write_index

from diffsal.auditing.run import audit
from diffsal.data.index import Index, read_index
from diffsal.models.checkpoints import load_model


def test_the_test_split_is_audited_and_the_training_split_makes_the_vector(tmp_path):
    source = write_index(tmp_path / "data", (12, 12), maps=False, splits=("train", "test"))
    index = read_index(source, classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings())
    assert result["data"]["split"] == "test"
    assert result["data"]["audited"] == result["data"]["available"] == 12
    table = read_rows(tmp_path / "per-image.csv")
    tested = {str(sample.path) for sample in index.split("test")}
    assert set(table["path"]) == tested
    assert not np.isnan(table["target_after"]).any()
    missing = {one["what"] for one in result["left_out"]}
    assert missing == {"localisation against human maps"}
    assert "the index names no human maps" in (tmp_path / "report.html").read_text("utf-8")


def test_limit_draws_by_the_seed_and_keeps_the_order(tmp_path):
    index = read_index(write_index(tmp_path / "data", (12, 12), maps=False), classes=NAMES[:2])
    loaded, paths = loaded_model(tmp_path), []
    for seed in (0, 1):
        audit(index, loaded, tmp_path, settings(limit=6, seed=seed), overwrite=True)
        paths.append(read_rows(tmp_path / "per-image.csv")["path"])
    order = [str(sample.path) for sample in index.samples]
    assert paths[0] != paths[1]
    for drawn in paths:
        assert drawn == sorted(set(drawn), key=order.index)
        assert len(drawn) == 6


def test_images_that_cannot_be_read_are_told_and_left_out(tmp_path):
    source = write_index(tmp_path / "data", (4, 4), maps=False)
    (tmp_path / "data" / "8-2.png").write_bytes(b"no image")
    index = read_index(source, classes=NAMES[:2])
    result = audit(index, loaded_model(tmp_path), tmp_path, settings())
    assert [Path(one["path"]).name for one in result["failed"]] == ["8-2.png"]
    assert (result["data"]["audited"], result["data"]["failed"]) == (7, 1)
    assert "1 more could not be measured" in result["summary"][1]
    assert "8-2.png" in (tmp_path / "report.html").read_text("utf-8")


def test_no_images(tmp_path, refused):
    with refused("holds no images"):
        audit(Index(tmp_path, NAMES[:2], ()), loaded_model(tmp_path), tmp_path, settings())


def test_classes_that_are_not_the_models(tmp_path, refused):
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=NAMES[:2])
    with refused("2 class names for a model of 50 classes"):
        audit(index, loaded_model(tmp_path, outputs=50), tmp_path, settings())


@pytest.mark.parametrize("who", ["weights", "reference"])
def test_classes_in_another_order_than_a_models(who, tmp_path, refused):
    index = read_index(write_index(tmp_path / "data", (2, 2), maps=False), classes=("8", "3"))
    loaded = loaded_model(tmp_path)
    reference = load_model(model_file(tmp_path / "reference.pt", seed=1))
    if who == "reference":
        loaded = replace(loaded, classes=("8", "3"))
    with refused(
        rf"index\.csv: its classes are 8,3, those of .*{who}\.pt are 3,8: .* --classes 3,8"
    ):
        audit(index, loaded, tmp_path / "audit", settings(), reference)
