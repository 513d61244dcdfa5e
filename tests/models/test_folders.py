"""Folders as Hugging Face's hub has them."""

import hashlib
import json

import numpy as np
import pytest
import torch

from diffsal.data.preprocessing import Preprocessing
from diffsal.models.checkpoints import load_model, save_checkpoint

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
NAMES = {"id2label": {0: "ill", 1: "well"}, "label2id": {"ill": 0, "well": 1}}


def same(model, loaded):
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(model.eval()(images).logits, loaded.model(images).logits)


@pytest.fixture
def vit(tmp_path):
    """A small ViT, saved with its preprocessing in tmp_path."""
    config = transformers.ViTConfig(**VIT, intermediate_size=32, patch_size=8, **NAMES)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    told = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    return model


def test_vit(vit, tmp_path, rejects):
    loaded = load_model(tmp_path)
    assert same(vit, loaded)
    assert loaded.architecture == "transformers:vit"
    assert loaded.classes == ("ill", "well")
    assert loaded.preprocessing == Preprocessing((32, 32), mean=(0.5,), std=(0.25,))
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert loaded.sha256 == hashlib.sha256(weights).hexdigest()
    assert loaded.notes == ()
    made_by = {"architecture": loaded.architecture, "arguments": loaded.arguments}
    save_checkpoint(tmp_path / "own.pt", loaded.model, **made_by)
    assert same(vit, load_model(tmp_path / "own.pt"))
    (tmp_path / "model.safetensors").unlink()
    rejects(tmp_path, "holds neither model.safetensors nor pytorch_model.bin")


def test_resnet_without_names(tmp_path):
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**shape, num_labels=2)
    )
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert same(model, loaded)
    assert loaded.classes is None
    assert len(loaded.notes) == 2


def test_headless_and_foreign_code_are_refused(vit, tmp_path, rejects):
    vit.vit.save_pretrained(tmp_path)
    rejects(tmp_path, r"lacks weights \(classifier\.bias, classifier\.weight\)")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rejects(tmp_path, "is no image classifier of transformers")


def test_timm_folder(tmp_path):
    model = timm.create_model("resnet18", num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    cfg = {"crop_pct": 0.875, "input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path)
    assert loaded.architecture == "timm:resnet18"
    assert loaded.preprocessing == Preprocessing((64, 64), "crop", mean=(0.5,), std=(0.25,))
    assert loaded.notes == ("the file does not name the classes (--classes)",)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), loaded.model(images))


PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 64, "width": 48}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 224}, "resample": 2},
    "MobileNetV2ImageProcessor": {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_the_processors(name, vit, tmp_path):
    processor = getattr(transformers, name)(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    expected = torch.as_tensor(processor(pixels, return_tensors="pt").pixel_values[0])
    loaded = load_model(tmp_path)
    assert (loaded.preprocessing(pixels) - expected).abs().max() < 0.02  # one of 256 levels
    assert loaded.notes == ()


def test_preprocessing_that_is_not_offered_is_told(vit, tmp_path):
    transformers.DeiTImageProcessor().save_pretrained(tmp_path)  # squashed, then cropped
    loaded = load_model(tmp_path)
    assert loaded.preprocessing.size == (224, 224)
    assert "squashed (--size, --resize)" in loaded.notes[0]


def test_other_folders_are_refused_by_what_they_are(tmp_path, rejects):
    rejects(tmp_path, "is a folder without a config.json: name the file of weights in it")
    (tmp_path / "open_clip_config.json").write_text("{}")
    rejects(tmp_path, "is open_clip's, .* has no classes: put a linear layer on its visual tower")
