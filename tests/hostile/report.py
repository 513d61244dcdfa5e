"""The whole of the attacks on files, each kind in a process of its own: `make hostile`.

Prints a line of JSON for each kind and renews the table of docs/reliability.md; the exit status is
1 where anything failed."""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hostile import tries
from hostile.attacks import attack

from diffsal.system.files import replacing

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- attacks -->\n", "\n<!-- end -->"
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
    """Print a row for each kind, and write them all down."""
    failed, rows = 0, []
    for kind in ROWS:
        code = f"import hostile.report as r; r.one({kind!r})"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        row = done.stdout.strip() or json.dumps({"kind": kind, "died": done.returncode})
        print(row, flush=True)
        rows.append(json.loads(row))
        failed += done.returncode != 0
    with replacing(PAGE) as scratch:
        scratch.write_text(renewed(PAGE.read_text("utf-8"), rows), encoding="utf-8")
    return int(failed > 0)


def renewed(page: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page with a table of these rows."""
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    lines = ["| attack | tries | failures | worst time | worst memory |", "|---|---|---|---|---|"]
    for row in rows:
        names = ("tries", "failures", "worst_seconds", "worst_mb")
        tries, failures, seconds, memory = (
            _short(row[name]) if name in row else "died" for name in names
        )
        lines.append(f"| {row['kind']} | {tries} | {failures} | {seconds} s | {memory} MB |")
    return before + BEGIN + "\n".join(lines) + END + behind


def _short(number: Any) -> str:
    return f"{number:.2g}" if isinstance(number, float) and number < 10 else f"{number:.0f}"


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
