"""Run every family and write docs/models.md: ``PYTHONPATH=tests python -m models.zoo.report``."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from models.zoo.families import FAMILIES, Family
from models.zoo.observing import Find, Observation, complaints, observe, torchcams_layer

from diffsal.maps.target_layers import find_target_layer

_PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_KEPT = Path(__file__).parents[3] / ".zoo.jsonl"
_VERDICTS = ("right", "first order", "refused", "silently wrong", "stopped")
_FOUND = ("right", "first order")
_HEAD = """# Models

Where maps of your own model are taken: `diffsal layers --model weights.pt`, or
`DifferenceCAM(model).target_layer`. This page, which `make zoo` writes, tells on which models that
was tried: the smallest of each family, with random weights, by measures of their own
(`tests/models/zoo/observing.py`):

- the residual is the same for all images, relative to the spread of the margins (pooled heads;
  column *residual*);
- with the layer's output for another image put in, the logits are the other image's;
- each cell moves most with the quadrant of the image that it lies in (*in place*, share of cells).

**Right**: the head averages, so maps add up to the margin less the biases, and they do. **First
order**: behind the layer there is attention or a further nonlinearity; the residual says how much
first order leaves out. **Refused**: no layer is found, and one line says so. **Silently wrong**:
maps came back, and a measure disagrees. **Stopped**: any other error. torch-cam's automatic layer
is put to the same measures.

What a family is (pooled, first order, none) is stated in `tests/models/zoo/families.py`. Of
crossvit, tnt and perceiver it was stated after they had been tried. Scales that begin at zero are
drawn near 1, layer scales near 0.1, as they are once trained.
"""


@dataclass(frozen=True)
class Row:
    """A family, what diffsal's layer shows, and what the one that torch-cam takes does."""

    family: Family
    seen: Observation
    torchcams: Observation


def main() -> int:
    """Write the page; the exit status is 1 where a family is not as stated."""
    here = [index for index, one in enumerate(FAMILIES) if find_spec(one.library)]
    known = _kept()
    missing = [index for index in here if str(FAMILIES[index]) not in known]
    # Libraries keep memory, so that processes are renewed.
    pool = get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,), 10)
    with pool, _KEPT.open("a") as file:
        for index, seen in zip(missing, pool.imap(_observed, missing), strict=True):
            known[str(FAMILIES[index])] = seen
            line = {"family": str(FAMILIES[index]), "seen": [asdict(one) for one in seen]}
            print(json.dumps(line), file=file, flush=True)
            print(FAMILIES[index], verdict(FAMILIES[index], seen[0]), file=sys.stderr)
    rows = [Row(FAMILIES[index], *known[str(FAMILIES[index])]) for index in here]
    _KEPT.unlink()
    _PAGE.write_text(page(rows), encoding="utf-8")
    wrong = _wrong(rows)
    print("\n".join(wrong))
    return bool(wrong)


def _kept() -> dict[str, tuple[Observation, Observation]]:
    """What a run that was stopped has left; it is to be of the same code."""
    if not _KEPT.exists():
        return {}
    lines = [json.loads(line) for line in _KEPT.read_text().splitlines()]
    return {
        line["family"]: tuple(
            Observation(**{**one, "grid": tuple(one["grid"])}) for one in line["seen"]
        )
        for line in lines
    }


def _observed(index: int) -> tuple[Observation, Observation]:
    family = FAMILIES[index]
    ours = _tried(family, find_target_layer)
    return ours, ours if _is_torchcams(family, ours) else _tried(family, torchcams_layer)


def _is_torchcams(family: Family, ours: Observation) -> bool:
    """Whether torch-cam takes the same layer, which then is not measured twice."""
    if ours.layout != "channels-first":
        return False
    model = family.make().eval()
    example = None if family.shape is None else torch.zeros(1, *family.shape)
    try:
        return str(torchcams_layer(model, example)) == ours.layer
    except Exception:  # of the family's library, or of torch-cam: then it is tried and told
        return False


def _tried(family: Family, find: Find) -> Observation:
    try:
        return observe(family, find)
    except Exception as error:  # of the family's library, or of ours: the page says which
        return Observation(message=f"{type(error).__name__}: {error}", stopped=True)


def page(rows: Sequence[Row]) -> str:
    """The page, as Markdown."""
    parts = [_HEAD, _summary(rows), _shares(rows)]
    if wrong := _wrong(rows):
        parts += ["\n## Not as it should be\n", *wrong]
    columns = (
        "family",
        "verdict",
        "layer",
        "layout",
        "grid",
        "residual",
        "in place",
        "torch-cam's",
    )
    parts += ["\n## Families\n", _table(columns, [_cells(row) for row in rows])]
    return "\n".join(parts) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        of_library = counts.setdefault(row.family.library, Counter())
        of_library.update(("families", verdict(row.family, row.seen)))
        of_library["torch-cam's right"] += verdict(row.family, row.torchcams) in _FOUND
    columns = ("families", *_VERDICTS, "torch-cam's right")
    lines = [(library, *(one[name] for name in columns)) for library, one in counts.items()]
    total = tuple(sum(column) for column in list(zip(*lines, strict=True))[1:])
    return _table(("library", *columns), [*lines, ("all", *total)])


def _shares(rows: Sequence[Row]) -> str:
    found = sum(verdict(row.family, row.seen) in _FOUND for row in rows)
    untold = sum(math.isnan(row.seen.in_place) and not row.seen.message for row in rows)
    return (
        f"\nThe layer is right (right or first order) in {found} of {len(rows)}, "
        f"{found / len(rows):.1%}. In {untold} of these all cells move alike with all quadrants "
        "(random weights, or features that mix widely), so that their place is not told."
    )


def _wrong(rows: Sequence[Row]) -> list[str]:
    return [
        f"- `{row.family}`: {'; '.join(found)}"
        for row in rows
        if (found := complaints(row.family, row.seen))
    ]


def verdict(family: Family, seen: Observation) -> str:
    """What came of a family: one of the summary's columns."""
    if seen.message:
        return "stopped" if seen.stopped else "refused"
    if complaints(family, seen):
        return "silently wrong"
    return "right" if family.head == "pooled" else "first order"


def _cells(row: Row) -> tuple[str, ...]:
    seen, theirs = row.seen, row.torchcams
    first = f"`{row.family}`", verdict(row.family, seen)
    if seen.message:
        return *first, *[""] * 5, verdict(row.family, theirs)
    grid = " × ".join(map(str, seen.grid))
    place = "" if math.isnan(seen.in_place) else f"{seen.in_place:.2f}"
    found = f"`{seen.layer}`", seen.layout, grid, f"{seen.unsteady:.0e}", place
    return *first, *found, verdict(row.family, theirs)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
