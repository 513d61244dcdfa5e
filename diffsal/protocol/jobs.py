"""The grid's jobs: run, resumed, and shared by processes and machines."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from diffsal import __version__
from diffsal.data.datasets import DecodedImages
from diffsal.data.index import Index
from diffsal.errors import DiffsalError
from diffsal.protocol.configuration import JOBS_FOLDER, Job, Protocol, hash_of
from diffsal.protocol.experiments import fool_job, train_job
from diffsal.protocol.results import CONFIGURATION, FORMAT_VERSION, read_json
from diffsal.protocol.scores import FOOLING
from diffsal.system.devices import choose_device
from diffsal.system.files import check_writable, write_json
from diffsal.system.locks import remove_scratch
from diffsal.system.processes import process_rank

_CACHE = "cache"


@dataclass(frozen=True)
class Outcome:
    """What became of a call of :func:`run`.

    Attributes:
        done: jobs that this call did.
        there: jobs of its share that had been done before.
        failed: jobs of its share that failed, and why.

    Example:
        >>> job = Job("tiles", "contrast", "crack", 0)
        >>> outcome = Outcome(done=(), there=(), failed=((job, "the loss is not finite"),))
        >>> [f"{job}: {error}" for job, error in outcome.failed]
        ['tiles / contrast / crack / seed 0: the loss is not finite']
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
        device: see :func:`diffsal.system.devices.choose_device`.
        workers: processes that prepare the images of one job; 0: the job's own.

    Raises:
        DiffsalError: ``out`` holds another protocol's results or cannot be written to; no such
            shard; an image that cannot be read; a process was ended from outside. What a single
            job raises is in the outcome.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from PIL import Image
        >>> from diffsal.data.index import Sample
        >>> from diffsal.protocol.configuration import Task
        >>> from diffsal.training.config import TrainingConfig
        >>> config = TrainingConfig(
        ...     architecture="torchvision:DenseNet",
        ...     arguments={"growth_rate": 2, "block_config": [1, 1], "num_init_features": 2},
        ...     weights="none", size=32, epochs=1, batch_size=4,
        ... )
        >>> with TemporaryDirectory() as name:
        ...     samples = []
        ...     for number, split in enumerate(["train"] * 4 + ["test"] * 2):
        ...         path = Path(name, f"{number}.png")
        ...         Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(path)
        ...         samples.append(Sample(path, number % 2, split=split))
        ...     index = Index(Path(name, "index.csv"), ("intact", "worn"), tuple(samples))
        ...     task = Task("grey", index, leave_out=False, fraction=0.2, training=config)
        ...     protocol = Protocol((task,), {"plain": {"method": "cross-entropy"}}, (0,), None)
        ...     first = run(protocol, Path(name, "results"), device="cpu")
        ...     again = run(protocol, Path(name, "results"), device="cpu")
        >>> len(first.done), len(again.done), len(again.there)
        (1, 0, 1)
    """
    out = Path(out)
    rank, world = (shard[0] - 1, shard[1]) if shard else process_rank()
    if not 0 <= rank < world:
        raise DiffsalError(f"there is no shard {rank + 1}/{world}; pass one from 1/{world}")
    choose_device(device)
    identity = _freeze(protocol, out)
    for folder in (out, out / JOBS_FOLDER, out / _CACHE):
        remove_scratch(folder)
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
    identity = hash_of(frozen)
    if not file.exists():
        write_json(file, {"hash": identity, "protocol": frozen})
        return identity
    before = read_json(file, ("hash", "protocol"))
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
        if job.method == FOOLING and protocol.fooling is not None:
            result = fool_job(protocol.fooling, index, config, reads[job.task], out / _CACHE)
        else:
            result = train_job(job, index, config, reads[job.task])
        seconds = time.perf_counter() - started
        about = {"hash": identity, "format_version": FORMAT_VERSION, **_about(job, index, device)}
        record = {**about, **result, "seconds": seconds}
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
