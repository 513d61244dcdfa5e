"""A folder of results: read back, and drawn."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsal.errors import DiffsalError
from diffsal.protocol.configuration import grid, hash_of, slug
from diffsal.protocol.job_files import is_plan, is_whole
from diffsal.protocol.plots import save_aurocs, save_fooling
from diffsal.protocol.scores import FOOLING, Score, aurocs
from diffsal.system.files import read_text
from diffsal.system.locks import remove_scratch

CONFIGURATION = "protocol.json"
"""The file with the protocol that a folder of results is for, and its hash."""
FORMAT_VERSION = 2
"""Of a job's file. Files of version 1 do not name it; those of experiment (a) had no control."""


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
        protocol: see :meth:`diffsal.protocol.configuration.Protocol.to_dict`.
        hash: see :meth:`diffsal.protocol.configuration.Protocol.hash`.
        jobs: the content of each job's file.
        missing: how many jobs have no file yet.

    Example:
        >>> results = Results({"seeds": [0, 1]}, "0f", ({"seed": 0, "models": {}},), missing=1)
        >>> [job["seed"] for job in results.jobs]
        [0]
    """

    protocol: dict[str, Any]
    hash: str
    jobs: tuple[dict[str, Any], ...]
    missing: int


def read_results(out: str | Path) -> Results:
    """Read a folder that :func:`diffsal.protocol.jobs.run` writes to, finished or not.

    Raises:
        DiffsalError: there are no results, or a file is damaged, of another protocol, or of another
            format.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diffsal.protocol.job_files import COLUMNS
        >>> from diffsal.system.files import write_json
        >>> tasks = {"tiles": {"subsets": [""]}}
        >>> plan = {"seeds": [0, 1], "tasks": tasks, "methods": {"contrast": {}}, "fooling": None}
        >>> job = {"task": "tiles", "method": "contrast", "subset": "", "seed": 0}
        >>> samples = {"path": ["a.png"], "label": [1], "subset": [""]}
        >>> models = {"contrast": {"logits": [[0, 1]], **dict.fromkeys(COLUMNS, [0.5])}}
        >>> with TemporaryDirectory() as name:
        ...     write_json(Path(name, "protocol.json"), {"hash": hash_of(plan), "protocol": plan})
        ...     file = Path(name, "jobs", "tiles--contrast--in-set--seed0.json")
        ...     content = {"hash": hash_of(plan), **job, "samples": samples, "models": models}
        ...     write_json(file, content)
        ...     results = read_results(name)
        >>> len(results.jobs), results.missing
        (1, 1)
    """
    out = Path(out)
    if not (out / CONFIGURATION).is_file():
        raise DiffsalError(f"{out}: no {CONFIGURATION} here; run diffsal protocol run first")
    frozen = read_json(out / CONFIGURATION, ("hash", "protocol"))
    protocol = frozen["protocol"]
    if frozen["hash"] != hash_of(protocol) or not is_plan(protocol):
        raise DiffsalError(
            f"{out / CONFIGURATION}: is damaged; put it back, or run into another --out"
        )
    subsets = {name: task["subsets"] for name, task in protocol["tasks"].items()}
    with_fooling = protocol.get(FOOLING) is not None
    planned = grid(protocol["seeds"], subsets, list(protocol["methods"]), with_fooling)
    results = []
    for job in planned:
        file = out / job.file
        if os.path.isfile(file):  # whatever it is called
            results.append(read_json(file, ("hash", "task", "method", "subset", "seed", "models")))
            if results[-1]["hash"] != frozen["hash"]:
                raise DiffsalError(f"{file}: is of another protocol; remove it and run again")
            version = results[-1].get("format_version", 1)
            oldest = FORMAT_VERSION if job.method == FOOLING else 1
            if type(version) is not int or not oldest <= version <= FORMAT_VERSION:
                raise DiffsalError(
                    f"{file}: has format {version}, which this diffsal does not read; remove it "
                    "and run again, or read it with the diffsal that wrote it"
                )
            if not is_whole(results[-1], job):
                raise DiffsalError(f"{file}: is damaged; remove it and run again")
    if not results:
        raise DiffsalError(f"{out}: no job is done yet; run diffsal protocol run")
    return Results(protocol, frozen["hash"], tuple(results), len(planned) - len(results))


def draw(results: Results, out: str | Path, score: Score = "margin") -> list[Path]:
    """Draw each task's AUROC by subset and method, and the Figure 1 of its first fooled model.

    Returns:
        The PNG files, in the folder ``plots`` of ``out``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> job = {"task": "tiles", "method": "contrast", "subset": "crack", "seed": 0}
        >>> models = {"contrast": {"logits": [[1, 0], [0, 1]]}}
        >>> samples = {"label": [0, 1], "subset": ["", "crack"]}
        >>> plan = {"methods": {"contrast": {}}, "tasks": {"tiles": {}}}
        >>> with TemporaryDirectory() as name:
        ...     job |= {"samples": samples, "models": models}
        ...     [path.name for path in draw(Results(plan, "0f", (job,), 0), name)]
        ['tiles-auroc.png']
    """
    folder, paths = Path(out, "plots"), []
    remove_scratch(folder)
    for task, by_method in aurocs(results.jobs, score).items():
        ordered = {
            name: by_method[name] for name in results.protocol["methods"] if name in by_method
        }
        paths.append(folder / f"{slug(task)}-auroc.png")
        save_aurocs(paths[-1], f"{task}: AUROC by subset, a dot for each seed", ordered)
    for task in results.protocol["tasks"]:
        jobs = [job for job in results.jobs if (job["task"], job["method"]) == (task, FOOLING)]
        if jobs:
            first = min(jobs, key=lambda job: job["seed"])
            paths.append(folder / f"{slug(task)}-figure-1.png")
            save_fooling(paths[-1], f"{task}: maps of honest and fooled models", first)
    return paths


def read_json(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A file of a folder of results.

    Raises:
        DiffsalError: it cannot be read, or has not all of the ``keys``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name:
        ...     _ = Path(name, "job.json").write_text('{"seed": 3}')
        ...     read_json(Path(name, "job.json"), ("seed",))
        {'seed': 3}
    """
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise DiffsalError(f"{file}: cannot be read ({error}); remove it and run again") from error
    if not isinstance(content, dict) or not {*keys} <= {*content}:
        raise DiffsalError(f"{file}: is damaged; remove it and run again")
    return content
