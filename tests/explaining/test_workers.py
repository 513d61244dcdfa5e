"""Processes that work beside the model."""

import os

import pytest

from diffsal.explaining.workers import working

THREADS = "__import__('torch').get_num_threads()"
PRIORITY = "__import__('os').nice(0)"


@pytest.mark.skipif(not hasattr(os, "nice"), reason="no priorities here")
def test_workers_leave_the_cores_to_the_model() -> None:
    with working(1, "torch") as do:
        threads, priority = do(eval, THREADS), do(eval, PRIORITY)
        assert (threads(), priority()) == (1, min(19, os.nice(0) + 10))
