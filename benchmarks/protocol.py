"""What a protocol's grid gets out of a device, against the bare training step.

    python benchmarks/protocol.py                                  # ResNet-18, 96 px, CPU
    python benchmarks/protocol.py --device cuda --jobs 10 --arch timm:tf_efficientnet_lite0 \\
        --size 128 --batch 32 --amp bf16

``bare`` takes steps on one batch that lies on the device: forward pass, maps, loss, backward pass,
SGD. It reads no image, moves none, augments none. ``grid`` is ``diffsal protocol run`` as users
call it, on a data set of noise that is written for the purpose, several jobs at once. "Training"
counts the epochs of jobs that run side by side, from the second on; "whole" divides all
images trained on by the time from start to end: decoding, starting processes and testing included.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Row, printed, row

from diffsal import capture
from diffsal.models.architectures import build_model
from diffsal.protocol.configuration import read_protocol
from diffsal.protocol.jobs import run
from diffsal.protocol.results import read_results
from diffsal.training.losses import LOSSES

AMP = {"none": None, "bf16": torch.bfloat16}


def bare(options: argparse.Namespace, barrier: Barrier | None) -> float:
    """Images per second of one process."""
    torch.set_num_threads(options.threads)
    device, amp = torch.device(options.device), AMP[options.amp]
    is_half = amp is not None and device.type == "cuda"
    layout = torch.channels_last if is_half else torch.preserve_format
    model = build_model(options.arch, {"num_classes": 2}).to(device).train()
    model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images = images.to(memory_format=layout)
    labels = torch.arange(options.batch, device=device) % 2
    human = torch.rand(options.batch, options.size, options.size, device=device)
    criterion = LOSSES[options.method]()

    def step() -> None:
        with capture(model) as captured:
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model(images)
            loss = criterion(captured.maps(logits, true=labels), human)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def several(count: int) -> None:
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    several(5)
    if barrier is not None:
        barrier.wait()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        several(5)
        steps += 5
    return float(steps * options.batch / (time.perf_counter() - started))


def bare_at_once(options: argparse.Namespace, jobs: int) -> float:
    """Images per second of several processes together."""
    context = get_context("spawn")
    with context.Manager() as manager, context.Pool(jobs) as pool:
        barrier = manager.Barrier(jobs)
        rates: list[float] = pool.starmap(bare, [(options, barrier)] * jobs)
        return sum(rates)


def write_noise(folder: Path, images: int, size: int) -> None:
    """An index of noise, with maps, a fifth of it for testing."""
    generator = np.random.default_rng(0)
    with (folder / "index.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "map", "split"])
        for number in range(images):
            for name, shape in (("image", (size, size, 3)), ("map", (size, size))):
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}{number}.png")
            split = "test" if number % 10 < 2 else "train"
            writer.writerow([f"image{number}.png", number % 2, f"map{number}.png", split])


def grid(options: argparse.Namespace) -> tuple[float, float]:
    """Images per second: of training side by side, and of the whole run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder, options.images, options.size)
        (folder / "grid.toml").write_text(
            f"seeds = {options.jobs}\n[training]\narchitecture = {json.dumps(options.arch)}\n"
            f'weights = "none"\nsize = {options.size}\nepochs = {options.epochs}\n'
            f'batch_size = {options.batch}\nlr = 1e-3\namp = "{options.amp}"\n'
            'augment = ["horizontal-flip", "vertical-flip"]\n'
            f'[tasks.noise]\nindex = "index.csv"\nleave_out = false\n[methods.{options.method}]\n',
            encoding="utf-8",
        )
        protocol = read_protocol(folder / "grid.toml")
        started = time.perf_counter()
        with redirect_stderr(StringIO()):
            outcome = run(protocol, folder / "out", jobs=options.jobs, device=options.device)
        if outcome.failed:
            raise RuntimeError(outcome.failed[0][1])
        seconds = time.perf_counter() - started
        jobs = read_results(folder / "out").jobs
    rates = [
        job["trained_on"] / statistics.median(epoch["seconds"] for epoch in job["epochs"][1:])
        for job in jobs
    ]
    return sum(rates), sum(job["trained_on"] * options.epochs for job in jobs) / seconds


def measure(options: argparse.Namespace) -> list[Row]:
    """Images per second of each way, and as a share of the bare steps at once."""
    alone, at_once = bare_at_once(options, 1), bare_at_once(options, options.jobs)
    training, whole = grid(options)
    rates = {
        "bare steps, one process": alone,
        "bare steps, all at once": at_once,
        "grid, training": training,
        "grid, whole": whole,
    }
    told = ("arch", "method", "size", "batch", "amp", "jobs", "images", "epochs")
    setting = {name: getattr(options, name) for name in told}
    return [
        row("grid", name, setting, [rate / at_once]) | {"images_per_second": rate}
        for name, rate in rates.items()
    ]


def main() -> None:
    """Print the rows."""
    print(printed(measure(options())))


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for; ``None``: on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--method", default="contrast", choices=list(LOSSES))
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--amp", default="none", choices=list(AMP))
    parser.add_argument("--images", type=int, default=500, help="of the grid's data set")
    parser.add_argument("--epochs", type=int, default=3, help="of the grid's jobs")
    parser.add_argument("--seconds", type=float, default=5.0, help="of bare steps")
    parser.add_argument("--threads", type=int, default=1, help="of a process, on the CPU")
    chosen = parser.parse_args(arguments)
    if chosen.epochs < 2:
        parser.error("--epochs: at least 2, since the first one is not counted")
    return chosen


if __name__ == "__main__":
    main()
