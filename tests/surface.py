"""What users rely on, as data: names and signatures, commands and options, exit codes, files' keys.

    python tests/surface.py        rewrites api_surface.json (`make surface`)

A change of the file in a commit is a change of the public surface: it belongs in CHANGELOG.md.
"""

import csv
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from click.testing import CliRunner
from PIL import Image

import diffsal
from diffsal.cli import options
from diffsal.cli.main import main

STORED = Path(__file__).with_name("api_surface.json")

_NETWORK = 'architecture = "torchvision:DenseNet"\nweights = "none"\nsize = 32\nepochs = 1\n' + (
    "arguments = { growth_rate = 4, block_config = [1, 1], num_init_features = 8 }\n"
)


def surface() -> dict[str, Any]:
    """The whole of it, as plain JSON types."""
    with TemporaryDirectory() as folder:
        files = {name: sorted(set(_keys(content))) for name, content in _files(Path(folder))}
    return {
        "names": {name: _described(getattr(diffsal, name)) for name in diffsal.__all__},
        "commands": dict(_commands(main, "diffsal")),
        "exit_codes": {
            "done": 0,
            "nothing could be done": click.ClickException.exit_code,
            "wrong usage": click.UsageError.exit_code,
            "some inputs failed, the rest are done": options.SOME_FAILED,
        },
        "files": files,
    }


def _signature(function: Any) -> str:
    """Names and defaults; how annotations are written differs between versions of Python."""
    signature = inspect.signature(function)
    bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _described(value: Any) -> Any:
    """A function's signature; of a class, also its public members'."""
    if not inspect.isclass(value):
        return _signature(value)
    members = {
        name: _signature(member) if inspect.isfunction(member) else "property"
        for owner in reversed(value.__mro__)
        if owner.__module__.startswith("diffsal")
        for name, member in vars(owner).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }
    made = "(*args)" if issubclass(value, Exception) else _signature(value)
    return {"": made, **members}


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(command, click.Group):
        for child, one in sorted(command.commands.items()):
            yield from _commands(one, f"{name} {child}")
    else:
        yield name, dict(sorted(map(_parameter, command.params)))


def _parameter(parameter: click.Parameter) -> tuple[str, dict[str, Any]]:
    facts = parameter.to_info_dict()
    kind = facts["type"].get("choices") or facts["type"]["name"]
    default = facts["default"]
    plain = default if default is None or isinstance(default, bool | int | str) else str(default)
    shown = {"type": kind, "default": None if facts["required"] else plain}
    return " ".join(parameter.opts), shown | {"required": facts["required"]}


def _files(folder: Path) -> Iterator[tuple[str, Any]]:
    """What the commands write, on tiny data."""
    index = _write_index(folder)
    (folder / "net.toml").write_text(_NETWORK, "utf-8")
    (folder / "grid.toml").write_text(
        f'seeds = 1\n[training]\n{_NETWORK}[tasks.tiles]\nindex = "index.csv"\n'
        "leave_out = false\n[methods.contrast]\n[fooling]\nepochs = 1\n",
        "utf-8",
    )
    run = folder / "run"
    _call("train", index, "--config", folder / "net.toml", "--out", run)
    model = ("--model", run / "best.pt")
    _call("explain", folder / "0.png", *model, "--out", folder / "explained")
    _call("audit", index, *model, "--out", folder / "audited")
    _call("protocol", "run", folder / "grid.toml", "--out", folder / "results")
    fooled = _call("fool", index, *model, "--method", "head-shift", "--json", "--out", run / "f.pt")
    yield "log.jsonl", json.loads((run / "log.jsonl").read_text("utf-8").splitlines()[0])
    yield "manifest.json", json.loads((folder / "explained" / "manifest.json").read_text("utf-8"))
    yield "audit.json", json.loads((folder / "audited" / "audit.json").read_text("utf-8"))
    with (folder / "audited" / "per-image.csv").open(encoding="utf-8") as file:
        yield "per-image.csv", dict.fromkeys(next(csv.reader(file)))
    yield "fool --json", json.loads(fooled)
    yield "protocol.json", json.loads((folder / "results" / "protocol.json").read_text("utf-8"))
    for job in sorted((folder / "results" / "jobs").iterdir()):
        yield f"jobs/{job.name}", json.loads(job.read_text("utf-8"))


def _write_index(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = [["path", "label", "map", "split"]]
    for number in range(24):
        label = "defect" if number % 2 else "intact"
        pixels = generator.integers(0, 80, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[8:16, 8:16] = 255
        if label == "defect":
            pixels[mask > 0] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}-map.png")
        split = ("train", "val", "test")[number // 2 % 3]
        lines.append([f"{number}.png", label, f"{number}-map.png", split])
    with (folder / "index.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return folder / "index.csv"


def _call(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def _keys(content: Any, parent: str = "") -> Iterator[str]:
    """Dotted paths of all keys; ``[]`` stands for the elements of a list."""
    if isinstance(content, dict):
        for key, value in content.items():
            path = f"{parent}.{key}" if parent else key
            yield path
            yield from _keys(value, path)
    elif isinstance(content, list):
        for value in content:
            yield from _keys(value, f"{parent}[]")


if __name__ == "__main__":
    STORED.write_text(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n", "utf-8")
