"""Errors that users see: one line each, and the words that such lines are made of."""

from collections.abc import Iterable


class DiffsalError(Exception):
    """Something a user can put right. Its message is one line and ends with what to do."""


def one_line(error: Exception) -> str:
    """An exception as one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def some_of(names: Iterable[str]) -> str:
    """The first three of some names, and how many there are."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(name if len(name) <= 80 else f"{name[:79]}…" for name in names[:3]) + more
