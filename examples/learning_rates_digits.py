"""Do the methods differ once each has the learning rate that suits it? Digits, as in digits.toml.

The methods weigh cross-entropy by 1, 0.5 or 0.3, and learn it at as many rates. Here each method's
rate is chosen on validation data: a third of the training samples of every left-out digit, of the
same digits and the same shortcut, so that nothing of what is tested has a part in it. Then each is
trained with its own rate on all training samples, and tested on the digit that was left out.

python examples/protocol/write_digits.py examples/protocol/digits
python examples/learning_rates_digits.py run FOLDER    # half an hour on one core; goes on
python examples/learning_rates_digits.py page FOLDER   # keeps what was found in docs/results
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from diffsal.data.datasets import DecodedImages
from diffsal.data.index import Index
from diffsal.protocol.configuration import Job, Protocol, read_protocol
from diffsal.protocol.experiments import train_job
from diffsal.protocol.statistics import Estimate, mean_over_seeds, paired_difference
from diffsal.system.files import write_json
from diffsal.training.loop import auroc

RATES = (0.005, 0.01, 0.02, 0.04, 0.08)
VALIDATED, TESTED = (0,), (0, 1, 2)  # seeds
GIVEN = 0.02  # in digits.toml
ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs/results/learning-rates-digits.json"


def validation(index: Index, seed: int) -> Index:
    """The training samples alone, of which a third of each class is tested."""
    samples = list(index.split("train"))
    order = np.random.default_rng(seed).permutation(len(samples))
    held_out = {
        int(number)
        for label in (0, 1)
        for number in [n for n in order if samples[n].label == label][::3]
    }
    marked = [
        replace(one, split="test" if number in held_out else "train")
        for number, one in enumerate(samples)
    ]
    return replace(index, samples=tuple(marked))


def area(protocol: Protocol, job: Job, rate: float, index: Index, read: DecodedImages) -> float:
    """AUROC of a method's model, trained at a rate, on an index's split ``test``."""
    config = replace(protocol.training(job), lr=rate, device="cpu")
    logits = train_job(job, index, config, read)["models"][job.method]["logits"]
    return auroc(torch.tensor(logits), [one.label for one in index.split("test")])


def run(folder: Path) -> None:
    """Validate and test what the folder does not have yet."""
    protocol = read_protocol(ROOT / "examples/protocol/digits.toml")
    (task,) = protocol.tasks
    folder.mkdir(parents=True, exist_ok=True)
    read = DecodedImages(task.index.samples, task.training.preprocessing(), folder)
    path = folder / "areas.json"
    found: dict[str, float] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def measure(kind: str, method: str, subset: str, seed: int, rate: float) -> None:
        name = "/".join((kind, method, subset, str(seed), str(rate)))
        if name not in found:
            job, index = Job(task.name, method, subset, seed), task.split(subset)
            index = validation(index, seed) if kind == "validation" else index
            found[name] = area(protocol, job, rate, index, read)
            print(name, round(found[name], 3), flush=True)
            write_json(path, found)

    cells = list(itertools.product(task.subsets(), protocol.methods))
    for seed, (subset, method), rate in itertools.product(VALIDATED, cells, RATES):
        measure("validation", method, subset, seed, rate)
    for seed, (subset, method) in itertools.product(TESTED, cells):
        for rate in sorted({GIVEN, best(found, method)}):
            measure("test", method, subset, seed, rate)


def means(found: Mapping[str, float], kind: str, method: str, rate: float) -> dict[int, float]:
    """Of each seed, the mean area over subsets."""
    of_seed: dict[int, list[float]] = {}
    for name, value in found.items():
        its_kind, its_method, _, seed, its_rate = name.split("/")
        if (its_kind, its_method, its_rate) == (kind, method, str(rate)):
            of_seed.setdefault(int(seed), []).append(value)
    return {seed: fmean(of_seed[seed]) for seed in sorted(of_seed)}


def best(found: Mapping[str, float], method: str) -> float:
    """The rate of the largest mean area on validation data."""
    return max(RATES, key=lambda rate: fmean(means(found, "validation", method, rate).values()))


def tables(found: Mapping[str, float]) -> list[dict[str, Any]]:
    """What was validated, and what was tested, as `docs/results/schema.json` has it."""
    methods = list(dict.fromkeys(name.split("/")[1] for name in found))
    seen = {
        method: {str(rate): _mean(means(found, "validation", method, rate)) for rate in RATES}
        for method in methods
    }
    own = {method: means(found, "test", method, best(found, method)) for method in methods}
    tested = {
        method: {
            "learning rate": _mean({0: best(found, method)}),
            "AUROC": _mean(own[method]),
            f"AUROC with {GIVEN}": _mean(means(found, "test", method, GIVEN)),
            "less the baseline's": None
            if method == "baseline"
            else asdict(paired_difference(own[method], own["baseline"]) or _missing()),
        }
        for method in methods
    }
    note = "Means over left-out digits; mean and 95 % interval over seeds."
    return [
        _table("validation", "AUROC on validation data, by learning rate", "", seen),
        _table("tested", "AUROC on the digit that was left out", note, tested),
    ]


def _table(name: str, title: str, note: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "task": "digits", "title": title, "note": note, "rows": rows}


def _mean(of_seeds: Mapping[int, float]) -> dict[str, Any]:
    return asdict(mean_over_seeds([*of_seeds.values()]) or _missing())


def _missing() -> Estimate:
    raise SystemExit("there are areas missing: run it to the end")


def main(arguments: Sequence[str]) -> None:
    """Run what the command line says."""
    command, folder = arguments
    if command == "run":
        run(Path(folder))
        return
    found = json.loads((Path(folder) / "areas.json").read_text("utf-8"))
    head = {"format": "diffsal-results", "format_version": 1}
    told = "python examples/learning_rates_digits.py run FOLDER"
    write_json(DATA, head | {"command": told, "tables": tables(found)})


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more
    main(sys.argv[1:])
