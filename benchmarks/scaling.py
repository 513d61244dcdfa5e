"""Where one process ends: `explain` and `audit` on two, and memory on ten times the images.

    python benchmarks/scaling.py [--images 1000]

A ResNet-18 on images of 64 x 64 pixels, without figures, one thread a process. Efficiency is the
time of one process over twice that of two, starting included.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import Row, printed, row
from torchvision.models import resnet18

from diffsal.data.preprocessing import Preprocessing
from diffsal.models.checkpoints import save_checkpoint

SIZE = 64
PEAK = """
import runpy, sys
from pathlib import Path
try:
    runpy.run_module("diffsal", run_name="__main__")
finally:
    print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
EXPLAIN = (
    *("explain", "images", "--recursive", "--model", "weights.pt"),
    *("--no-figure", "--overwrite"),
)
AUDITED = 64
AUDIT = (
    *("audit", "images", "--model", "weights.pt", "--limit", str(AUDITED)),
    *("--out", "audit", "--overwrite"),
)
CLASSES = ("intact", "worn")


def write_images(folder: Path, images: int) -> None:
    """Noise of two classes, and a model of it."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(images):
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(
            folder / CLASSES[number % 2] / f"{number}.png", compress_level=1
        )
    torch.manual_seed(0)
    save_checkpoint(
        folder.parent / "weights.pt",
        resnet18(num_classes=2),
        architecture="torchvision:resnet18",
        arguments={"num_classes": 2},
        classes=CLASSES,
        preprocessing=Preprocessing(size=(SIZE, SIZE)),
    )


def efficiency(folder: Path, command: Sequence[str]) -> float:
    """Of two processes."""
    return seconds(folder, 1, command) / (2 * seconds(folder, 2, command))


def seconds(folder: Path, processes: int, command: Sequence[str]) -> float:
    """Of a whole run."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = time.perf_counter()
    _run(folder, [*(launch if processes > 1 else []), "-m", "diffsal", *command])
    return time.perf_counter() - start


def peak(folder: Path) -> float:
    """Megabytes of resident memory, at the most."""
    told = _run(folder, ["-c", PEAK, *EXPLAIN])
    return int(told.split()[-1]) / 1024


def _run(folder: Path, arguments: Sequence[str]) -> str:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout


def measure(images: int, rounds: int) -> Iterator[list[Row]]:
    """The efficiency of two processes, and the memory for ten times the images."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", images)
        for title, command, count in (("explain", EXPLAIN, images), ("audit", AUDIT, AUDITED)):
            shares = [efficiency(folder, command) for _ in range(rounds)]
            name = f"{title} on two processes, efficiency"
            yield [row("scaling", name, {"images": count}, shares)]
        small = peak(folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", 10 * images)
        large = peak(folder)
    yield [
        row("memory", "explain, peak", {"images": count}, [megabytes], "MB")
        for count, megabytes in ((images, small), (10 * images, large))
    ]


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    for rows in measure(options.images, options.rounds):
        print(printed(rows), flush=True)


if __name__ == "__main__":
    main()
