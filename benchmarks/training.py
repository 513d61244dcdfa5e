"""What training costs: a step with Eq. 5 beside cross-entropy's, and a job beside its bare steps.

    python benchmarks/training.py                       # DenseNet-121, batch 8, CPU
    python benchmarks/training.py --device cuda --batch 64 256 --dtype float32 bfloat16

``cyborg`` is the published CYBORG training step, rebuilt from its description: the backbone runs a
second time to get its features, and a Python loop over the batch makes each sample's map from the
predicted class. What it computes differs from Eq. 2 in that; here it is timed only. Its human maps
are brought to the size of the maps beforehand, which its data loader does.

Memory is the peak of a step: on CUDA what torch had allocated; on the CPU the process's resident
memory in a process of its own, less what it held before its first step. A job is an epoch of
`diffsal.training.loop.fit`: images of bytes, flips, two workers, loss, records; its bare steps are
of one batch that lies on the device.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import Row, clock_of, in_turns, printed, ratios, row
from torch import Tensor
from torchvision import models

from diffsal import capture
from diffsal.data.datasets import ImageDataset, Pixels
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.training.config import TrainingConfig
from diffsal.training.loop import fit
from diffsal.training.losses import ContrastSalienceLoss

CRITERION = ContrastSalienceLoss()
SIZE = 224
ARCHITECTURE = "densenet121"
BATCHES = 8  # of an epoch


@dataclass(frozen=True)
class Setting:
    """What is trained, and where."""

    device: torch.device
    batch: int
    dtype: str

    def told(self) -> dict[str, Any]:
        """For the rows."""
        told = {"model": ARCHITECTURE, "batch": self.batch, "pixels": SIZE}
        return {**told, "dtype": self.dtype}


def cross_entropy(trainer: "Trainer") -> Tensor:
    """The step that all are held against."""
    with trainer.autocast():
        logits = trainer.model(trainer.images)
    return F.cross_entropy(logits.float(), trainer.labels)


def contrast(trainer: "Trainer") -> Tensor:
    """Eq. 5 on captured maps."""
    with capture(trainer.model) as captured:
        with trainer.autocast():
            logits = trainer.model(trainer.images)
        maps = captured.maps(logits, true=trainer.labels)
    loss: Tensor = CRITERION(maps, trainer.human)
    return loss


def cyborg(trainer: "Trainer") -> Tensor:
    """The published way."""
    model: Any = trainer.model
    with trainer.autocast():
        logits = model(trainer.images)
        features = model.features(trainer.images)
    weight = model.classifier.weight
    errors = []
    for sample, predicted in enumerate(logits.argmax(1)):
        cam = (weight[predicted] @ features[sample].float().flatten(1)).view(features.shape[2:])
        cam = cam - cam.min()
        errors.append(F.mse_loss(cam / cam.max(), trainer.small[sample]))
    loss = F.cross_entropy(logits.float(), trainer.labels)
    return 0.5 * loss + 0.5 * torch.stack(errors).mean()


VARIANTS: dict[str, Callable[["Trainer"], Tensor]] = {
    "cross-entropy": cross_entropy,
    "contrast": contrast,
    "cyborg": cyborg,
}


class Trainer:
    """A model, its optimizer and one batch of noise, on which any variant takes steps."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        device, batch = setting.device, setting.batch
        self.device, self.dtype = device, getattr(torch, setting.dtype)
        self.model = models.get_model(ARCHITECTURE, num_classes=2).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.002, momentum=0.9)
        self.images = torch.randn(batch, 3, SIZE, SIZE, device=device)
        self.labels = torch.randint(2, (batch,), device=device)
        self.human = torch.rand(batch, SIZE, SIZE, device=device)
        small = F.interpolate(self.human[:, None], scale_factor=1 / 32, mode="bilinear")[:, 0]
        low, high = small.amin((1, 2), keepdim=True), small.amax((1, 2), keepdim=True)
        self.small = (small - low) / (high - low)

    def autocast(self) -> AbstractContextManager[Any]:
        """Half precision, where the setting is so."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, variant: str) -> None:
        """One step of a variant."""
        self.optimizer.zero_grad()
        VARIANTS[variant](self).backward()
        self.optimizer.step()


def resident_peak(setting: Setting, threads: int, variant: str) -> int:
    """Bytes that two steps add to this process's resident memory at the most."""
    torch.set_num_threads(threads)
    trainer = Trainer(setting)
    before = _high_water()
    for _ in range(2):
        trainer.step(variant)
    return _high_water() - before


def _high_water() -> int:
    """Linux's: getrusage would count what the process was forked from."""
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def cuda_peak(trainer: Trainer, variant: str) -> int:
    """Bytes allocated at the most during one step."""
    trainer.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats(trainer.device)
    trainer.step(variant)
    return torch.cuda.max_memory_allocated(trainer.device)


def peaks(setting: Setting) -> dict[str, int]:
    """Bytes, by variant."""
    if setting.device.type == "cuda":
        trainer = Trainer(setting)
        return {name: max(cuda_peak(trainer, name) for _ in range(2)) for name in VARIANTS}
    threads = torch.get_num_threads()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(resident_peak, (setting, threads, name)) for name in VARIANTS}


def steps(setting: Setting, rounds: int) -> list[Row]:
    """Time and memory of each variant's step."""
    trainer = Trainer(setting)
    turns = {name: partial(trainer.step, name) for name in VARIANTS}
    calls = 5 if setting.device.type == "cuda" else 1
    clock = clock_of(setting.device)
    seconds = in_turns(turns, rounds, setting.device, calls=calls, clock=clock)
    del trainer, turns
    memory = peaks(setting)
    rows = ratios("training step", setting.told(), seconds)
    for one in rows:
        one["memory"] = memory[one["name"]] / memory[one["against"]]
    of_contrast = [a / b for a, b in zip(seconds["cyborg"], seconds["contrast"], strict=True)]
    beside = row("training step", "cyborg beside contrast", setting.told(), of_contrast)
    beside["memory"] = memory["cyborg"] / memory["contrast"]
    return [*rows, beside]


def job(setting: Setting, rounds: int) -> list[Row]:
    """Images a second of an epoch of `fit`, as a share of those of its bare steps."""
    noise = np.random.default_rng(0).integers(0, 256, (setting.batch, SIZE, SIZE, 3), np.uint8)
    human = noise[..., 0].astype(np.float32) / 255

    def read(sample: Sample, _: Preprocessing) -> Pixels:
        number = int(sample.path.name) % setting.batch
        return noise[number], human[number]

    config = TrainingConfig(
        "contrast",
        architecture=f"torchvision:{ARCHITECTURE}",
        weights="none",
        size=SIZE,
        epochs=rounds + 1,
        batch_size=setting.batch,
        augment=("horizontal-flip", "vertical-flip"),
        amp="none" if setting.dtype == "float32" else "bf16",
        workers=2,
        device=str(setting.device),
    )
    samples = [Sample(Path(str(n)), n % 2) for n in range(BATCHES * setting.batch)]
    preprocessing = config.preprocessing()
    dataset = ImageDataset(samples, preprocessing, config.augmentation(), read)
    trainer = Trainer(setting)
    if config.amp != "none" and setting.device.type == "cuda":
        trainer.model.to(memory_format=torch.channels_last)
        trainer.images = trainer.images.to(memory_format=torch.channels_last)
    records = fit(trainer.model, CRITERION, dataset, None, config, progress=False)
    next(records)  # which starts the workers
    shares = []
    for record in records:
        bare = in_turns({"": partial(trainer.step, "contrast")}, BATCHES, setting.device)[""]
        shares.append(BATCHES * median(bare) / record["seconds"])
    name = "images a second of an epoch, of its bare steps"
    return [row("training job", name, setting.told() | {"workers": 2}, shares)]


def measure(
    device: torch.device, batches: Sequence[int], dtypes: Sequence[str], rounds: int
) -> Iterator[list[Row]]:
    """The rows of each setting, and a job in the first."""
    settings = [Setting(device, batch, dtype) for batch in batches for dtype in dtypes]
    yield job(settings[0], min(rounds, 3))
    for setting in settings:
        yield steps(setting, rounds)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    for rows in measure(device, options.batch, options.dtype, options.rounds):
        print(printed(rows), flush=True)


if __name__ == "__main__":
    main()
