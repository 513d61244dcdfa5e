"""Measure, keep what was measured, and write docs/benchmarks.md of it.

    python benchmarks/all.py [GROUP ...] [--device cuda]   # of GROUPS; all
    python benchmarks/all.py page                          # the page alone

The rows of a group replace those that this kind of machine had of it before, in
`benchmarks/results/cpu.json` or one of the GPU's name; `benchmarks/results/schema.json` tells what
is in them.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import maps
import pictures
import protocol
import scaling
import torch
import training
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from timing import Row, machine, printed

from diffsal.system.files import replacing, write_json

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs/benchmarks.md"
CPU = "cpu"


def measure_maps(device: torch.device) -> Iterator[list[Row]]:
    """Against the forward pass and other libraries; on a GPU, of batches that fill it too."""
    if device.type == "cuda":
        return maps.measure(device, maps.MODELS, [1, 8, 64, 256], rounds=3)
    return maps.measure(device, maps.MODELS, [1, 8], rounds=3)


def measure_training(device: torch.device) -> Iterator[list[Row]]:
    """Steps and jobs."""
    if device.type == "cuda":
        return training.measure(device, [64, 256], ["bfloat16", "float32"], rounds=5)
    return training.measure(device, [8], ["float32"], rounds=3)


def measure_pictures(device: torch.device) -> Iterator[list[Row]]:
    """A folder of images, and one picture."""
    return pictures.measure(device, images=1000, workers=2, rounds=1)


def measure_scaling(_: torch.device) -> Iterator[list[Row]]:
    """More processes, more images; on the CPU."""
    return scaling.measure(images=1000, rounds=2)


def measure_grid(device: torch.device) -> Iterator[list[Row]]:
    """Many jobs at once."""
    arguments = ["--device", device.type]
    if device.type == "cuda":
        arguments += ["--arch", "timm:tf_efficientnet_lite0", "--size", "128", "--batch", "32"]
        arguments += ["--amp", "bf16", "--jobs", "12"]
    yield protocol.measure(protocol.options(arguments))


GROUPS: dict[str, Callable[[torch.device], Iterator[list[Row]]]] = {
    "maps": measure_maps,
    "pictures": measure_pictures,
    "training": measure_training,
    "grid": measure_grid,
    "scaling": measure_scaling,
}


def file_of(device: torch.device) -> Path:
    """Where a machine's rows are."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else CPU
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', kind.lower())}.json"


def keep(device: torch.device, measured: Sequence[Row]) -> None:
    """Put rows in the place of those of their groups."""
    path, groups = file_of(device), {one["group"] for one in measured}
    before = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    rows = [one for one in before if one["group"] not in groups]
    about = {"format": "diffsal-benchmarks", "format_version": 1, "machine": machine(device)}
    write_json(path, {**about, "rows": [*rows, *measured]})


def stored() -> dict[str, Any]:
    """Name to content of every file of results."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if path.stem != "schema"]
    return {path.stem: json.loads(path.read_text("utf-8")) for path in paths}


def page(results: Mapping[str, Any]) -> str:
    """The text of docs/benchmarks.md."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.globals |= {
        "machines": results,
        "ahead": lambda: ahead(results),
        "table": lambda *how: table(results, *how),
        "any": lambda *how: any_row(results, *how),
    }
    return environment.get_template("page.md.jinja").render()


def table(
    results: Mapping[str, Any],
    group: str,
    column: str,
    where: Mapping[str, Any] | None = None,
    value: str = "median",
) -> str:
    """Contestants as rows; as columns what settings are called, machine by machine."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for content in results.values():
        for one in content["rows"]:
            if one["group"] != group or not (where or {}).items() <= one["setting"].items():
                continue
            head = f"{content['machine']['device']}: {column.format_map(one['setting'])}"
            columns[head] = None
            cells.setdefault(one["name"], {})[head] = _cell(one, value)
    if not cells:
        return "Not measured."
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(head, "–") for head in columns)] for name, row in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def any_row(results: Mapping[str, Any], group: str, name: str, value: Any) -> bool:
    """Whether a group was measured in a setting."""
    rows = [one for content in results.values() for one in content["rows"]]
    return any(one["group"] == group and one["setting"].get(name) == value for one in rows)


def ahead(results: Mapping[str, Any]) -> list[str]:
    """Where another library's maps are the faster ones, by their medians; spreads may overlap."""
    found = []
    for content in results.values():
        rows = [one for one in content["rows"] if one["group"] == "maps"]
        own = {
            (one["name"], str(one["setting"])): one["median"]
            for one in rows
            if one["name"] in maps.OURS
        }
        on_device, numpy = maps.OURS
        for one in rows:
            ours = own[numpy if "numpy" in one["name"] else on_device, str(one["setting"])]
            if one["name"] not in maps.OURS and one["median"] < ours:
                found.append(
                    f"{content['machine']['device']}, {one['setting']['model']}, batch "
                    f"{one['setting']['batch']}: {one['name']} {one['median']:.3g}, ours {ours:.3g}"
                )
    return found


def _cell(one: Row, value: str) -> str:
    if value != "median":
        return f"{one[value]:.3g}"
    spread = f" ({one['low']:.2f} to {one['high']:.2f})" if one["rounds"] > 1 else ""
    return f"{one['median']:.3g}{spread}"


def main() -> None:
    """Measure what is asked for; print it, keep it, and renew the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=list(GROUPS), choices=[*GROUPS, "page"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    for group in options.groups:
        rows: list[Row] = []
        for part in GROUPS[group](device) if group in GROUPS else ():
            print(printed(part), flush=True)
            rows += part
            keep(device, rows)
    with replacing(PAGE) as scratch:
        scratch.write_text(page(stored()), encoding="utf-8")


if __name__ == "__main__":
    main()
