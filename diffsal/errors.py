"""Errors that users see: one line each, and the words that such lines are made of."""

from collections.abc import Iterable

_LONGEST = 2_000  # characters of a message


class DiffsalError(Exception):
    """Something a user can put right. Its message is one line and ends with what to do.

    Names and values from files stand in messages, so what does not print is escaped, and what is
    endless loses its middle.

    Example:
        >>> print(DiffsalError("a\\nb.png: is no image"))
        a\\nb.png: is no image
    """

    def __init__(self, message: str) -> None:
        line = message
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - 501]}…{line[-500:]}"
        super().__init__("".join(map(_printable, line)))


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def one_line(error: Exception) -> str:
    """An exception as one line of at most 200 characters."""
    said = f": {error}" if str(error) else ""
    return " ".join(f"{type(error).__name__}{said}".split())[:200]


def some_of(names: Iterable[str]) -> str:
    """The first three of some names, and how many there are."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(name if len(name) <= 80 else f"{name[:79]}…" for name in names[:3]) + more
