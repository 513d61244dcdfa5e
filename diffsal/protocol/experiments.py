"""What a job does: train a model, perhaps attack it, and measure what came of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from diffsal.auditing.report import data_uri
from diffsal.data.datasets import DecodedImages, ImageDataset
from diffsal.data.index import Index
from diffsal.fooling.run import fool
from diffsal.maps.target_layers import get_target_layer
from diffsal.models.checkpoints import load_model, save_checkpoint
from diffsal.protocol.configuration import Job
from diffsal.protocol.measures import (
    composite_columns,
    maps_of,
    measured_columns,
    occluded_columns,
    typical_samples,
)
from diffsal.protocol.scores import CONTROL, HONEST
from diffsal.system.devices import choose_device
from diffsal.system.files import scratch_folder
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import fit
from diffsal.training.run import new_model, training_set

ATTACKS: dict[str, dict[str, Any]] = {
    CONTROL: {"method": "trained", "objective": "control"},
    "passively fooled": {"method": "trained", "objective": "true"},
    "head-shifted": {"method": "head-shift"},
    "adaptively fooled": {"method": "trained", "objective": "difference"},
    "knows composites": {"method": "trained", "objective": "composite"},
}
"""The models of experiment (a) beside the honest one, and what makes them of it: arguments of
:func:`diffsal.fooling.run.fool`. The first is no attack but their control: the honest model,
trained on for as long with cross-entropy alone."""


def train_job(
    job: Job, index: Index, config: TrainingConfig, read: DecodedImages
) -> dict[str, Any]:
    """Train a method's model, and measure it on the samples that were held out.

    Args:
        job: whose results these are.
        index: with the splits ``train`` and ``test``.
        config: how the model is trained.
        read: what has the samples' pixels.

    Returns:
        What the job's file holds of its results, see docs/protocol.md.

    Example:
        Four grey images to train on, as many to test:

        >>> import numpy as np
        >>> from diffsal.data.index import Sample
        >>> splits = ["train"] * 4 + ["test"] * 4
        >>> samples = (Sample(Path(str(n)), n % 2, split=name) for n, name in enumerate(splits))
        >>> index = Index(Path("index.csv"), ("intact", "worn"), tuple(samples))
        >>> read = lambda sample, _: (np.full((32, 32, 3), int(sample.path.name), np.uint8), None)
        >>> arguments = {"growth_rate": 2, "block_config": [1, 1], "num_init_features": 2}
        >>> config = TrainingConfig(
        ...     "cross-entropy", architecture="torchvision:DenseNet", arguments=arguments,
        ...     weights="none", size=32, epochs=1, batch_size=4, device="cpu",
        ... )
        >>> found = train_job(Job("grey", "cross-entropy", "", 0), index, config, read)
        >>> np.shape(found["models"]["cross-entropy"]["logits"])
        (4, 2)
    """
    model, description, epochs = _trained(index, config, read)
    layer = get_target_layer(model, description["target_layer"])
    test = ImageDataset(index.split("test"), description["preprocessing"], read=read)
    measured = measured_columns(model, layer, test, config.batch_size)
    return {"epochs": epochs, "models": {job.method: measured}}


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
    attack: TrainingConfig, index: Index, config: TrainingConfig, read: DecodedImages, folder: Path
) -> dict[str, Any]:
    """Train an honest model, fool it, and measure all on the samples that were held out.

    Args:
        attack: how the attacks are trained; seed and machine are those of ``config``.
        index: with the splits ``train`` and ``test``.
        config: how the honest model is trained.
        read: what has the samples' pixels.
        folder: where models lie on the way.

    Returns:
        As :func:`train_job`, and what Figure 1 shows.

    Example:
        >>> [HONEST, *ATTACKS][:3]  # whose results there are, among others
        ['honest', 'fine-tuned', 'passively fooled']
    """
    model, description, epochs = _trained(index, config, read)
    test = ImageDataset(index.split("test"), description["preprocessing"], read=read)
    attack = replace(attack, seed=config.seed, device=config.device, workers=config.workers)
    models: dict[str, dict[str, Any]] = {}
    pictured: list[int] = []
    with scratch_folder(folder) as scratch:
        honest = scratch / "honest.pt"
        save_checkpoint(honest, model, **description)
        for name in (HONEST, *ATTACKS):
            path = honest
            if name in ATTACKS:
                path = scratch / "fooled.pt"
                fool(index, load_model(honest), path, config=attack, read=read, **ATTACKS[name])
            loaded = load_model(path)
            model, layer = loaded.model.to(choose_device(config.device)), loaded.target_layer
            models[name] = measured_columns(model, layer, test, config.batch_size, with_edges=True)
            models[name] |= occluded_columns(model, layer, test)
            skills = composite_columns(model, layer, test, config.batch_size)
            models[name]["composite_skill"] = skills
            pictured = pictured or typical_samples(models[HONEST]["logits"], index)
            models[name]["maps"] = maps_of(model, layer, test, pictured)
    pictures = [data_uri(read(test.samples[one], test.preprocessing)[0]) for one in pictured]
    return {"epochs": epochs, "models": models, "pictured": pictured, "pictures": pictures}
