"""Where code runs, thread and asyncio task, and hooks that act there alone.

Hooks and torch's switches for attention belong to whoever shares the module or the process, so that
what one thread sets, all others run into. Here they are told apart.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

Where: TypeAlias = "tuple[int, asyncio.Task[Any] | None]"

_ONE_AT_A_TIME = threading.RLock()  # two hooks set at the same moment would get the same number


def here() -> Where:
    """The thread that runs, and the asyncio task, if any.

    Example:
        >>> here() == here(), here() == asyncio.run(asyncio.to_thread(here))
        (True, False)
    """
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return threading.get_ident(), None


class OwnHook:
    """A hook that acts where it was made alone, and in no copy or pickle of its module.

    Example:
        >>> hook = OwnHook(lambda *given: given)
        >>> hook(1, 2), asyncio.run(asyncio.to_thread(hook, 1, 2))
        ((1, 2), None)
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook, self._where = hook, here()

    def __call__(self, *given: Any) -> Any:
        """What the hook returns, or ``None``: in other threads and tasks nothing is changed."""
        return self._hook(*given) if here() == self._where else None

    def __reduce__(self) -> Any:
        return _without_effect, ()


def set_hook(
    hook: Callable[..., Any], *registers: Callable[..., RemovableHandle], **how: Any
) -> Callable[[], None]:
    """Register a hook that acts here alone, of one module or several; what is returned removes it.

    Example:
        >>> from torch import nn
        >>> layer = nn.Identity()
        >>> remove = set_hook(lambda module, given, output: -output, layer.register_forward_hook)
        >>> layer(1), asyncio.run(asyncio.to_thread(layer, 1))
        (-1, 1)
        >>> remove()
        >>> layer(1)
        1
    """
    own = OwnHook(hook)
    with _ONE_AT_A_TIME:
        handles = [register(own, **how) for register in registers]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _without_effect() -> Callable[..., None]:
    return _nothing


def _nothing(*given: Any) -> None:
    """What stands for a hook in a copy of its module."""


class _PlainAttention:
    """Who needs it now: torch's switches are the whole process's."""

    users = 0
    switched: Any = None


@contextmanager
def plain_attention() -> Iterator[None]:
    """The attention that can be differentiated twice, until the last thread that needs it leaves.

    Example:
        >>> import torch
        >>> with plain_attention():
        ...     torch.backends.cuda.flash_sdp_enabled()
        False
        >>> torch.backends.cuda.flash_sdp_enabled()
        True
    """
    with _ONE_AT_A_TIME:
        _PlainAttention.users += 1
        if _PlainAttention.users == 1:
            _PlainAttention.switched = sdpa_kernel(SDPBackend.MATH)
            _PlainAttention.switched.__enter__()
    try:
        yield
    finally:
        with _ONE_AT_A_TIME:
            _PlainAttention.users -= 1
            if _PlainAttention.users == 0:
                _PlainAttention.switched.__exit__(None, None, None)
