"""Text in a CSV that spreadsheets take for a formula, and would run."""

import re
from typing import Any

_FORMULA = re.compile(r"[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def inert(cell: Any) -> Any:
    """A cell as it may stand in a CSV: text that would be a formula begins with an apostrophe.

    Spreadsheets show the text after it (OWASP, "CSV Injection"). Numbers stay numbers, those that
    are text, such as a class called -1, too.

    Example:
        >>> inert("=HYPERLINK(A1).png"), inert("-1"), inert(-0.5), inert("a=b.png")
        ("'=HYPERLINK(A1).png", '-1', -0.5, 'a=b.png')
    """
    is_formula = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell
