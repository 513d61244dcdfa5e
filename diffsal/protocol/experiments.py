"""What a job does: train a model, or attack one, and measure it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from diffsal.auditing.report import data_uri
from diffsal.data.datasets import DecodedImages, ImageDataset
from diffsal.data.index import Index
from diffsal.fooling.attack import fool
from diffsal.maps.target_layers import get_target_layer
from diffsal.models.checkpoints import load_model, save_checkpoint
from diffsal.protocol.configuration import Job, Protocol
from diffsal.protocol.measures import maps_of, measured_columns, occluded_columns, typical_samples
from diffsal.system.devices import choose_device
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import fit
from diffsal.training.run import new_model, training_set

ATTACKS: dict[str, dict[str, Any]] = {
    "passively fooled": {"method": "trained", "objective": "true"},
    "head-shifted": {"method": "head-shift"},
    "adaptively fooled": {"method": "trained", "objective": "difference"},
}
"""The models of experiment (a) beside the honest one, and what makes them of it: arguments of
:func:`diffsal.fooling.attack.fool`."""


def train_job(
    _protocol: Protocol, job: Job, index: Index, config: TrainingConfig, read: DecodedImages
) -> dict[str, Any]:
    """A method's model on the samples that were held out."""
    model, description, epochs = _trained(index, config, read)
    layer = get_target_layer(model, description["target_layer"])
    test = ImageDataset(index.split("test"), description["preprocessing"], read=read)
    return {
        "epochs": epochs,
        "models": {job.method: measured_columns(model, layer, test, config)},
    }


def _trained(
    index: Index, config: TrainingConfig, read: DecodedImages
) -> tuple[nn.Module, dict[str, Any], list[dict[str, float]]]:
    model, description = new_model(index, config)
    model = model.to(choose_device(config.device))
    training = training_set(index, config, description["preprocessing"], read)
    layer = get_target_layer(model, description["target_layer"])
    records = fit(
        model, config.criterion(), training, None, config, target_layer=layer, progress=False
    )
    return model, description, list(records)


def fool_job(
    protocol: Protocol, job: Job, index: Index, config: TrainingConfig, read: DecodedImages
) -> dict[str, Any]:
    """An honest model and the attacks on it, on the samples that were held out."""
    assert protocol.fooling is not None
    model, description, epochs = _trained(index, config, read)
    test = ImageDataset(index.split("test"), description["preprocessing"], read=read)
    attack = replace(protocol.fooling, seed=job.seed, device=config.device, workers=config.workers)
    models: dict[str, dict[str, Any]] = {}
    pictured: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        honest = Path(folder, "honest.pt")
        save_checkpoint(honest, model, **description)
        for name in ("honest", *ATTACKS):
            path = honest
            if name in ATTACKS:
                path = Path(folder, "fooled.pt")
                fool(index, load_model(honest), path, config=attack, read=read, **ATTACKS[name])
            loaded = load_model(path)
            model, layer = loaded.model.to(choose_device(config.device)), loaded.target_layer
            models[name] = measured_columns(model, layer, test, config, with_edges=True)
            models[name] |= occluded_columns(model, layer, test)
            pictured = pictured or typical_samples(models["honest"]["logits"], index)
            models[name]["maps"] = maps_of(model, layer, test, pictured)
    pictures = [data_uri(read(test.samples[one], test.preprocessing)[0]) for one in pictured]
    return {"epochs": epochs, "models": models, "pictured": pictured, "pictures": pictures}
