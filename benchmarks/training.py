"""What a training step costs: cross-entropy, Eq. 5 on captured maps, and the CYBORG way.

    python benchmarks/training.py                       # DenseNet-121, batch 8, CPU
    python benchmarks/training.py --device cuda --batch 64 256 --dtype float32 bfloat16

``cyborg`` is the published CYBORG training step, rebuilt from its description: the backbone runs a
second time to get its features, and a Python loop over the batch makes each sample's map from the
predicted class. What it computes differs from Eq. 2 in that; here it is timed only. Its human maps
are brought to the size of the maps beforehand, which its data loader does.

Variants take turns within each round, so that what else the machine does hits all alike; a ratio is
the median over rounds of the two times in one round. Memory is the peak of a step: on CUDA what
torch had allocated; on the CPU the process's resident memory in a process of its own, less what it
held before its first step.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

from diffsal import capture
from diffsal.training.losses import ContrastSalienceLoss

CRITERION = ContrastSalienceLoss()


def cross_entropy(trainer: "Trainer") -> Tensor:
    with trainer.autocast():
        logits = trainer.model(trainer.images)
    return F.cross_entropy(logits.float(), trainer.labels)


def contrast(trainer: "Trainer") -> Tensor:
    with capture(trainer.model) as captured:
        with trainer.autocast():
            logits = trainer.model(trainer.images)
        maps = captured.maps(logits, true=trainer.labels)
    loss: Tensor = CRITERION(maps, trainer.human)
    return loss


def cyborg(trainer: "Trainer") -> Tensor:
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

    def __init__(self, options: argparse.Namespace, batch: int, dtype: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, dtype)
        self.model = models.get_model(options.arch, num_classes=2).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.002, momentum=0.9)
        self.images = torch.randn(batch, 3, options.size, options.size, device=self.device)
        self.labels = torch.randint(2, (batch,), device=self.device)
        self.human = torch.rand(batch, options.size, options.size, device=self.device)
        small = F.interpolate(self.human[:, None], scale_factor=1 / 32, mode="bilinear")[:, 0]
        low, high = small.amin((1, 2), keepdim=True), small.amax((1, 2), keepdim=True)
        self.small = (small - low) / (high - low)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, variant: str) -> None:
        self.optimizer.zero_grad()
        VARIANTS[variant](self).backward()
        self.optimizer.step()

    def seconds(self, variant: str, steps: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(variant)
        self.synchronize()
        return (time.perf_counter() - start) / steps

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def cuda_peak(self, variant: str) -> int:
        """Bytes allocated at the most during one step."""
        self.optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step(variant)
        return torch.cuda.max_memory_allocated(self.device)


def resident_peak(options: argparse.Namespace, batch: int, dtype: str, variant: str) -> int:
    """Bytes that two steps add to this process's resident memory at the most."""
    torch.set_num_threads(options.threads)
    trainer = Trainer(options, batch, dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.seconds(variant, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def peaks(options: argparse.Namespace, batch: int, dtype: str) -> dict[str, int]:
    if torch.device(options.device).type == "cuda":
        trainer = Trainer(options, batch, dtype)
        return {variant: max(trainer.cuda_peak(variant) for _ in range(2)) for variant in VARIANTS}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {
            variant: pool.apply(resident_peak, (options, batch, dtype, variant))
            for variant in VARIANTS
        }


def times(options: argparse.Namespace, batch: int, dtype: str) -> dict[str, list[float]]:
    """Seconds a step, by variant and round; each round begins with another variant."""
    trainer = Trainer(options, batch, dtype)
    order = list(VARIANTS)
    for variant in order:
        trainer.seconds(variant, options.warmup)
    rounds: dict[str, list[float]] = {variant: [] for variant in order}
    for _ in range(options.rounds):
        for variant in order:
            rounds[variant].append(trainer.seconds(variant, options.steps))
        order = [*order[1:], order[0]]
    return rounds


def measure(options: argparse.Namespace, batch: int, dtype: str) -> dict[str, Any]:
    memory = peaks(options, batch, dtype)
    seconds = times(options, batch, dtype)

    def ratio(one: str, other: str) -> dict[str, float]:
        pairs = zip(seconds[one], seconds[other], strict=True)
        return {
            "time": statistics.median(a / b for a, b in pairs),
            "memory": memory[one] / memory[other],
        }

    return {
        "arch": options.arch,
        "device": options.device,
        "batch": batch,
        "size": options.size,
        "dtype": dtype,
        "rounds": options.rounds,
        "seconds": {variant: statistics.median(values) for variant, values in seconds.items()},
        "peak_bytes": memory,
        "contrast / cross-entropy": ratio("contrast", "cross-entropy"),
        "cyborg / contrast": ratio("cyborg", "contrast"),
    }


def table(result: dict[str, Any]) -> str:
    head = "{arch}, {size} px, batch {batch}, {dtype}, {device}, {rounds} rounds".format_map(result)
    lines = [head, f"{'':26}{'time':>10}{'peak':>12}"]
    for variant in VARIANTS:
        seconds, peak = result["seconds"][variant], result["peak_bytes"][variant]
        lines.append(f"{variant:26}{seconds * 1e3:>7.1f} ms{peak / 2**20:>8.0f} MiB")
    for name in ("contrast / cross-entropy", "cyborg / contrast"):
        lines.append(f"{name:26}{result[name]['time']:>10.3f}{result[name]['memory']:>12.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--arch", default="densenet121", help="a torchvision DenseNet")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps of a variant in each round")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each variant before")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--json", action="store_true", help="one JSON line per setting instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for batch in options.batch:
        for dtype in options.dtype:
            result = measure(options, batch, dtype)
            print(json.dumps(result) if options.json else table(result) + "\n", flush=True)


if __name__ == "__main__":
    main()
