"""What a folder of images costs, `diffsal explain` beside a bare loader, and what one picture.

    python benchmarks/pictures.py [--images 1000] [--rounds 1] [--device cuda]

Photographs of 640 x 427 pixels, ResNet-50 with two outputs at 224 x 224. The bare way is a script
that reads, resizes and normalises the same files in a `DataLoader` with as many workers, runs the
model, and keeps the logits. All that a command does from its start to its end is counted for all.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from sklearn.datasets import load_sample_image, load_sample_images
from timing import Row, in_turns, printed, ratios, row
from torchvision.models import densenet121, resnet50

from diffsal import explain
from diffsal.data.images import read_image
from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.figures import save_figure
from diffsal.explaining.records import draft
from diffsal.models.checkpoints import LoadedModel, load_model, save_checkpoint

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
BARE = """
import sys
from pathlib import Path
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet50
from torchvision.transforms.functional import normalize, pil_to_tensor, resize


class Inputs(Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, position):
        image = resize(Image.open(self.paths[position]).convert("RGB"), [224, 224])
        x = pil_to_tensor(image).float() / 255
        return normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


folder, weights, device, batch, workers = sys.argv[1:]
model = resnet50(num_classes=2)
model.load_state_dict(torch.load(weights, weights_only=True))
model.eval().to(device)
images = Inputs(sorted(Path(folder).glob("*.jpg")))
batches = DataLoader(images, int(batch), num_workers=int(workers))
with torch.no_grad():
    logits = torch.cat([model(images.to(device)).cpu() for images in batches])
print(logits.softmax(1).mean(0))
"""
PREPROCESSING = Preprocessing()
BATCH = 8
OUTPUTS = {
    "explain, no figure": ["--no-figure"],
    "explain, figures": [],
    "explain, figures and raw maps": ["--save-maps"],
}


def folder_of_images(
    folder: Path, images: int, device: torch.device, workers: int, rounds: int
) -> list[Row]:
    """All ways, as multiples of the time of the bare one; each in processes of its own."""
    loaded = model_and_files(folder / "images", images)
    torch.save(loaded.model.state_dict(), folder / "state.pt")
    (folder / "bare.py").write_text(BARE, "utf-8")
    told = [device.type, str(BATCH), str(workers)]
    ours = ["-m", "diffsal", "explain", "images", "--model", "images/weights.pt", "--overwrite"]
    ours += ["--device", told[0], "--batch-size", told[1], "--workers", told[2]]
    commands = {"a bare loader and forward pass": ["bare.py", "images", "state.pt", *told]}
    commands |= {name: [*ours, *words] for name, words in OUTPUTS.items()}
    setting = {"model": "resnet50", "images": images, "workers": workers}
    return ratios("folder", setting, in_turns(_runs(commands, folder), rounds, warm_up=0))


def model_and_files(folder: Path, images: int) -> LoadedModel:
    """A checkpoint of random weights, loaded, and photographs."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    pixels = load_sample_images().images
    for number in range(images):
        Image.fromarray(pixels[number % 2]).save(folder / f"{number}.jpg", quality=92)
    save_checkpoint(
        folder / "weights.pt",
        resnet50(num_classes=2),
        architecture="torchvision:resnet50",
        arguments={"num_classes": 2},
        classes=["intact", "worn"],
        preprocessing=PREPROCESSING,
    )
    return load_model(folder / "weights.pt")


def one_picture(folder: Path, rounds: int) -> list[Row]:
    """CPU seconds of a figure, from the maps to the file; each of other names and numbers."""
    count = 10 * rounds
    loaded = model_and_files(folder, 1)
    image = read_image(folder / "0.jpg")
    brighter = torch.stack([PREPROCESSING(image) * (1 + n / count) for n in range(count)])
    maps = explain(loaded.model, brighter)
    seconds = []
    for n in range(count):
        start = time.process_time()
        told = image, image.shape[:2], maps[n], ("intact", "worn"), PREPROCESSING
        made = draft(folder / f"{n}.jpg", str(n), *told)
        save_figure(folder / "0.png", made.explanation)
        seconds.append(time.process_time() - start)
    setting = {"pixels": "640 x 427"}
    figure = row("picture", "a figure, maps to file", setting, seconds[5:], "s")
    return [figure | {"milliseconds": 1e3 * median(seconds[5:])}]


def one_command(folder: Path, rounds: int) -> list[Row]:
    """`diffsal explain` of one photograph beside a script that does the least, in CPU seconds."""
    Image.fromarray(load_sample_image("china.jpg")).save(folder / "image.png")
    torch.save(densenet121(num_classes=2).state_dict(), folder / "weights.pt")
    (folder / "minimal.py").write_text(MINIMAL, "utf-8")
    ours = ["-m", "diffsal", "explain", "image.png", "--model", "weights.pt", "--overwrite"]
    commands = {
        "a minimal script": ["minimal.py", "image.png", "weights.pt", "minimal.png"],
        "diffsal explain, one image": [*ours, "--device", "cpu"],
    }
    seconds = in_turns(_runs(commands, folder), rounds, clock=_of_children)
    return ratios("command", {"model": "densenet121"}, seconds)


def _runs(commands: Mapping[str, list[str]], folder: Path) -> dict[str, Callable[[], object]]:
    return {
        name: partial(
            subprocess.run, [sys.executable, *words], cwd=folder, check=True, capture_output=True
        )
        for name, words in commands.items()
    }


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(device: torch.device, images: int, workers: int, rounds: int) -> Iterator[list[Row]]:
    """The picture, and the folder."""
    with tempfile.TemporaryDirectory() as name:
        yield one_picture(Path(name), 3)
        yield one_command(Path(name), 3)
    with tempfile.TemporaryDirectory() as name:
        yield folder_of_images(Path(name), images, device, workers, rounds)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    device = torch.device(options.device)
    for rows in measure(device, options.images, options.workers, options.rounds):
        print(printed(rows), flush=True)


if __name__ == "__main__":
    main()
