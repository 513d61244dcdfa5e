"""Run every family and write docs/models.md: ``PYTHONPATH=tests python -m models.zoo.report``."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from models.zoo.families import FAMILIES, Family
from models.zoo.observing import Observation, complaints, observe

_PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_VERDICTS = ("right", "first order", "refused", "silently wrong", "stopped")
_HEAD = """# Models

`make zoo` writes this page. It builds the smallest model of each family with random weights, lets
diffsal find its layer, and measures with means of its own (`tests/models/zoo/observing.py`):

- the residual is the same for all images, relative to the spread of the margins (pooled heads);
- with the layer's output for another image put in, the logits are the other image's;
- each cell moves most with the quadrant of the image that it lies in.

**Right**: the head averages, so maps add up to the margin less the biases, and they do. **First
order**: behind the layer there is attention or a further nonlinearity; the residual says how much
first order leaves out. **Refused**: no layer is found, and one line says so. **Silently wrong**:
maps came back, and a measure disagrees. **Stopped**: any other error.
"""


def main() -> int:
    """Write the page; the exit status is 1 where a family is not as stated."""
    here = [index for index, one in enumerate(FAMILIES) if find_spec(one.library)]
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        seen = list(pool.map(_observed, here))
    rows = [(FAMILIES[index], one) for index, one in zip(here, seen, strict=True)]
    _PAGE.write_text(page(rows), encoding="utf-8")
    wrong = [(family, found) for family, one in rows if (found := complaints(family, one))]
    for family, found in wrong:
        print(f"{family}: {'; '.join(found)}")
    return bool(wrong)


def _observed(index: int) -> Observation:
    try:
        return observe(FAMILIES[index])
    except Exception as error:  # of the family's library, or of ours: the page says which
        return Observation(message=f"{type(error).__name__}: {error}", stopped=True)


def page(rows: Sequence[tuple[Family, Observation]]) -> str:
    """The page, as Markdown."""
    counts: dict[str, Counter[str]] = {}
    for family, seen in rows:
        counts.setdefault(family.library, Counter())[verdict(family, seen)] += 1
    summary = [
        (library, sum(one.values()), *(one[verdict] for verdict in _VERDICTS))
        for library, one in counts.items()
    ]
    total = tuple(sum(column) for column in list(zip(*summary, strict=True))[1:])
    summary_table = _table(("library", "families", *_VERDICTS), [*summary, ("all", *total)])
    columns = ("family", "verdict", "layer", "layout", "grid", "residual's spread / margins'")
    families = _table(columns, [_row(family, seen) for family, seen in rows])
    wrong = [
        f"- `{family}`: {'; '.join(found)}"
        for family, seen in rows
        if (found := complaints(family, seen))
    ]
    parts = [_HEAD, summary_table, "\n## Families\n", families]
    return "\n".join(parts + (["\n## Not as it should be\n", *wrong] if wrong else [])) + "\n"


def verdict(family: Family, seen: Observation) -> str:
    """What came of a family: one of the summary's columns."""
    if seen.message:
        return "stopped" if seen.stopped else "refused"
    if complaints(family, seen):
        return "silently wrong"
    return "right" if family.head == "pooled" else "first order"


def _row(family: Family, seen: Observation) -> tuple[str, ...]:
    if seen.message:
        return f"`{family}`", verdict(family, seen), "", "", "", ""
    grid = " × ".join(map(str, seen.grid))
    layer = f"`{seen.layer}`"
    return (
        f"`{family}`",
        verdict(family, seen),
        layer,
        seen.layout,
        grid,
        f"{seen.unsteady:.0e}",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
