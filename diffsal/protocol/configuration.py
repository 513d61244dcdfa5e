"""The paper's protocol: task × method × held-out subset × seed, each a job that leaves one file.

A :class:`Protocol` is read from TOML, with the samples of its indexes, and frozen: its hash goes
into every file. :func:`diffsal.protocol.jobs.run` does the jobs whose files are missing, several at
once if asked, on one machine or on many that share a folder. A job trains a model, shows it the
samples that were held out, and writes each one's logits and map measures; what a table says is
computed from these, by :mod:`diffsal.protocol.tables`.

Experiment (a) of the paper, passive fooling, is one more job for each task and seed: it trains a
model with cross-entropy, attacks it (:data:`diffsal.protocol.experiments.ATTACKS`), and measures
them all alike."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffsal.data.index import Index, read_index
from diffsal.data.splits import leave_out, with_test
from diffsal.errors import DiffsalError
from diffsal.fooling.attack import FINE_TUNING
from diffsal.protocol.scores import FOOLING
from diffsal.protocol.tables import RESERVED
from diffsal.training.config import TrainingConfig, read_toml
from diffsal.training.losses import LOSSES
from diffsal.training.run import check_split

METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in LOSSES},
    "contrast-alpha-0.5": {"method": "contrast", "alpha": 0.5},
}
"""What is compared unless told otherwise: cross-entropy, Eq. 2-5, and Eq. 5 with the weight of the
cross-entropy that Eq. 2 gives it."""
JOBS_FOLDER = "jobs"

_KEYS = ("seeds", "training", "tasks", "methods", FOOLING)
_TASK_KEYS = ("index", "maps", "classes", "leave_out", "fraction", "training")
_METHOD_KEYS = ("method", "alpha", "beta", "gamma", "dynamic_alpha", "map_of", "pool")
# Of TrainingConfig, what the grid, the method or the command line says instead, or what needs a
# validation set, which no job has.
_NOT_IN_TRAINING = (
    *("method", "alpha", "beta", "gamma", "dynamic_alpha", "map_of"),
    *("seed", "validation", "select"),
)
_OF_THE_MACHINE = ("device", "workers", "tensorboard")
_OF_THE_MODEL = (
    *("architecture", "arguments", "weights", "target_layer", "size", "resize", "mean", "std"),
    *("augment", "pool"),
)
_MOST_SEEDS = 10_000
_LONGEST = 200  # characters of a file's name; most file systems take 255 bytes


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

    Example:
        >>> from diffsal.data.index import Sample
        >>> intact = Sample(Path("a"), 0), Sample(Path("b"), 0)
        >>> worn = (Sample(Path(name), 1, subset=name) for name in ("crack", "fray"))
        >>> index = Index(Path("index.csv"), ("intact", "worn"), (*intact, *worn))
        >>> task = Task("tiles", index, leave_out=True, fraction=0.5, training=TrainingConfig())
        >>> task.subsets()
        ['crack', 'fray']
        >>> [sample.path.name for sample in task.split("fray").split("train")]
        ['a', 'crack']
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
    """What is done at once, and leaves one file.

    Example:
        >>> Job("tiles", "contrast", "crack", 0).file.as_posix()
        'jobs/tiles--contrast--crack--seed0.json'
    """

    task: str
    method: str
    subset: str
    seed: int

    @property
    def file(self) -> Path:
        """Relative to the folder of results."""
        parts = (self.task, self.method, self.subset or "in-set", f"seed{self.seed}")
        return Path(JOBS_FOLDER, "--".join(map(slug, parts)) + ".json")

    def __str__(self) -> str:
        return " / ".join((self.task, self.method, self.subset or "in set", f"seed {self.seed}"))


@dataclass(frozen=True)
class Protocol:
    """A frozen configuration.

    Attributes:
        tasks: in the order of the file.
        methods: name to the attributes of :class:`diffsal.training.config.TrainingConfig` that make
            it.
        seeds: of every method on every task.
        fooling: how attacks are trained; ``None``: experiment (a) is left out.

    Example:
        >>> index = Index(Path("index.csv"), ("intact", "worn"), ())
        >>> task = Task("tiles", index, leave_out=False, fraction=0.2, training=TrainingConfig())
        >>> mine = {"method": "per-class", "beta": 2.0}
        >>> protocol = Protocol((task,), {"mine": mine}, seeds=(0, 1), fooling=None)
        >>> [str(job) for job in protocol.jobs()]
        ['tiles / mine / in set / seed 0', 'tiles / mine / in set / seed 1']
        >>> protocol.training(protocol.jobs()[1]).criterion().weights
        {'cross_entropy': 0.3, 'true': 2.0, 'false': 0.3}
    """

    tasks: tuple[Task, ...]
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    fooling: TrainingConfig | None

    def jobs(self) -> list[Job]:
        """All of the grid, in the order of :func:`grid`."""
        subsets = {task.name: task.subsets() for task in self.tasks}
        return grid(self.seeds, subsets, list(self.methods), self.fooling is not None)

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
                    "samples_sha256": hash_of(_identity(task.index)),
                    "training": _plain(task.training),
                }
                for task in self.tasks
            },
            FOOLING: None if self.fooling is None else _plain(self.fooling),
        }

    def hash(self) -> str:
        """SHA-256 of :meth:`to_dict`, hexadecimal."""
        return hash_of(self.to_dict())


def grid(
    seeds: Sequence[int],
    subsets: Mapping[str, Sequence[str]],
    methods: Sequence[str],
    with_fooling: bool,
) -> list[Job]:
    """All jobs of a grid, seed by seed."""
    jobs = []
    for seed, (task, names) in itertools.product(seeds, subsets.items()):
        if with_fooling:
            jobs.append(Job(task, FOOLING, "", seed))
        jobs += [Job(task, method, subset, seed) for subset in names for method in methods]
    return jobs


def read_protocol(path: str | Path) -> Protocol:
    """Read a protocol from TOML. Paths in it are relative to the file.

    - ``seeds``: a list of whole numbers, or how many, from 0.
    - ``[training]``: attributes of :class:`diffsal.training.config.TrainingConfig`, for all tasks,
      but those of the method, the seed and validation.
    - ``[tasks.NAME]``: ``index``, and where needed ``maps`` and ``classes`` (see
      :func:`diffsal.data.index.read_index`), ``leave_out`` (default true), ``fraction`` (0.2), and
      ``training``, which goes before the common one.
    - ``[methods.NAME]``: ``method`` (the name itself, if it is one of
      :data:`diffsal.training.losses.LOSSES`), its weights, ``dynamic_alpha``,
      ``map_of``, ``pool``; without any such table, :data:`METHODS`.
    - ``[fooling]``: attributes of ``TrainingConfig`` by which the attacks are trained, before those
      of :data:`diffsal.fooling.attack.FINE_TUNING`. Without this table, experiment (a) is left out.

    Raises:
        DiffsalError: an unknown key, a value that cannot be used, a split without a class or
            without the human maps that a method needs; see :func:`diffsal.data.index.read_index`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name:
        ...     folder = Path(name)
        ...     for number in range(20):
        ...         image = folder / "tiles" / "ab"[number % 2] / f"{number}.png"
        ...         image.parent.mkdir(parents=True, exist_ok=True)
        ...         image.touch()  # images are opened later
        ...     text = "seeds = 2\\n[tasks.tiles]\\nindex = 'tiles'\\nleave_out = false\\n"
        ...     _ = (folder / "grid.toml").write_text(text + "[methods.cross-entropy]")
        ...     for job in read_protocol(folder / "grid.toml").jobs():
        ...         print(job)
        tiles / cross-entropy / in set / seed 0
        tiles / cross-entropy / in set / seed 1
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
        if not os.path.isfile(given["weights"]):
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
    if not isinstance(chosen["method"], str) or chosen["method"] not in LOSSES:
        raise DiffsalError(f"{where}: needs method, one of {', '.join(LOSSES)}")
    if name in LOSSES and chosen["method"] != name:
        raise DiffsalError(f"{where}: is the name of another loss; choose another name")
    try:
        TrainingConfig(**chosen)
    except DiffsalError as error:
        raise DiffsalError(f"{where}: {str(error).removeprefix('training: ')}") from error
    return chosen


def _seeds(given: Any, path: Path) -> tuple[int, ...]:
    count = given if type(given) is int else len(given) if _is_list_of(given, int) else 0
    if not 0 < count <= _MOST_SEEDS:
        raise DiffsalError(
            f"{path}: seeds is a number of seeds, 1 to {_MOST_SEEDS}, or a list of them"
        )
    seeds = tuple(range(given) if type(given) is int else given)
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise DiffsalError(f"{path}: a seed is a whole number from 0 to {2**32 - 1}")
    if len(set(seeds)) < count:
        raise DiffsalError(f"{path}: a seed is there twice")
    return seeds


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
    if os.path.isfile(config.weights):
        digest = hashlib.sha256(Path(config.weights).read_bytes()).hexdigest()
        plain["weights"] = f"sha256:{digest}"
    return plain


def hash_of(value: Any) -> str:
    """SHA-256, hexadecimal, of plain JSON types, in whatever order their keys are.

    Example:
        >>> hash_of({"seeds": [0], "tasks": {}}) == hash_of({"tasks": {}, "seeds": [0]})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def slug(text: str) -> str:
    """A name as part of a file's name.

    Example:
        >>> slug("contacts + print")
        'contacts-print'
    """
    return re.sub(r"[^\w.-]+", "-", text)
