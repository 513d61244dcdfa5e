"""The whole of the attacks on files, each kind in a process of its own: a line of JSON for each.

``PYTHONPATH=.:tests python -m hostile.report``; the exit status is 1 where anything failed."""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from hostile import tries
from hostile.attacks import attack

QUICK, WHOLE = 1, 6
ROWS: dict[str, Callable[[Path, int], tries.Tries]] = {
    "weights, odd entries": lambda folder, times: tries.handmade_weights(folder, 6 // times),
    "weights, odd pickles": lambda folder, _times: tries.pickles(folder),
    "weights, bytes changed": lambda folder, times: tries.mutated_weights(folder, 100 * times),
    "hub folders, configuration changed": lambda folder, times: tries.configs(folder, 10 * times),
    "images and maps, bytes changed": lambda folder, times: tries.mutated_images(
        folder, 200 * times
    ),
    "an image of 88 megapixels": lambda folder, times: tries.large_image(folder, times == WHOLE),
    "index files": lambda folder, times: tries.index_files(folder, 60 * times),
}
"""What is attacked: makes the tries in a folder, six times as many for `WHOLE`."""


def main() -> int:
    """Print a row for each kind."""
    failed = 0
    for kind in ROWS:
        code = f"import hostile.report as r; r.one({kind!r})"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        print(
            done.stdout.strip() or json.dumps({"kind": kind, "died": done.returncode}), flush=True
        )
        failed += done.returncode != 0
    return int(failed > 0)


def one(kind: str) -> None:
    """Print one row, its failures to stderr."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        row = attack(kind, ROWS[kind](Path(folder), WHOLE))
    print(json.dumps(row.told()))
    print(*row.failures, sep="\n", file=sys.stderr)
    raise SystemExit(int(bool(row.failures)))


if __name__ == "__main__":
    raise SystemExit(main())
