"""The paper's protocol: task × method × held-out subset × seed, each a job that leaves one file.

A :class:`Protocol` is read from TOML, with the samples of its indexes, and frozen: its hash goes
into every file. :func:`run` does the jobs whose files are missing, several at once if asked, on one
machine or on many that share a folder. A job trains a model, shows it the samples that were held
out, and writes each one's logits and map measures; what a table says is computed from these, by
:mod:`diffsal.tables`.

Experiment (a) of the paper, passive fooling, is one more job for each task and seed: it trains a
model with cross-entropy, attacks it (:data:`ATTACKS`), and measures the four models alike.
"""

import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffsal import __version__
from diffsal.data import DecodedImages, ImageDataset, Index, leave_out, read_index, with_test
from diffsal.devices import choose_device, process_rank
from diffsal.errors import DiffsalError
from diffsal.faithfulness import (
    energy_inside,
    marked_share,
    occlusion_drops,
    occlusion_faithfulness,
    pointing_game,
)
from diffsal.files import check_writable, write_json
from diffsal.fooling import FINE_TUNING, fool, target_distance, target_map
from diffsal.losses import LOSSES
from diffsal.models import load_model, save_checkpoint
from diffsal.plots import save_aurocs, save_fooling
from diffsal.report import data_uri
from diffsal.salience import SalienceMaps, explain
from diffsal.tables import FOOLING, RESERVED, Score, aurocs
from diffsal.target_layers import TargetLayer, get_target_layer
from diffsal.train import TrainingConfig, check_split, fit, new_model, read_toml, training_set

__all__ = [
    "ATTACKS",
    "METHODS",
    "Job",
    "Outcome",
    "Protocol",
    "Results",
    "Task",
    "draw",
    "read_protocol",
    "read_results",
    "run",
]

Columns: TypeAlias = dict[str, list[Any]]

METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in LOSSES},
    "contrast-alpha-0.5": {"method": "contrast", "alpha": 0.5},
}
"""What is compared unless told otherwise: cross-entropy, Eq. 2-5, and Eq. 5 with the weight of the
cross-entropy that Eq. 2 gives it."""

ATTACKS: dict[str, dict[str, Any]] = {
    "passively fooled": {"method": "trained", "objective": "true"},
    "head-shifted": {"method": "head-shift"},
    "adaptively fooled": {"method": "trained", "objective": "difference"},
}
"""The models of experiment (a) beside the honest one, and what makes them of it: arguments of
:func:`diffsal.fooling.fool`."""

CONFIGURATION = "protocol.json"
_JOBS, _CACHE = "jobs", "cache"
_KEYS = ("seeds", "training", "tasks", "methods", FOOLING)
_TASK_KEYS = ("index", "maps", "classes", "leave_out", "fraction", "training")
_METHOD_KEYS = ("method", "alpha", "beta", "gamma", "pool")
# Of TrainingConfig, what the grid, the method or the command line says instead, or what needs a
# validation set, which no job has.
_NOT_IN_TRAINING = ("method", "alpha", "beta", "gamma", "seed", "validation", "select")
_OF_THE_MACHINE = ("device", "workers", "tensorboard")
_OF_THE_MODEL = (
    *("architecture", "arguments", "weights", "target_layer", "size", "resize", "mean", "std"),
    *("augment", "pool"),
)
_LONGEST = 200  # characters of a file's name; most file systems take 255 bytes
_OCCLUDED = 40  # images; each costs a forward pass for every cell of its map


# ------------------------------------------------------------------------------------------ config


@dataclass(frozen=True)
class Task:
    """A data set, and what is held out of it.

    Attributes:
        name: for tables.
        index: its samples.
        leave_out: whether each subset is left out of training once and tested; else the index's
            ``test`` is tested, or a ``fraction`` of it where it names no splits.
        fraction: of the normals, or of all samples, that is held out where no splits are named.
        training: of this task; method, weights of the loss and seed come from the job.
    """

    name: str
    index: Index
    leave_out: bool
    fraction: float
    training: TrainingConfig

    def subsets(self) -> list[str]:
        """What is left out in turn; ``""`` alone where nothing is."""
        names = {sample.subset for sample in self.index.samples} - {""}
        if self.leave_out and not names:
            raise DiffsalError(
                f"{self.index.source}: no sample has a subset that could be left out; name them, "
                "or set leave_out = false"
            )
        return sorted(names) if self.leave_out else [""]

    def split(self, subset: str) -> Index:
        """The index with the splits ``train`` and ``test``; normals are split once for all."""
        if subset:
            return leave_out(self.index, subset, self.fraction)
        return with_test(self.index, self.fraction)


@dataclass(frozen=True)
class Job:
    """What is done at once, and leaves one file."""

    task: str
    method: str
    subset: str
    seed: int

    @property
    def file(self) -> Path:
        """Relative to the folder of results."""
        parts = (self.task, self.method, self.subset or "in-set", f"seed{self.seed}")
        return Path(_JOBS, "--".join(map(_slug, parts)) + ".json")

    def __str__(self) -> str:
        return " / ".join((self.task, self.method, self.subset or "in set", f"seed {self.seed}"))


@dataclass(frozen=True)
class Protocol:
    """A frozen configuration.

    Attributes:
        tasks: in the order of the file.
        methods: name to the attributes of :class:`diffsal.train.TrainingConfig` that make it.
        seeds: of every method on every task.
        fooling: how attacks are trained; ``None``: experiment (a) is left out.
    """

    tasks: tuple[Task, ...]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    fooling: TrainingConfig | None

    def jobs(self) -> list[Job]:
        """All of the grid, seed by seed, so that early results span it."""
        subsets = {task.name: task.subsets() for task in self.tasks}
        return _jobs(self.seeds, subsets, list(self.methods), self.fooling is not None)

    def task(self, name: str) -> Task:
        """The task of a job."""
        return next(task for task in self.tasks if task.name == name)

    def training(self, job: Job) -> TrainingConfig:
        """How a job's model is trained; that of experiment (a) with cross-entropy."""
        own = {"method": "cross-entropy"} if job.method == FOOLING else self.methods[job.method]
        return replace(self.task(job.task).training, seed=job.seed, **own)

    def to_dict(self) -> dict[str, Any]:
        """What results depend on, as plain JSON types, without paths of this machine.

        The samples are there by name, label, map, subset, group and split, weights by their bytes;
        what the image files hold is taken to stay as it is.
        """
        return {
            "seeds": list(self.seeds),
            "methods": {name: dict(own) for name, own in self.methods.items()},
            "tasks": {
                task.name: {
                    "classes": list(task.index.classes),
                    "subsets": task.subsets(),
                    "leave_out": task.leave_out,
                    "fraction": task.fraction,
                    "samples": len(task.index.samples),
                    "samples_sha256": _sha256(json.dumps(_identity(task.index)).encode()),
                    "training": _plain(task.training),
                }
                for task in self.tasks
            },
            FOOLING: None if self.fooling is None else _plain(self.fooling),
        }

    def hash(self) -> str:
        """SHA-256 of :meth:`to_dict`, hexadecimal."""
        return _hash(self.to_dict())


def _jobs(
    seeds: Sequence[int],
    subsets: Mapping[str, Sequence[str]],
    methods: Sequence[str],
    with_fooling: bool,
) -> list[Job]:
    jobs = []
    for seed, (task, names) in itertools.product(seeds, subsets.items()):
        if with_fooling:
            jobs.append(Job(task, FOOLING, "", seed))
        jobs += [Job(task, method, subset, seed) for subset in names for method in methods]
    return jobs


def read_protocol(path: str | Path) -> Protocol:
    """Read a protocol from TOML. Paths in it are relative to the file.

    - ``seeds``: a list of whole numbers, or how many, from 0.
    - ``[training]``: attributes of :class:`diffsal.train.TrainingConfig`, for all tasks, but those
      of the method, the seed and validation.
    - ``[tasks.NAME]``: ``index``, and where needed ``maps`` and ``classes`` (see
      :func:`diffsal.data.read_index`), ``leave_out`` (default true), ``fraction`` (0.2), and
      ``training``, which goes before the common one.
    - ``[methods.NAME]``: ``method`` (the name itself, if it is one of
      :data:`diffsal.losses.LOSSES`), ``alpha``, ``beta``, ``gamma``, ``pool``; without any such
      table, :data:`METHODS`.
    - ``[fooling]``: attributes of ``TrainingConfig`` by which the attacks are trained, before those
      of :data:`diffsal.fooling.FINE_TUNING`. Without this table, experiment (a) is left out.

    Raises:
        DiffsalError: an unknown key, a value that cannot be used, a split without a class or
            without the human maps that a method needs; see :func:`diffsal.data.read_index`.
    """
    path = Path(path)
    content = read_toml(path)
    _check_keys(content, _KEYS, str(path))
    methods = {
        name: _method(name, own, f"{path}, [methods.{name}]")
        for name, own in _tables(content.get("methods", METHODS), f"{path}, [methods]")
    }
    tasks = tuple(
        _task(name, own, content.get("training", {}), path)
        for name, own in _tables(content.get("tasks", {}), f"{path}, [tasks]")
    )
    if not tasks or not methods:
        raise DiffsalError(f"{path}: needs at least one [tasks.NAME], and a method")
    if any(len(task.index.classes) != 2 for task in tasks):
        raise DiffsalError(f"{path}: the protocol is for two classes; give another index")
    fooling = None
    if FOOLING in content:
        where = f"{path}, [fooling]"
        given = _training(content[FOOLING], where, _OF_THE_MODEL)
        fooling = TrainingConfig.from_dict({**FINE_TUNING.to_dict(), **given}, where)
    protocol = Protocol(tasks, methods, _seeds(content.get("seeds", 10), path), fooling)
    _check(protocol, path)
    return protocol


def _check(protocol: Protocol, path: Path) -> None:
    """Before anything is trained, see that every job can be."""
    jobs = protocol.jobs()
    names = Counter(job.file.name.lower() for job in jobs)  # some file systems know no case
    longest, (twice, times) = max(names, key=len), names.most_common(1)[0]
    if times > 1:
        raise DiffsalError(f"{path}: two jobs would write {twice}; rename one")
    if len(longest) > _LONGEST:
        raise DiffsalError(f"{path}: {longest} is too long for a file; shorten the names in it")
    asking = [own["method"] for own in protocol.methods.values()]
    learnt = next((method for method in asking if method != "cross-entropy"), "cross-entropy")
    for task in protocol.tasks:
        for subset in task.subsets():
            _check_splits(task.split(subset), learnt, task.leave_out)
        if protocol.fooling is not None:
            _check_splits(task.split(""), "cross-entropy", task.leave_out)


def _check_splits(index: Index, learnt: str, leave_out: bool) -> None:
    """See that every number of the tables can be had, and that no group is learnt and tested."""
    check_split(index, "train", learnt)
    check_split(index, "test", "cross-entropy")
    train, test = index.split("train"), index.split("test")
    shared = sorted({one.group for one in train} & {one.group for one in test} - {""})
    if shared:
        raise DiffsalError(
            f"{index.source}: the group {shared[0]!r} is in train and in test; correct the splits"
        )
    normal = {one.label for one in test if not one.subset}
    for name in sorted({one.subset for one in test} - {""}):
        if name in RESERVED:
            raise DiffsalError(
                f"{index.source}: a subset called {name!r} would look like a column of the tables; "
                "rename it"
            )
        labels = {one.label for one in test if one.subset == name} | normal
        if not leave_out and len(labels) < 2:
            raise DiffsalError(
                f"{index.source}: AUROC is undefined, the tested samples of {name!r} and those "
                "without a subset are all of one class; leave the subset of normals empty"
            )


def _task(name: str, own: Mapping[str, Any], common: Mapping[str, Any], path: Path) -> Task:
    where = f"{path}, [tasks.{name}]"
    _check_keys(own, _TASK_KEYS, where)
    if not isinstance(own.get("index"), str) or not isinstance(own.get("maps", ""), str):
        raise DiffsalError(f'{where}: needs index = "FILE or FOLDER", and maps likewise, if any')
    classes = own.get("classes")
    if classes is not None and not _is_list_of(classes, str):
        raise DiffsalError(f'{where}: classes is a list of names, as ["real", "spoof"]')
    is_left_out, fraction = own.get("leave_out", True), own.get("fraction", 0.2)
    if not isinstance(is_left_out, bool) or not isinstance(fraction, float):
        raise DiffsalError(f"{where}: leave_out is true or false, fraction a number as 0.2")
    maps = path.parent / own["maps"] if "maps" in own else None
    index = read_index(path.parent / own["index"], maps=maps, classes=classes)
    given = {
        **_training(common, f"{path}, [training]"),
        **_training(own.get("training", {}), where),
    }
    weights = given.get("weights", "DEFAULT")
    if isinstance(weights, str) and weights != "none" and not weights.isupper():
        given["weights"] = str(path.parent / weights)
        if not Path(given["weights"]).is_file():
            raise DiffsalError(f"{where}: there are no weights {given['weights']}; make them first")
    return Task(name, index, is_left_out, fraction, TrainingConfig.from_dict(given, where))


def _training(given: Any, where: str, refused: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DiffsalError(f"{where}: is a table of training settings, not {given!r}")
    for name in (*_NOT_IN_TRAINING, *_OF_THE_MACHINE, *refused):
        if name in given:
            raise DiffsalError(
                f"{where}: {name} is none of it; methods and seeds are the grid's, devices the "
                "command line's, the model is the task's, and nothing is validated on"
            )
    return dict(given)


def _is_list_of(given: Any, kind: type) -> bool:
    return isinstance(given, list) and all(type(one) is kind for one in given)


def _method(name: str, own: Mapping[str, Any], where: str) -> dict[str, Any]:
    _check_keys(own, _METHOD_KEYS, where)
    if name == FOOLING:
        raise DiffsalError(f"{where}: is what experiment (a) is called; choose another name")
    chosen = {"method": name, **own}
    if chosen["method"] not in LOSSES:
        raise DiffsalError(f"{where}: needs method, one of {', '.join(LOSSES)}")
    if name in LOSSES and chosen["method"] != name:
        raise DiffsalError(f"{where}: is the name of another loss; choose another name")
    try:
        TrainingConfig(**chosen)
    except DiffsalError as error:
        raise DiffsalError(f"{where}: {str(error).removeprefix('training: ')}") from error
    return chosen


def _seeds(given: Any, path: Path) -> tuple[int, ...]:
    seeds = list(range(given)) if type(given) is int else given
    if not _is_list_of(seeds, int) or not seeds:
        raise DiffsalError(f"{path}: seeds is a number of seeds, or a list of them")
    if len(set(seeds)) < len(seeds):
        raise DiffsalError(f"{path}: a seed is there twice")
    return tuple(seeds)


def _tables(given: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(given, Mapping) or not all(isinstance(x, Mapping) for x in given.values()):
        raise DiffsalError(f"{where}: holds tables, as [tasks.iris]")
    return list(given.items())


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise DiffsalError(f"{where}: the key {name!r} is unknown; known: {', '.join(known)}")


def _identity(index: Index) -> list[list[Any]]:
    return [
        [
            index.relative(sample.path),
            sample.label,
            sample.map and index.relative(sample.map),
            sample.subset,
            sample.group,
            sample.split,
        ]
        for sample in index.samples
    ]


def _plain(config: TrainingConfig) -> dict[str, Any]:
    left_out = (*_NOT_IN_TRAINING, *_OF_THE_MACHINE)
    plain = {name: value for name, value in config.to_dict().items() if name not in left_out}
    if Path(config.weights).is_file():
        plain["weights"] = f"sha256:{_sha256(Path(config.weights).read_bytes())}"
    return plain


def _hash(frozen: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(frozen, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Outcome:
    """What became of a call of :func:`run`.

    Attributes:
        done: jobs that this call did.
        there: jobs of its share that had been done before.
        failed: jobs of its share that failed, and why.
    """

    done: tuple[Job, ...]
    there: tuple[Job, ...]
    failed: tuple[tuple[Job, str], ...]


def run(
    protocol: Protocol,
    out: str | Path,
    *,
    jobs: int = 1,
    shard: tuple[int, int] | None = None,
    device: str = "auto",
    workers: int = 0,
) -> Outcome:
    """Do what is missing of a protocol's jobs.

    A job's file is there whole or not at all, so a call that ends early, however it does, loses the
    jobs that were under way and no other. Images are decoded once, into files that all processes
    share.

    Args:
        protocol: what is to be done.
        out: folder of ``protocol.json``, ``jobs/`` and ``cache/``. Many machines may share it.
        jobs: processes that do jobs at once. On a CPU each has its share of the cores, which
            changes the last bits of what it computes.
        shard: (i, n), from 1: do every n-th job, from the i-th on. ``None``: all; under torchrun
            the process's own.
        device: see :func:`diffsal.devices.choose_device`.
        workers: processes that prepare the images of one job; 0: the job's own.

    Raises:
        DiffsalError: ``out`` holds another protocol's results or cannot be written to; no such
            shard; an image that cannot be read; a process was ended from outside. What a single
            job raises is in the outcome.
    """
    out = Path(out)
    rank, world = (shard[0] - 1, shard[1]) if shard else process_rank()
    if not 0 <= rank < world:
        raise DiffsalError(f"there is no shard {rank + 1}/{world}; pass one from 1/{world}")
    choose_device(device)
    identity = _freeze(protocol, out)
    mine = protocol.jobs()[rank::world]
    missing = [job for job in mine if not (out / job.file).is_file()]
    reads = _decoded(protocol, {job.task for job in missing}, out / _CACHE)
    errors: dict[Job, str | None] = {}
    do = partial(_attempt, protocol, identity, reads, out, device, workers)
    with tqdm(total=len(missing), unit="job", disable=None) as bar:
        for job, error in _outcomes(do, missing, jobs):
            errors[job] = error
            tqdm.write(f"{job}: {error or 'done'}", file=sys.stderr)
            bar.update()
    return Outcome(
        done=tuple(job for job, error in errors.items() if error is None),
        there=tuple(job for job in mine if job not in errors),
        failed=tuple((job, error) for job, error in errors.items() if error is not None),
    )


def _freeze(protocol: Protocol, out: Path) -> str:
    """The protocol's hash, which the folder is for from now on."""
    check_writable(out)
    file, frozen = out / CONFIGURATION, protocol.to_dict()
    identity = _hash(frozen)
    if not file.exists():
        write_json(file, {"hash": identity, "protocol": frozen})
        return identity
    before = _read(file, ("hash", "protocol"))
    if before["hash"] == identity:
        return identity
    old, new = (dict(_leaves(one)) for one in (before["protocol"], frozen))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    raise DiffsalError(
        f"{out}: holds results of another protocol, with another {', '.join(names[:3]) or 'hash'}; "
        "choose another --out"
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping's values by dotted names."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _decoded(protocol: Protocol, tasks: set[str], folder: Path) -> dict[str, DecodedImages]:
    """What reads each task's samples; the processes of a machine wait for the one that decodes."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        return {
            task.name: DecodedImages(task.index.samples, task.training.preprocessing(), folder)
            for task in protocol.tasks
            if task.name in tasks
        }


def _outcomes(do: Any, missing: Sequence[Job], jobs: int) -> Iterator[tuple[Job, str | None]]:
    """Each job and its error, as they end."""
    if jobs == 1:
        yield from ((job, do(job)) for job in missing)
        return
    threads, others = max(1, (os.cpu_count() or 1) // jobs), set(active_children())
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker, (threads,))
    try:
        futures = {pool.submit(do, job): job for job in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except KeyboardInterrupt:
        for worker in set(active_children()) - others:
            worker.terminate()  # or it would end its job first
        raise
    except BrokenProcessPool as error:
        raise DiffsalError(
            "a process that did jobs was ended from outside, which lack of memory does, too: the "
            "jobs that are done stay; start again, perhaps with fewer --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    # An interrupt is the parent's, who ends this process. Here it could come while a lock is held.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers, which would hold the machine for good."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _attempt(
    protocol: Protocol,
    identity: str,
    reads: Mapping[str, DecodedImages],
    out: Path,
    device: str,
    workers: int,
    job: Job,
) -> str | None:
    """Do a job and write its file; the error, if there is one, in a line."""
    started = time.perf_counter()
    config = replace(protocol.training(job), device=device, workers=workers)
    index = protocol.task(job.task).split(job.subset)
    try:
        do = _fool if job.method == FOOLING else _train
        result = do(protocol, job, index, config, reads[job.task])
        seconds = time.perf_counter() - started
        record = {"hash": identity, **_about(job, index, device), **result, "seconds": seconds}
        write_json(out / job.file, record, indent=None)
    except Exception as error:  # the next job may well succeed
        kind = "" if isinstance(error, DiffsalError) else f"{type(error).__name__}: "
        return kind + next(iter(str(error).splitlines()), "failed")
    return None


def _about(job: Job, index: Index, device: str) -> dict[str, Any]:
    """What a job's file says beside its results."""
    samples, place = index.split("test"), choose_device(device)
    return {
        "task": job.task,
        "method": job.method,
        "subset": job.subset,
        "seed": job.seed,
        "classes": list(index.classes),
        "samples": {
            "path": [index.relative(one.path) for one in samples],
            "label": [one.label for one in samples],
            "subset": [one.subset for one in samples],
        },
        "trained_on": len(index.split("train")),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "versions": {"diffsal": __version__, "torch": torch.__version__},
    }


def _train(
    _protocol: Protocol, job: Job, index: Index, config: TrainingConfig, read: DecodedImages
) -> dict[str, Any]:
    """A method's model on the samples that were held out."""
    model, description, epochs = _trained(index, config, read)
    layer = get_target_layer(model, description["target_layer"])
    test = ImageDataset(index.split("test"), description["preprocessing"], read=read)
    return {
        "epochs": epochs,
        "models": {job.method: _measured(model, layer, test, config)},
    }


def _trained(
    index: Index, config: TrainingConfig, read: DecodedImages
) -> tuple[nn.Module, dict[str, Any], list[dict[str, float]]]:
    model, description = new_model(index, config)
    model = model.to(choose_device(config.device))
    training = training_set(index, config, description["preprocessing"], read)
    layer = get_target_layer(model, description["target_layer"])
    records = fit(
        model, config.criterion(), training, None, config, target_layer=layer, progress=False
    )
    return model, description, list(records)


def _fool(
    protocol: Protocol, job: Job, index: Index, config: TrainingConfig, read: DecodedImages
) -> dict[str, Any]:
    """An honest model and the attacks on it, on the samples that were held out."""
    assert protocol.fooling is not None
    model, description, epochs = _trained(index, config, read)
    test = ImageDataset(index.split("test"), description["preprocessing"], read=read)
    attack = replace(protocol.fooling, seed=job.seed, device=config.device, workers=config.workers)
    models: dict[str, dict[str, Any]] = {}
    pictured: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        honest = Path(folder, "honest.pt")
        save_checkpoint(honest, model, **description)
        for name in ("honest", *ATTACKS):
            path = honest
            if name in ATTACKS:
                path = Path(folder, "fooled.pt")
                fool(index, load_model(honest), path, config=attack, read=read, **ATTACKS[name])
            loaded = load_model(path)
            model, layer = loaded.model.to(choose_device(config.device)), loaded.target_layer
            models[name] = _measured(model, layer, test, config, with_edges=True)
            models[name] |= _occluded(model, layer, test)
            pictured = pictured or _typical(models["honest"]["logits"], index)
            models[name]["maps"] = _maps_of(model, layer, test, pictured)
    pictures = [data_uri(read(test.samples[one], test.preprocessing)[0]) for one in pictured]
    return {"epochs": epochs, "models": models, "pictured": pictured, "pictures": pictures}


# ---------------------------------------------------------------------------------------- measures


def _measured(
    model: nn.Module,
    layer: TargetLayer,
    test: ImageDataset,
    config: TrainingConfig,
    with_edges: bool = False,
) -> Columns:
    """Of every sample: logits; where the true and the difference map lie; their common part."""
    parts: list[dict[str, Tensor]] = []
    for images, labels, human, _ in DataLoader(test, config.batch_size):
        maps = _explained(model, layer, images, labels)
        columns = {"logits": maps.logits}
        for name in ("true", "difference"):
            one = getattr(maps, name)
            columns[f"pointing_{name}"] = pointing_game(one, human)
            columns[f"energy_{name}"] = energy_inside(one, human)
            if with_edges:
                frame = target_map("edges", (one.shape[1], one.shape[2]))
                columns[f"edges_{name}"] = target_distance(one, frame)
        columns["marked_share"] = marked_share(human)
        columns["common_mode_share"] = maps.common_mode_share
        parts.append(columns)
    return {name: _column(torch.cat([part[name] for part in parts])) for name in parts[0]}


def _occluded(model: nn.Module, layer: TargetLayer, test: ImageDataset) -> Columns:
    """Of some samples, spread over the index: does what the maps mark move the margin?"""
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(test) - 1, min(_OCCLUDED, len(test))).astype(int).tolist()
    columns = {
        f"occlusion_{name}": torch.full((len(test),), torch.nan) for name in ("true", "difference")
    }
    for position in chosen:
        image, label, _, _ = test[position]
        inputs, labels = image[None], torch.tensor([label])
        maps = _explained(model, layer, inputs, labels)
        drops = occlusion_drops(
            model, inputs.to(device), labels.to(device), grid=maps.true.shape[1:]
        ).cpu()
        for name in ("true", "difference"):
            faithful = occlusion_faithfulness(getattr(maps, name), drops)
            columns[f"occlusion_{name}"][position] = faithful[0]
    return {name: _column(column) for name, column in columns.items()}


def _typical(logits: Sequence[Sequence[float]], index: Index) -> list[int]:
    """Of each class, the tested sample whose margin is the median."""
    labels = np.array([sample.label for sample in index.split("test")])
    margins = np.array(logits) @ ([1.0] if len(logits[0]) == 1 else [-1.0, 1.0])
    chosen = []
    for label in range(len(index.classes)):
        (positions,) = np.nonzero(labels == label)
        order = positions[np.argsort(margins[positions], kind="stable")]
        chosen.append(int(order[len(order) // 2]))
    return chosen


def _maps_of(
    model: nn.Module, layer: TargetLayer, test: ImageDataset, chosen: Sequence[int]
) -> dict[str, list[Any]]:
    """Raw maps (h, w) of some samples, logits per cell."""
    images, labels, _, _ = zip(*(test[position] for position in chosen), strict=True)
    maps = _explained(model, layer, torch.stack(images), torch.tensor(labels))
    return {name: _column(getattr(maps, name)) for name in ("true", "false", "difference")}


def _explained(
    model: nn.Module, layer: TargetLayer, images: Tensor, labels: Tensor
) -> SalienceMaps:
    """The maps of a batch with its labels taken as true, in float32 on the CPU."""
    device = next(model.parameters()).device
    return explain(model, images.to(device), labels.to(device), target_layers=layer).to("cpu")


def _column(values: Tensor) -> list[Any]:
    """Numbers as short as tells float32 values apart; ``None`` for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return float(str(np.float32(value))) if math.isfinite(value) else None

    column: list[Any] = plain(values.tolist())
    return column


# ----------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
        protocol: see :meth:`Protocol.to_dict`.
        hash: see :meth:`Protocol.hash`.
        jobs: the content of each job's file.
        missing: how many jobs have no file yet.
    """

    protocol: dict[str, Any]
    hash: str
    jobs: tuple[dict[str, Any], ...]
    missing: int


def read_results(out: str | Path) -> Results:
    """Read a folder that :func:`run` writes to, finished or not.

    Raises:
        DiffsalError: there are no results, or a file is damaged or of another protocol.
    """
    out = Path(out)
    if not (out / CONFIGURATION).is_file():
        raise DiffsalError(f"{out}: no {CONFIGURATION} here; run diffsal protocol run first")
    frozen = _read(out / CONFIGURATION, ("hash", "protocol"))
    protocol = frozen["protocol"]
    subsets = {name: task["subsets"] for name, task in protocol["tasks"].items()}
    with_fooling = protocol[FOOLING] is not None
    planned = _jobs(protocol["seeds"], subsets, list(protocol["methods"]), with_fooling)
    results = []
    for job in planned:
        file = out / job.file
        if file.is_file():
            results.append(_read(file, ("hash", "task", "method", "subset", "seed", "models")))
            if results[-1]["hash"] != frozen["hash"]:
                raise DiffsalError(f"{file}: is of another protocol; remove it and run again")
    if not results:
        raise DiffsalError(f"{out}: no job is done yet; run diffsal protocol run")
    return Results(protocol, frozen["hash"], tuple(results), len(planned) - len(results))


def draw(results: Results, out: str | Path, score: Score = "margin") -> list[Path]:
    """Draw each task's AUROC by subset and method, and the Figure 1 of its first fooled model.

    Returns:
        The PNG files, in the folder ``plots`` of ``out``.
    """
    folder, paths = Path(out, "plots"), []
    for task, by_method in aurocs(results.jobs, score).items():
        ordered = {
            name: by_method[name] for name in results.protocol["methods"] if name in by_method
        }
        paths.append(folder / f"{_slug(task)}-auroc.png")
        save_aurocs(paths[-1], f"{task}: AUROC by subset, a dot for each seed", ordered)
    for task in results.protocol["tasks"]:
        jobs = [job for job in results.jobs if (job["task"], job["method"]) == (task, FOOLING)]
        if jobs:
            first = min(jobs, key=lambda job: job["seed"])
            paths.append(folder / f"{_slug(task)}-figure-1.png")
            save_fooling(paths[-1], f"{task}: maps of honest and fooled models", first)
    return paths


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def _read(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffsalError(f"{file}: cannot be read ({error}); remove it and run again") from error
    if not isinstance(content, dict) or not {*keys} <= {*content}:
        raise DiffsalError(f"{file}: is damaged; remove it and run again")
    return content
