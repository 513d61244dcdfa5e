"""The whole of the attacks, each kind in a process of its own: `make hostile`.

`python -m hostile.report [KIND ...]` tries what is named, or all. Prints a line of JSON for each
kind and renews its row of docs/reliability.md; the exit status is 1 where anything failed."""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hostile import tries
from hostile.attacks import attack
from hostile.disks import full_disks, read_only_folders, removed_folders
from hostile.kills import kills
from hostile.plans import results, toml_files
from hostile.repeats import repeats, threads
from hostile.runs import COMMANDS

from diffsal.system.files import replacing

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- attacks -->\n", "\n<!-- end -->"
QUICK, WHOLE = 1, 6
MUTATIONS = {QUICK: 100, WHOLE: 2100}
FILES: dict[str, Callable[[Path, int], tries.Tries]] = {
    "weights, odd entries": lambda folder, times: tries.handmade_weights(folder, 6 // times),
    "weights, odd pickles": lambda folder, _times: tries.pickles(folder),
    "weights, bytes changed": lambda folder, times: tries.mutated_weights(folder, MUTATIONS[times]),
    "hub folders, configuration changed": lambda folder, times: tries.configs(folder, 10 * times),
    "images and maps, bytes changed": lambda folder, times: tries.mutated_images(
        folder, MUTATIONS[times]
    ),
    "an image of 88 megapixels": lambda folder, times: tries.large_image(folder, times == WHOLE),
    "index files": lambda folder, times: tries.index_files(folder, 60 * times),
    "TOML files": lambda folder, times: toml_files(folder, 50 * times, 6 // times),
    "folders of results": lambda folder, times: results(folder, 50 * times),
}
"""Attacks by files: makes the tries in a folder, six times as many and more for `WHOLE`."""
RUNS: dict[str, Callable[[Path], tries.Tries]] = {
    **{f"kill -9 of {name}": partial(kills, name=name, count=50) for name in COMMANDS},
    "kill -9 of protocol run with attacks": partial(
        kills, name="protocol run", count=10, with_fooling=True
    ),
    "full disks": full_disks,
    "read-only folders": read_only_folders,
    "folders removed meanwhile": partial(removed_folders, count=10),
    "the same command again": repeats,
    "other numbers of threads": threads,
}
"""What befalls runs. They have processes of their own, whose memory is not measured."""


def main(kinds: Sequence[str]) -> int:
    """Print a row for each kind, and write them all down."""
    failed = False
    for kind in kinds or [*FILES, *RUNS]:
        code = f"import hostile.report as r; r.one({kind!r})"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        row = done.stdout.strip() or json.dumps({"kind": kind, "died": done.returncode})
        print(row, flush=True)
        with replacing(PAGE) as scratch:
            page = renewed(PAGE.read_text("utf-8"), json.loads(row))
            scratch.write_text(page, encoding="utf-8")
        failed |= done.returncode != 0
    return int(failed)


def renewed(page: str, row: Mapping[str, Any]) -> str:
    """The page with this row in its table, in the place of an earlier one of its kind."""
    before, _, rest = page.partition(BEGIN)
    table, _, behind = rest.partition(END)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    lines[row["kind"]] = _line(row)
    order = ["attack", "|---|---|---|---|---|", *FILES, *RUNS]
    kept = sorted((kind for kind in lines if kind in order), key=order.index)
    return before + BEGIN + "\n".join(lines[kind] for kind in kept) + END + behind


def _line(row: Mapping[str, Any]) -> str:
    if "died" in row:
        return f"| {row['kind']} | died | 1 | | |"
    memory = f"{_short(row['worst_mb'])} MB" if row["kind"] in FILES else "–"
    numbers = f"{row['tries']} | {row['failures']} | {_short(row['worst_seconds'])} s"
    return f"| {row['kind']} | {numbers} | {memory} |"


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def one(kind: str) -> None:
    """Print one row, its failures to stderr."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        row = attack(kind, FILES[kind](place, WHOLE) if kind in FILES else RUNS[kind](place))
    print(json.dumps(row.told()))
    print(*row.failures, sep="\n", file=sys.stderr)
    raise SystemExit(int(bool(row.failures)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
