"""A page that is served while a test runs."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffsal.serving.requests import Desk
from diffsal.serving.web import address, application, listen, server


@contextmanager
def serving(desk: Desk, **options: Any) -> Iterator[str]:
    """The address of a page with these answers."""
    with listen("127.0.0.1", 0) as listening:
        running = server(application(desk, "127.0.0.1", "weights.pt", **options))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield address(listening)
        finally:
            running.should_exit = running.force_exit = True
            thread.join()


def asking(
    url: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of what a URL answers."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, given)) as answer:
            return answer.status, dict(answer.headers.items()), answer.read()
    except urllib.error.HTTPError as answer:
        return answer.code, dict(answer.headers.items()), answer.read()


def error_of(content: bytes) -> str:
    """The one line that an answer holds."""
    (line,) = json.loads(content).values()
    assert "\n" not in line
    assert "Traceback" not in line
    return line
