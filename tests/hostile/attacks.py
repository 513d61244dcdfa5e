"""Tries of hostile files, and what is recorded of them: made by code, and thrown away."""

import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffsal.errors import DiffsalError

_LONGEST = 8_001  # characters of a message


@dataclass
class Row:
    """What came of the tries of one kind.

    Attributes:
        kind: what was attacked, and how.
        tries: how many.
        refused: how many of them ended in one line; the others succeeded.
        failures: what neither succeeded nor was refused in one line.
        worst_seconds: the longest of one try.
        worst_mb: by how much memory grew in one try at most, beyond what it was before all.
    """

    kind: str
    tries: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    worst_seconds: float = 0.0
    worst_mb: float = 0.0

    def told(self) -> dict[str, Any]:
        """The row with the number of failures."""
        return asdict(self) | {"failures": len(self.failures)}


def attack(kind: str, tries: Iterable[tuple[str, Callable[[], object]]]) -> Row:
    """Run tries one after the other, each with a name; success and one line are allowed."""
    row = Row(kind)
    before = _peak_mb()
    for name, run in tries:
        start = time.perf_counter()
        try:
            run()
        except DiffsalError as error:
            row.refused += 1
            if "\n" in str(error) or len(str(error)) > _LONGEST:
                row.failures.append(f"{name}: more than one line")
        except Exception as error:
            row.failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
        row.tries += 1
        row.worst_seconds = max(row.worst_seconds, time.perf_counter() - start)
    row.worst_mb = _peak_mb() - before
    return row


def _peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed in one of the ways in which files break, or are broken on purpose."""
    changed = bytearray(content)
    start = draw.randrange(len(changed))
    length = min(draw.choice((1, 2, 4, 64, 1024)), len(changed) - start)
    match draw.randrange(7):
        case 0:
            changed[start] ^= 1 << draw.randrange(8)
        case 1:
            changed[start : start + length] = draw.randbytes(length)
        case 2:
            del changed[start:]
        case 3:
            del changed[start : start + length]
        case 4:
            changed[start:start] = changed[start : start + length] * draw.choice((1, 3, 100))
        case 5:
            changed[start : start + length] = draw.choice((b"\0", b"\xff")) * length
        case _:
            for _ in range(draw.randrange(1, 20)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def written(path: Path, content: bytes) -> Path:
    """The file, with this content."""
    path.write_bytes(content)
    return path
