"""Tries of TOML files, and of folders of a protocol's results."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from hostile.attacks import mutated, written
from hostile.tries import Tries

from diffsal.protocol.configuration import Job, hash_of, read_protocol
from diffsal.protocol.formats import written as in_words
from diffsal.protocol.job_files import COLUMNS, FURTHER
from diffsal.protocol.results import draw, read_results
from diffsal.protocol.scores import FOOLING
from diffsal.protocol.tables import make_tables
from diffsal.system.files import write_json
from diffsal.training.config import TrainingConfig

GRID: dict[str, dict[str, str]] = {
    "": {"seeds": "2"},
    "training": {
        "architecture": '"torchvision:DenseNet"',
        "arguments": "{ growth_rate = 4, block_config = [1, 1] }",
        "weights": '"none"',
        "size": "32",
        "epochs": "1",
        "batch_size": "8",
        "lr": "0.01",
    },
    "tasks.bars": {"index": '"index.csv"', "leave_out": "false", "fraction": "0.5"},
    "methods.contrast": {"method": '"contrast"', "alpha": "0.5"},
    "fooling": {"epochs": "1"},
}
_FURTHER = {
    "": ("training", "tasks", "methods", "fooling", "other"),
    "training": ("mean", "std", "augment", "amp", "schedule", "target_layer", "resize", "pool"),
    "tasks.bars": ("maps", "classes", "training", "other"),
    "methods.contrast": ("beta", "gamma", "pool", "map_of", "dynamic_alpha"),
    "fooling": ("lr", "momentum", "weight_decay", "schedule", "freeze_batchnorm"),
}
ODD = [
    *('""', '"a\\u0000b"', '"\\u202e\\u001b[2J"', f'"{"x" * 300}"', f'"{"../" * 2_000}"', '"="'),
    *("[]", "[[]]", "{}", "{ a = { b = {} } }", '["a", "a"]', "[1, 'a']", "[0.1, inf, nan]"),
    *("-1", "0", "1000000000", f"{10**18}", f"{10**400}", "9" * 5_000, "1e308", "inf", "nan"),
    *("true", "1979-05-27", "07:32:00", '"none"', '"NONE"', '"torch.nn:Identity"', '"/dev/zero"'),
    *("[" * 200 + "]" * 200, "[" * 20_000, "{ a = 1979-05-27 }", "{ num_classes = [nan] }"),
]


def toml_files(folder: Path, count: int, every: int = 1) -> Tries:
    """A protocol, and a configuration of a training, with odd values, and with bytes changed."""
    for number in range(8):
        written(folder / f"{number}.png", b"")
    lines = [f"{number}.png,{'ab'[number % 2]},{number}.png" for number in range(8)]
    (folder / "index.csv").write_text("\n".join(["path,label,map", *lines]))
    path = folder / "grid.toml"
    places = [(table, key) for table in GRID for key in (*GRID[table], *_FURTHER[table])]
    for number, ((table, key), value) in enumerate(product(places, ODD)):
        if number % every == 0:
            text = _toml({**GRID, table: {**GRID[table], key: value}})
            yield f"[{table}] {key} = {value[:40]}", _read(path, text.encode())
            if table == "training":
                own = "\n".join(f"{k} = {v}" for k, v in {**GRID[table], key: value}.items())
                train = written(folder / "train.toml", own.encode())
                yield f"{key} = {value[:40]}", lambda train=train: TrainingConfig.from_toml(train)
    draw, whole = random.Random(0), _toml(GRID).encode()
    for number in range(count):
        yield f"mutation {number}", _read(path, mutated(whole, draw))


def _toml(tables: dict[str, dict[str, str]]) -> str:
    blocks = []
    for table, entries in tables.items():
        if not any(name in tables[""] for name in (table, table.split(".")[0])):
            head = [f"[{table}]"] if table else []
            blocks += [*head, *(f"{key} = {value}" for key, value in entries.items())]
    return "\n".join(blocks)


def _read(path: Path, content: bytes) -> Callable[[], object]:
    def read() -> None:
        written(path, content)
        protocol = read_protocol(path)
        write_json(path.with_name("protocol.json"), protocol.to_dict())
        protocol.hash()

    return read


PLAN: dict[str, Any] = {
    "seeds": [0],
    "tasks": {"tiles": {"subsets": ["crack"]}},
    "methods": {"contrast": {}, "baseline": {}},
    FOOLING: {},
}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)
MODELS = ("honest", "fine-tuned", "passively fooled", "head-shifted", "adaptively fooled")
JOBS = [
    Job("tiles", FOOLING, "", 0),
    *(Job("tiles", method, "crack", 0) for method in ("contrast", "baseline")),
]


def content(job: Job) -> dict[str, Any]:
    """What a job of four samples leaves."""
    samples = {"path": list("abcd"), "label": [0, 1, 0, 1], "subset": ["", "crack", "", "crack"]}
    logits = [[1.0, 0.0], [0.0, 2.0], [0.5, 0.25], [0.0, 1.5]]
    measured: dict[str, Any] = {
        "logits": logits,
        **{name: [0.5, None, 0.25, 1] for name in COLUMNS},
    }
    about = {"hash": hash_of(PLAN), "format_version": 2, **vars(job), "samples": samples}
    if job.method != FOOLING:
        return about | {"models": {job.method: measured}}
    maps = [[[0.0, 1.0], [2.0, -1.0]]]
    measured |= {name: [0.5, 0.25, None, 0.1] for name in FURTHER}
    measured["maps"] = dict.fromkeys(("true", "false", "difference"), maps)
    measured["composite_skill"] = {"rectangles": 0.5, "marked": None}
    models = dict.fromkeys((*MODELS, "knows composites"), measured)
    about |= {"classes": ["intact", "worn"]}
    return about | {"models": models, "pictured": [1], "pictures": [PIXEL]}


def write_results(folder: Path) -> None:
    """A whole folder of results."""
    write_json(folder / "protocol.json", {"hash": hash_of(PLAN), "protocol": PLAN})
    for job in JOBS:
        write_json(folder / job.file, content(job))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON types."""
    if path:
        yield path
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy with a change at one place."""
    copy = json.loads(json.dumps(value))
    within = copy
    for key in path[:-1]:
        within = within[key]
    change(within, path[-1])
    return copy


CHANGES: list[Callable[[Any, Any], None]] = [
    lambda within, key: within.pop(key),
    *(
        lambda within, key, value=value: within.__setitem__(key, value)
        for value in (None, "x", [], {}, [[]], -1, 10**400, 0.5, True, {"a": [1]}, ["x"], 10**9)
    ),
]


def results(folder: Path, count: int, seed: int = 0) -> Tries:
    """Folders of results, one of whose files is changed: bytes, or a value anywhere in it.

    Half of the changed protocols are given the hash that belongs to them, and all jobs it.
    """
    draw_, out = random.Random(seed), folder / "results"
    for number in range(count):

        def table(number: int = number) -> None:
            shutil.rmtree(out, ignore_errors=True)
            write_results(out)
            file = out / draw_.choice(["protocol.json", *(str(job.file) for job in JOBS)])
            if number % 3 == 0:
                written(file, mutated(file.read_bytes(), draw_))
            else:
                whole = json.loads(file.read_text("utf-8"))
                where = sorted(places(whole), key=len)
                chosen = draw_.choice(where[: draw_.choice((12, len(where)))])
                write_json(file, changed(whole, chosen, draw_.choice(CHANGES)))
            if number % 2:
                _rehash(out)
            found = read_results(out)
            in_words(make_tables(found.protocol, found.jobs), "text")
            if number % 8 == 0:
                draw(found, out)

        yield f"results {number}", table


def _rehash(out: Path) -> None:
    try:
        frozen = json.loads((out / "protocol.json").read_text("utf-8"))
        frozen["hash"] = hash_of(frozen["protocol"])
        contents = {job: json.loads((out / job.file).read_text("utf-8")) for job in JOBS}
        for job, one in contents.items():
            write_json(out / job.file, one | {"hash": frozen["hash"]})
        write_json(out / "protocol.json", frozen)
    except (KeyError, TypeError, ValueError, RecursionError):
        pass  # it has no place for a hash
