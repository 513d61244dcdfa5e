"""What an audit says while it runs."""

import io
import logging
import re

import pytest

from diffsal.auditing.log import log_file
from diffsal.system import progress
from diffsal.system.progress import LOG, logged, stage

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_a_line_each_minute_and_one_at_the_end(monkeypatch):
    clock = iter([0, 30, 61, 90, 130, 200])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    with logged(logging.StreamHandler(text)), stage("occlusion", 4) as advance:
        advance(1)  # after half a minute
        advance(1)  # a minute and a second
    lines = [re.sub(f"^{LINE}", "", line) for line in text.getvalue().splitlines()]
    assert lines == [
        "occlusion: 2 of 4 images, 1:30 elapsed, about 1:01 left",
        "occlusion: 2 of 4 images, 2:10 elapsed",
    ]


def test_an_audit_leaves_a_line_for_each_stage(audited):
    text = (audited.folder / "audit.log").read_text("utf-8")
    assert all(re.match(LINE, line) for line in text.splitlines())
    stages = ["audit", *(one["test"] for one in audited.json["sampling"]), "composites"]
    for title in (*stages, "stress test", "reference"):
        assert re.search(rf"^{LINE}{title}: \d+ of \d+ images", text, re.MULTILINE), title
    assert text.splitlines()[-1].endswith("report.html")


def test_no_handler_is_left(tmp_path):
    level, handlers = LOG.level, list(LOG.handlers)
    with pytest.raises(KeyboardInterrupt), logged(log_file(tmp_path / "audit")):
        raise KeyboardInterrupt
    assert (LOG.level, LOG.handlers) == (level, handlers)
    assert (tmp_path / "audit" / "audit.log").read_text() == ""
