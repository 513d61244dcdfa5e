"""What a map costs: beside the model's own forward pass, beside grad-cam, beside a minimal script.

    python benchmarks/explain.py [--device cuda] [--batch-size 256] [--rounds 9] [--skip-command]

Everything that is compared runs in turns in one process (or, for the command, in turns of fresh
processes), and ratios of medians are printed: other load on the machine falls on all alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.models import densenet121, get_model

from diffsal import DifferenceCAM

MINIMAL = """
import sys
import torch
import torchvision
from matplotlib import pyplot
from PIL import Image
from torchvision.transforms.functional import normalize, pil_to_tensor, resize

image = Image.open(sys.argv[1]).convert("RGB")
model = torchvision.models.densenet121(weights=None, num_classes=2)
model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
model.eval()
x = pil_to_tensor(resize(image, [224, 224])).float() / 255
x = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
with torch.no_grad():
    logits = model(x)
pyplot.switch_backend("agg")
pyplot.imshow(image)
pyplot.title(str(logits.softmax(1).tolist()))
pyplot.savefig(sys.argv[3])
"""


def main() -> None:
    """Print the table, or with ``--json`` the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--skip-command", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    results = {}
    for name in options.models:
        model = get_model(name, weights=None, num_classes=2).to(device).eval()
        inputs = torch.randn(options.batch_size, 3, 224, 224, device=device)
        results[name] = ratios(in_turns(contestants(model, inputs), options.rounds, device))
    if not options.skip_command:
        results["diffsal explain, one image"] = ratios(command(options.rounds))
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, rows in results.items():
        print(f"\n{name}, {options.device}, batch {options.batch_size}, {options.rounds} rounds")
        for row, (seconds, ratio) in rows.items():
            print(f"  {row:<42} {seconds * 1e3:9.1f} ms   x {ratio:.3f}")


def contestants(model: nn.Module, inputs: Tensor) -> dict[str, Callable[[], object]]:
    """The forward pass first; the rest is told as multiples of it."""
    cam = DifferenceCAM(model)
    layers = list(cam.target_layers)
    targets = [[ClassifierOutputTarget(label)] * len(inputs) for label in (0, 1)]

    def forward() -> Tensor:
        with torch.no_grad():
            return model(inputs)  # type: ignore[no-any-return]

    def grad_cam() -> None:
        with GradCAM(model, layers) as theirs:
            for target in targets:
                theirs(inputs, target)

    return {
        "forward pass": forward,
        "cam.maps: true, false, difference": lambda: cam.maps(inputs),
        "cam(...): heatmaps as numpy": lambda: cam(inputs),
        "grad-cam: GradCAM, called for two classes": grad_cam,
    }


def in_turns(
    contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(rounds: int) -> dict[str, list[float]]:
    """``diffsal explain`` on one photograph beside a script that does the least."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from PIL import Image
        from sklearn.datasets import load_sample_image

        Image.fromarray(load_sample_image("china.jpg")).save(folder / "image.png")
        torch.save(densenet121(num_classes=2).state_dict(), folder / "weights.pt")
        (folder / "minimal.py").write_text(MINIMAL)
        explain = ["-m", "diffsal", "explain", "image.png", "--model", "weights.pt", "--overwrite"]
        commands = {
            "a minimal script": ["minimal.py", "image.png", "weights.pt", "minimal.png"],
            "diffsal explain": [*explain, "--device", "cpu"],
        }
        calls = {
            label: lambda arguments=arguments: subprocess.run(
                [sys.executable, *arguments], cwd=folder, check=True, capture_output=True
            )
            for label, arguments in commands.items()
        }
        return in_turns(calls, rounds, torch.device("cpu"))  # type: ignore[arg-type]


def ratios(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Median seconds, and the median over rounds of the ratio to the first contestant."""
    first = next(iter(seconds.values()))
    return {
        name: (
            statistics.median(times),
            statistics.median(one / base for one, base in zip(times, first, strict=True)),
        )
        for name, times in seconds.items()
    }


if __name__ == "__main__":
    main()
