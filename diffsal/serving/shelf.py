"""What is kept between a browser's requests: images, under names that nobody can guess."""

import secrets
from collections import OrderedDict
from threading import Lock

from diffsal.errors import DiffsalError
from diffsal.serving.explained import Picture, Served
from diffsal.serving.shifting import Shift, fit_shift

_MOST_BYTES = 1 << 29
"""Of all that is kept. Whose image has to go for another's is asked for it again."""


class GoneError(DiffsalError):
    """An image is not kept any more: its owner has to give it again."""


class Kept:
    """An image, and the head-shifts that were fitted to it, each of them once.

    Args:
        picture: the image.

    Example:
        See :class:`Shelf`.
    """

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self._shifts: dict[str, Shift] = {}
        self._fitting = Lock()

    def size(self) -> int:
        """Bytes, about."""
        tensor = self.picture.tensor
        return self.picture.image.nbytes + tensor.numel() * tensor.element_size()

    def shift(self, served: Served, target: str) -> Shift:
        """The head-shift to a target, fitted when it is first asked for.

        Raises:
            DiffsalError: see :func:`diffsal.serving.shifting.fit_shift`.
        """
        with self._fitting:
            if target not in self._shifts:
                self._shifts[target] = fit_shift(served, self.picture, target)
            return self._shifts[target]


class Shelf:
    """Images by their tokens, the least recently used of them dropped where room is short.

    Who has no token of an image cannot see it, so that users, and pages of one, do not meet.
    Threads may use it at once.

    Args:
        most_bytes: of all images together; one is kept, whatever its size.

    Example:
        >>> import numpy as np, torch
        >>> shelf = Shelf()
        >>> one = Picture("a.png", np.zeros((2, 2, 3), np.uint8), (2, 2), torch.zeros(3, 2, 2), [])
        >>> shelf.get(shelf.put(one)).picture is one
        True
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._lock = Lock()

    def put(self, picture: Picture) -> str:
        """Keep an image; returns its token."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[token] = Kept(picture)
            while len(self._kept) > 1 and self._size() > self._most:
                self._kept.popitem(last=False)
        return token

    def get(self, token: object) -> Kept:
        """The image of a token.

        Raises:
            GoneError: there is none.
        """
        with self._lock:
            if not isinstance(token, str) or token not in self._kept:
                raise GoneError("the image is not here any more: drop it once more")
            self._kept.move_to_end(token)
            return self._kept[token]

    def _size(self) -> int:
        return sum(one.size() for one in self._kept.values())
