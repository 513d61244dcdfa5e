"""Contestants in turns, and what is kept of their times.

All that is compared takes turns within each round, so that what else the machine does hits all
alike. A ratio is the median over rounds of the ratio within each round; beside it stand the first
and the third quartile.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch

Row: TypeAlias = dict[str, Any]
"""A line of `benchmarks/results/schema.json`."""

PEERS = ("grad-cam", "torchcam", "captum", "monai")


def in_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    *,
    calls: int = 1,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call in each round, after those to warm up; each round begins with another."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for round_ in range(rounds + warm_up):
        for name in order:
            synchronize(device)
            start = clock()
            for _ in range(calls):
                contestants[name]()
            synchronize(device)
            if round_ >= warm_up:
                seconds[name].append((clock() - start) / calls)
        order = [*order[1:], order[0]]
    return seconds


def clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU its own seconds, which other load does not stretch; one thread alone is timed."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def synchronize(device: torch.device | None) -> None:
    """Wait for what the device still has to do."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(group: str, setting: Mapping[str, Any], seconds: Mapping[str, list[float]]) -> list[Row]:
    """Every contestant as a multiple of the first."""
    (against, base), *others = seconds.items()
    return [
        row(group, name, setting, [one / of for one, of in zip(times, base, strict=True)])
        | {"against": against, "milliseconds": 1e3 * statistics.median(times)}
        for name, times in others
    ]


def row(
    group: str, name: str, setting: Mapping[str, Any], values: Sequence[float], unit: str = "ratio"
) -> Row:
    """Median and quartiles of the values of all rounds."""
    low, _, high = statistics.quantiles([*values, *values], method="inclusive")
    return {
        "group": group,
        "name": name,
        "setting": dict(setting),
        "unit": unit,
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "rounds": len(values),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: found for name in PEERS if (found := _version(name))},
    }


def printed(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    lines, before = [], None
    for one in rows:
        setting = ", ".join(f"{name} {value}" for name, value in one["setting"].items())
        if (one["group"], setting) != before:
            lines.append(f"\n{one['group']}: {setting}")
            before = one["group"], setting
        spread = f"{one['median']:10.3f} ({one['low']:.3f} to {one['high']:.3f})"
        lines.append(f"  {one['name']:<48} {spread} {one['unit']}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
