"""Can a heatmap be believed? The paper's Figure 1 and its numbers, on handwritten 3s and 8s.

One honest network, and three attacks on it that leave its accuracy alone: a vector added to both
rows of its last layer (no training); passive fooling (the paper's: Eq. 2 with a frame along the
edges as "human" map); and the same against the difference map, by an attacker who knows it. As
training changes maps anyway, what is trained is compared with the control, the honest network
fine-tuned as long without a target. It takes about a minute.

python examples/audit_digits.py [FOLDER]
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from diffsal import explain, load_model, save_checkpoint
from diffsal.data.index import read_index
from diffsal.demo import ARCHITECTURE, ARGUMENTS, CLASSES, PREPROCESSING, digits, train_digits
from diffsal.faithfulness.composites import run_composites, skill_interval
from diffsal.faithfulness.pasting import Regions
from diffsal.faithfulness.perturbation import occlusion_drops, occlusion_faithfulness
from diffsal.fooling.attack import FINE_TUNING
from diffsal.fooling.run import fool
from diffsal.fooling.targets import target_distance, target_map
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.training.loop import auroc

ATTACKS: dict[str, dict[str, Any]] = {
    "control": {"objective": "control"},
    "head-shifted": {"method": "head-shift"},
    "passively fooled": {"objective": "true"},
    "adaptively fooled": {"objective": "difference"},
}
HEADER = """\
|                   | AUROC | true → edges | difference → edges | common-mode share | \
occlusion faithfulness (true, difference) | composite skill, rectangles | marked              |
|-------------------|-------|--------------|--------------------|-------------------|\
-------------------------------------------|-----------------------------|---------------------|"""
OCCLUDED = 40  # images; each costs a forward pass for every cell of its map
EPOCHS = 15  # of three trainings, to stay near a minute


def main(folder: Path, epochs: int = EPOCHS) -> dict[str, SalienceMaps]:
    """Train, attack, print the table, draw the figure; returns each model's held-out maps."""
    models = make_models(folder, epochs)
    held_out = digits()[1]
    inputs, labels = held_out.tensors()
    maps = {name: explain(model, inputs, labels) for name, model in models.items()}

    print(HEADER)
    for name, model in models.items():
        print(table_row(name, model, maps[name], inputs, labels))
    # What was not trained has the honest network as its control.
    for name, other in zip(list(ATTACKS)[1:], ("honest", "control", "control"), strict=True):
        shares = [*maps[other].common_mode_share, *maps[name].common_mode_share]
        separation = roc_auc_score([0] * len(labels) + [1] * len(labels), shares)
        print(f"The common-mode share tells {name} from {other} with AUROC {separation:.3f}.")

    eight = labels.tolist().index(CLASSES.index("8"))
    draw(folder / "figure.png", held_out.images[eight], {k: v[eight] for k, v in maps.items()})
    print(f"Look at {folder / 'figure.png'}")
    return maps


def make_models(folder: Path, epochs: int) -> dict[str, nn.Module]:
    """The honest network, and the four that ``diffsal fool`` would make of its file."""
    index = read_index(write_digits(folder))
    honest = folder / "honest.pt"
    save_checkpoint(
        honest,
        train_digits(digits()[0]),
        architecture=ARCHITECTURE,
        arguments=ARGUMENTS,
        classes=CLASSES,
        preprocessing=PREPROCESSING,
    )
    models = {"honest": load_model(honest).model}
    for name, attack in ATTACKS.items():
        path = folder / f"{name}.pt"
        config = replace(FINE_TUNING, epochs=epochs, device="cpu")
        fool(index, load_model(honest), path, target="edges", config=config, **attack)
        models[name] = load_model(path).model
    return models


def write_digits(folder: Path) -> Path:
    """The digits as PNG files, and the path of their index."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label,split"]
    for split, part in zip(("train", "test"), digits(), strict=True):
        for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            Image.fromarray(image).save(folder / f"{split}{number}.png")
            lines.append(f"{split}{number}.png,{CLASSES[label]},{split}")
    path = folder / "index.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table_row(
    name: str, model: nn.Module, maps: SalienceMaps, inputs: Tensor, labels: Tensor
) -> str:
    """Means over the held-out images; of faithfulness, over the first of them."""
    frame = target_map("edges", (maps.true.shape[1], maps.true.shape[2]))
    few = slice(OCCLUDED)
    drops = occlusion_drops(model, inputs[few], labels[few], grid=frame.shape)
    true, difference = (
        occlusion_faithfulness(one[few], drops).nanmean() for one in (maps.true, maps.difference)
    )
    return (
        f"| {name:17} | {auroc(maps.logits, labels.tolist()):5.3f} "
        f"| {target_distance(maps.true, frame).mean():12.3f} "
        f"| {target_distance(maps.difference, frame).mean():18.3f} "
        f"| {maps.common_mode_share.nanmean():17.3f} | {true:19.2f}, {difference:20.2f} "
        f"| {skill(model, inputs, labels, 'rectangles'):>27} "
        f"| {skill(model, inputs, labels, 'marked'):>19} |"
    )


def skill(model: nn.Module, inputs: Tensor, labels: Tensor, regions: Regions) -> str:
    """How well the difference map foretells composites: 1 is exact, 0 no better than no map."""
    maps = explain(model, inputs, true=1, false=0)
    found = run_composites(model, inputs, maps.difference, maps.margin, labels, regions=regions)
    bounds = skill_interval(found)
    return f"{bounds.mean:.2f} ({bounds.low:.2f} to {bounds.high:.2f})"


def draw(path: Path, image: Any, maps: Mapping[str, SalienceMaps]) -> None:
    """The true class's map, the false class's and their difference, each on its own scale."""
    figure = Figure(figsize=(8, 2 * len(maps) + 0.4), layout="constrained")
    axes = figure.subplots(len(maps), 4, squeeze=False)
    height, width = image.shape[:2]
    for row, (name, one) in zip(axes, maps.items(), strict=True):
        row[0].set_ylabel(name)
        row[0].imshow(image)
        for axis, map_ in zip(row[1:], (one.true, one.false, one.difference), strict=True):
            axis.imshow(image)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            axis.imshow(map_[0], cmap="RdBu_r", alpha=0.8, extent=extent)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    titles = ("a held-out 8", "true class, 8", "false class, 3", "difference")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.supxlabel("red: highest of the map, blue: lowest", fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more, and loses on busy cores
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "audit-digits"))
