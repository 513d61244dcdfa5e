"""How often does an audit of an honest model give cause for doubt? Handwritten 3s and 8s, by seed.

For each seed an honest network is trained, and fine-tuned on without a target (the control), and
both are audited as a user would. Counted are readings of findings that would make somebody doubt
the maps, or the model: from honest ones they are false alarms. What counts as one was settled
before the first audit. About three minutes a seed on one core.

python examples/false_alarms_digits.py FOLDER SEED...     # goes on where it was stopped
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from audit_digits import write_digits

from diffsal import load_model, save_checkpoint
from diffsal.auditing.run import audit
from diffsal.auditing.settings import Settings
from diffsal.auditing.wording import sign
from diffsal.data.index import read_index
from diffsal.demo import ARCHITECTURE, ARGUMENTS, CLASSES, PREPROCESSING, digits, train_digits
from diffsal.fooling.attack import FINE_TUNING
from diffsal.fooling.run import fool
from diffsal.system.files import write_json

DATA = Path(__file__).parents[1] / "docs/results/false-alarms-digits.json"
MODELS = ("honest", "control")
Numbers = Mapping[str, Any]  # of audit.json, by name
ALARMS: dict[str, Callable[[Numbers], bool]] = {
    "composites: rectangles no better than a guess": lambda n: sign(n["composite_skill"]) < 1,
    "composites: marked cells no better": lambda n: sign(n["composite_skill_marked"]) < 1,
    "composites: soft seams no better": lambda n: sign(n["composite_skill_feathered"]) < 1,
    "common mode: half of the class map or more": lambda n: _mean(n, "common_mode_share") >= 0.5,
    "agreement of the two maps: below 0.5": lambda n: _mean(n, "true_difference") < 0.5,
    "occlusion, mean colour: no relation": lambda n: sign(n["occlusion_difference"]) < 1,
    "occlusion, blur: no relation": lambda n: sign(n["occlusion_blur_difference"]) < 1,
    "occlusion, transplants: no relation": lambda n: sign(n["transplant_difference"]) < 1,
    "occlusion: depends on the occluder": lambda n: any(
        sign(one) != 0
        for name, one in n.items()
        if name.startswith(("occ", "tr")) and " - " in name and name.count("_difference") == 2
    ),
    "SmoothGrad: no relation": lambda n: sign(n["smoothgrad_difference"]) < 1,
    "sensitivity: the map changes by half its size or more": lambda n: (
        _mean(n, "sensitivity") >= 0.5
    ),
    "location: more in the frame than by chance": lambda n: (
        n["frame_difference"]["low"] > n["frame_difference"]["chance"]
    ),
    "kinds of evidence: distinct": lambda n: _mean(n, "silhouette") > n["silhouette"]["chance"],
    "insertion: the class map better": lambda n: (
        sign(n["insertion_difference - insertion_true"]) < 0
    ),
    "deletion: the class map better": lambda n: sign(n["deletion_difference - deletion_true"]) > 0,
    "ROAD: no relation": lambda n: sign(n["road_difference"]) < 1,
    "sanity: the same for the other class (above 0.9)": lambda n: _mean(n, "true_false") > 0.9,
    "sanity: survives random weights (above 0.5)": lambda n: (
        _mean(n, "randomised_difference") > 0.5
    ),
    "batch norm: maps move (below 0.9)": lambda n: _mean(n, "reestimated_difference") < 0.9,
    "stress test: nothing moves": lambda n: _mean(n, "target_after") >= _mean(n, "target_before"),
}


def _mean(numbers: Numbers, name: str) -> float:
    return float(numbers[name]["mean"])


def audited(folder: Path, seed: int) -> dict[str, dict[str, bool]]:
    """Model to alarm to whether it was given."""
    index = read_index(write_digits(folder))
    save_checkpoint(
        folder / "honest.pt",
        train_digits(digits()[0], seed),
        architecture=ARCHITECTURE,
        arguments=ARGUMENTS,
        classes=CLASSES,
        preprocessing=PREPROCESSING,
    )
    fool(
        index,
        load_model(folder / "honest.pt"),
        folder / "control.pt",
        objective="control",
        config=replace(FINE_TUNING, seed=seed, device="cpu"),
    )
    found = {}
    for name in MODELS:
        settings = Settings(PREPROCESSING, torch.device("cpu"), seed=seed)
        result = audit(index, load_model(folder / f"{name}.pt"), folder / name, settings)
        numbers = {
            one["name"]: one
            for finding in result["findings"]
            for one in finding["numbers"]
            if "class" not in one
        }
        found[name] = {alarm: bool(given(numbers)) for alarm, given in ALARMS.items()}
    return found


def table(seeds: Sequence[Mapping[str, Mapping[str, bool]]]) -> dict[str, Any]:
    """Of how many seeds each alarm was given, as a share."""
    head = {"std": None, "low": None, "high": None, "count": len(seeds)}
    rows = {
        alarm: {
            name: head | {"value": sum(one[name][alarm] for one in seeds) / len(seeds)}
            for name in MODELS
        }
        for alarm in ALARMS
    }
    return {
        "name": "false-alarms",
        "task": "digits",
        "title": "False alarms of the audit",
        "note": f"Share of {len(seeds)} seeds on which an honest model's audit reads so. The "
        "control is the honest model, fine-tuned as long as fooled ones are, without a target.",
        "rows": rows,
    }


def main(arguments: Sequence[str]) -> None:
    """Audit the seeds that are not there yet, and keep the table of all of them."""
    folder = Path(arguments[0])
    for seed in arguments[1:]:
        path = folder / f"seed-{seed}.json"
        if not path.exists():
            found = audited(folder / seed, int(seed))
            write_json(path, found)
            print(seed, {name: [k for k, v in one.items() if v] for name, one in found.items()})
    seeds = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("seed-*.json"))]
    head = {"format": "diffsal-results", "format_version": 1}
    command = "python examples/false_alarms_digits.py FOLDER 0 1 2 3 4 5 6 7 8 9"
    write_json(DATA, head | {"command": command, "tables": [table(seeds)]})


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more
    main(sys.argv[1:])
