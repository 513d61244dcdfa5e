"""``audit.log``: how far an audit is, for who comes later."""

import logging
import re
from pathlib import Path

from diffsal.errors import DiffsalError
from diffsal.system.files import open_regular, writing

LOG_NAME = "audit.log"


def log_file(folder: Path) -> logging.Handler:
    """:data:`LOG_NAME` in a folder that is made where it is not there; what was in it is lost."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _LogFile(folder / LOG_NAME, mode="w", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a log is an earlier audit's, or empty: nothing else may be lost.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "audit.log").write_text("May 3: the auditors came")
        ...     is_ours(Path(folder, "audit.log"))
        False
    """
    try:
        with open_regular(path) as file:
            start = file.read(60).decode("utf-8", "replace")
    except (OSError, DiffsalError):
        return False
    return not start or re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d audit of ", start) is not None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing: a full disk is told of what matters more, the report."""
