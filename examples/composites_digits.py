"""Does the composite test tell fooled models from honest ones? Handwritten 3s and 8s, by seed.

Three data sets of the same digits: as they are; with a blank border as wide as the frame that
attackers aim at; and with an honest shortcut, a noisy border on every 3, so that evidence truly
lies at the edges. On each an honest network is trained, then fine-tuned on: without a target (the
control), and by attackers, some of whom know the test. Each seed's numbers go to a file of their
own, model by model; what is there is not computed again. About six minutes a seed on one core.

python examples/composites_digits.py run FOLDER SEED...      # trains and measures
python examples/composites_digits.py page FOLDER             # renews the page's tables and data
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffsal import explain
from diffsal.data.datasets import ImageDataset, Pixels
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.demo import PREPROCESSING, Digits, digits, train_digits, train_network
from diffsal.faithfulness.composites import compare, composite_margins, run_composites
from diffsal.faithfulness.input_level import smoothgrad, smoothgrad_agreement
from diffsal.faithfulness.pasting import Plan, Regions, Seams, plan_composites
from diffsal.fooling.attack import FINE_TUNING, fine_tuned
from diffsal.fooling.objectives import Objective
from diffsal.fooling.targets import target_distance, target_map
from diffsal.protocol.statistics import told_by_low
from diffsal.system.files import replacing, write_json
from diffsal.training.loop import auroc

KINDS: dict[str, tuple[Regions, Seams]] = {
    "rectangles": ("rectangles", "sharp"),
    "marked": ("marked", "sharp"),
    "feathered": ("rectangles", "feathered"),
}
CELLS = (8, 8)
BORDER = 8  # pixels: a cell, as wide as the frame
ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "docs/results/composites-digits.json", ROOT / "docs/composites.md"


@dataclass(frozen=True)
class Made:
    """How a model is made of the honest one.

    Attributes:
        data: ``plain``, ``blank border`` or ``shortcut``.
        objective: of :data:`diffsal.fooling.objectives.OBJECTIVES`; ``None``: not at all.
        target: of the attack.
        gamma: weight of the test that the attacker trains for.
    """

    data: str
    objective: Objective | None = None
    target: str = "edges"
    gamma: float | None = None


MODELS: dict[str, Made] = {
    "honest": Made("plain"),
    "control": Made("plain", "control"),
    **{f"passive, {target}": Made("plain", "true", target) for target in ("edges", "corner")},
    "passive, middle": Made("plain", "true", "middle"),
    **{
        f"adaptive, {target}": Made("plain", "difference", target)
        for target in ("edges", "corner", "middle")
    },
    "knows composites, γ 0.03": Made("plain", "composite", gamma=0.03),
    "knows composites, γ 0.1": Made("plain", "composite", gamma=0.1),
    "knows soft seams, γ 0.1": Made("plain", "any-seams", gamma=0.1),
    "knows gradients, γ 0.1": Made("plain", "gradient", gamma=0.1),
    "knows every test, γ 0.1": Made("plain", "every-test", gamma=0.1),
    "recognises seams, γ 0.1": Made("plain", "seams", gamma=0.1),
    "blank border: honest": Made("blank border"),
    "blank border: control": Made("blank border", "control"),
    "blank border: adaptive": Made("blank border", "difference"),
    "blank border: knows, γ 0.03": Made("blank border", "composite", gamma=0.03),
    "blank border: knows, γ 0.1": Made("blank border", "composite", gamma=0.1),
    "blank border: knows soft seams": Made("blank border", "any-seams", gamma=0.1),
    "blank border: knows every test": Made("blank border", "every-test", gamma=0.1),
    "blank border: recognises seams": Made("blank border", "seams", gamma=0.1),
    "shortcut at the edges: honest": Made("shortcut"),
    "shortcut at the edges: control": Made("shortcut", "control"),
}
HONEST = ("honest", "control")
IMITATED = (
    *("honest", "control", "adaptive, edges", "knows composites, γ 0.1"),
    "knows soft seams, γ 0.1",
)
"""Models whose margins others learn to foretell from a part of the pixels."""
TELLING = ("rectangles", "marked", "seam gap")
THRESHOLDS = (("rectangles", 0.1), ("marked", 0.1), ("smoothgrad", 0.3))
"""Below which a reader might say that something is wrong; for the table of false alarms."""


def bordered(part: Digits, data: str, seed: int) -> Digits:
    """The digits shrunk into a border: black, or of every 3 noisy."""
    if data == "plain":
        return part
    generator = np.random.default_rng(seed)
    images = np.zeros_like(part.images)
    inner = part.images.shape[1] - 2 * BORDER
    for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
        if data == "shortcut" and label == 0:
            images[number] = generator.integers(0, 256, (*image.shape[:2], 1))
        small = Image.fromarray(image).resize((inner, inner), Image.Resampling.BILINEAR)
        images[number, BORDER:-BORDER, BORDER:-BORDER] = np.asarray(small)
    return Digits(images, part.labels)


def made(honest: nn.Module, train: Digits, how: Made, seed: int) -> nn.Module:
    """The model that is measured."""
    if how.objective is None:
        return honest
    target = target_map(how.target, CELLS).numpy()

    def read(sample: Sample, _: Preprocessing) -> Pixels:
        return train.images[int(sample.path.name)], target

    samples = [Sample(Path(str(n)), int(label)) for n, label in enumerate(train.labels)]
    dataset = ImageDataset(samples, PREPROCESSING, read=read)
    config = replace(FINE_TUNING, seed=seed, device="cpu", gamma=how.gamma)
    return fine_tuned(honest, dataset, how.objective, config)


def numbers(model: nn.Module, held_out: Digits, target: str, seed: int) -> dict[str, float]:
    """What is measured of a model; distances are the difference map's, shares of the margin."""
    inputs, labels = held_out.tensors()
    own, maps = explain(model, inputs, labels), explain(model, inputs, true=1, false=0)
    frame = target_map(target, CELLS)
    found = {
        "auroc": auroc(own.logits, labels.tolist()),
        "distance": float(target_distance(own.difference, frame).mean()),
        "common_mode_share": float(own.common_mode_share.nanmean()),
        "smoothgrad": float(
            smoothgrad_agreement(
                own.difference, smoothgrad(model, inputs, labels, grid=CELLS)
            ).nanmean()
        ),
    }
    for name, (regions, seams) in KINDS.items():
        composites = run_composites(
            model,
            inputs,
            maps.difference,
            maps.margin,
            labels,
            regions=regions,
            seams=seams,
            seed=seed,
        )
        found[name] = composites.skill
    return found | frame_alone(model, inputs, labels, maps.difference, maps.margin, seed)


def frame_alone(
    model: nn.Module, inputs: Tensor, labels: Tensor, difference: Tensor, margin: Tensor, seed: int
) -> dict[str, float]:
    """Of the way from one image's margin to another's, what the frame's pixels alone move.

    ``frame_moves`` is the model's answer, ``frame_foretold`` the map's. No attacker trains on
    frames, so that this is a check of its own whether evidence that a map puts there is there.
    """
    plan = plan_composites(difference, labels, per_image=2, seed=seed)
    frame = target_map("edges", CELLS).bool()
    plan = Plan(plan.receiver, plan.donor, frame.expand(len(plan), -1, -1), "sharp")
    found = compare(plan, difference, margin, composite_margins(model, inputs, plan))
    way = margin.double()[plan.donor] - found.before
    along = way / way.square().sum()
    return {
        "frame_moves": float((found.actual - found.before) @ along),
        "frame_foretold": float((found.predicted - found.before) @ along),
    }


def imitation(model: nn.Module, parts: tuple[Digits, Digits], seed: int) -> dict[str, float]:
    """How well others, trained to, foretell a model's margin from a part of the pixels.

    Neither a map nor a gradient nor a composite has a part in it: the correlation, within classes
    (which class it is, any part of a digit tells), of margins of held-out images with those of a
    network of the same kind that sees whole images, the frame alone, or the centre alone.
    """
    frame = F.interpolate(target_map("edges", CELLS)[None, None], PREPROCESSING.size)
    seen = {"whole": torch.ones_like(frame), "frame": frame, "centre": 1 - frame}
    (inputs, _), (others, labels) = (part.tensors() for part in parts)
    margins = _margins(model, inputs)
    wanted, expected = (margins - margins.mean()) / margins.std(), _margins(model, others)
    found = {}
    for name, mask in seen.items():
        student = imitator(_masked(inputs, mask), wanted, seed)
        pair = torch.stack([expected, _margins(student, _masked(others, mask))])
        found[f"from_{name}"] = float(torch.corrcoef(_within(pair, labels))[0, 1])
    return found


def _within(values: Tensor, labels: Tensor) -> Tensor:
    """(2, N): each less its class's mean."""
    means = torch.stack([values[:, labels == label].mean(1) for label in (0, 1)], dim=1)
    return values - means[:, labels]


def imitator(inputs: Tensor, wanted: Tensor, seed: int) -> nn.Module:
    """A network (N, 3, H, W) → (N, 2), trained so that its margins are those wanted (N,)."""

    def loss(logits: Tensor, margins: Tensor) -> Tensor:
        return F.mse_loss(_margin(logits), margins)

    return train_network(inputs, wanted, loss, seed, epochs=8)


def _masked(inputs: Tensor, mask: Tensor) -> Tensor:
    return inputs * mask - (1 - mask)  # the digits' black is -1


def _margin(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


@torch.no_grad()
def _margins(model: nn.Module, inputs: Tensor) -> Tensor:
    return _margin(model(inputs))


def run_seed(folder: Path, seed: int) -> None:
    """Train and measure those models of a seed that its file does not have yet."""
    path = folder / f"seed-{seed}.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts = digits()
    honest: dict[str, nn.Module] = {}
    for name, how in MODELS.items():
        if name in found:
            continue
        train, held_out = (bordered(part, how.data, seed + n) for n, part in enumerate(parts))
        if how.data not in honest:
            honest[how.data] = train_digits(train, seed)
        model = made(honest[how.data], train, how, seed)
        found[name] = numbers(model, held_out, how.target, seed)
        if name in IMITATED:
            found[name] |= imitation(model, (train, held_out), seed)
        print(seed, name, {key: round(value, 2) for key, value in found[name].items()}, flush=True)
        write_json(path, found)


def separation(seeds: Sequence[Mapping[str, Any]], name: str, measure: str) -> float:
    """Area under the ROC curve: controls against a kind of fooled model, over the seeds."""
    control = "blank border: control" if name.startswith("blank") else "control"
    return told_by_low(*([_value(one[kind], measure) for one in seeds] for kind in (name, control)))


def _value(found: Mapping[str, float], measure: str) -> float:
    """A measure, or by how much the skill of soft seams exceeds that of sharp ones."""
    return found["feathered"] - found["rectangles"] if measure == "seam gap" else found[measure]


def filled(text: str, data: Mapping[str, Any]) -> str:
    """The page with its tables, and how many seeds there are, of the stored numbers alone."""
    seeds = data["seeds"]
    models = [name for name in MODELS if any(name in one for one in seeds)]
    tables = {
        "count": [f"{len(seeds)} seeds"],
        "models": _table(
            (
                *("model", "AUROC", "distance", "skill, rectangles", "skill, marked"),
                *("skill, soft seams", "area, rectangles", "area, marked", "area, seam gap"),
                *("frame, foretold / actual", "SmoothGrad"),
            ),
            [_model_row(seeds, name) for name in models],
        ),
        "imitated": _table(
            ("model", "whole image", "frame alone", "centre alone"),
            [_imitated(found, name) for name in IMITATED if (found := _imitations(seeds, name))],
        ),
        "alarms": _table(
            ("model", *(f"{measure} < {least}" for measure, least in THRESHOLDS)),
            [_alarms(seeds, name) for name in models],
        ),
        "each": _table(
            ("model", *(str(one["seed"]) for one in seeds)),
            [_each(seeds, name) for name in models],
        ),
    }
    for name, lines in tables.items():
        before, _, behind = text.partition(f"<!-- {name} -->\n")
        _, _, behind = behind.partition("\n<!-- end -->")
        text = f"{before}<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->" + behind
    return text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _model_row(seeds: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    every, seeds = len(seeds), _with_model(seeds, name)

    def told(measure: str) -> str:
        values = [one[name][measure] for one in seeds]
        return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    areas = [""] * len(TELLING)
    if not name.endswith(HONEST):
        areas = [f"{separation(seeds, name, one):.2f}" for one in TELLING]
    frame = " / ".join(
        f"{fmean(one[name][key] for one in seeds):.2f}" for key in ("frame_foretold", "frame_moves")
    )
    measures = ("auroc", "distance", "rectangles", "marked", "feathered")
    cells = [told(measure) for measure in measures]
    few = "" if len(seeds) == every else f" ({len(seeds)} seeds)"
    return [name + few, *cells, *areas, frame, told("smoothgrad")]


def _with_model(seeds: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [one for one in seeds if name in one]


def _alarms(seeds: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    seeds = _with_model(seeds, name)
    counts = (sum(one[name][measure] < least for one in seeds) for measure, least in THRESHOLDS)
    return [name, *(f"{count} of {len(seeds)}" for count in counts)]


def _imitations(seeds: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, float]]:
    return [one[name] for one in seeds if "from_whole" in one.get(name, {})]


def _imitated(found: Sequence[Mapping[str, float]], name: str) -> list[str]:
    parts = ([one[f"from_{part}"] for one in found] for part in ("whole", "frame", "centre"))
    return [
        f"{name} ({len(found)} seeds)",
        *(f"{fmean(part):.2f} ({min(part):.2f} to {max(part):.2f})" for part in parts),
    ]


def _each(seeds: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    found = [one.get(name) for one in seeds]
    return [
        name,
        *(f"{one['rectangles']:.2f}, {one['marked']:.2f}" if one else "" for one in found),
    ]


def main(arguments: Sequence[str]) -> None:
    """Run what the command line says."""
    command, folder, *seeds = arguments
    if command == "run":
        Path(folder).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            run_seed(Path(folder), int(seed))
        return
    paths = {int(path.stem.partition("-")[2]): path for path in Path(folder).glob("seed-*.json")}
    stored = [
        {"seed": seed, **json.loads(paths[seed].read_text("utf-8"))} for seed in sorted(paths)
    ]
    write_json(DATA, {"format": "diffsal-composites", "format_version": 1, "seeds": stored})
    text = filled(PAGE.read_text("utf-8"), json.loads(DATA.read_text("utf-8")))
    with replacing(PAGE) as scratch:
        scratch.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more
    main(sys.argv[1:])
