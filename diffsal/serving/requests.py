"""What a browser may ask, checked, and the answers as plain JSON types; knows no web server."""

import io
import math
from collections.abc import Callable, Mapping
from threading import Semaphore
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from diffsal.errors import DiffsalError
from diffsal.explaining.figures import figure_pixels
from diffsal.maps.contrast import Choice
from diffsal.serving.composing import Rectangle, composed
from diffsal.serving.explained import Served, drafted, explained, maps_of, read_picture
from diffsal.serving.pictures import as_uri, for_screen, seen_box
from diffsal.serving.shelf import Shelf
from diffsal.serving.shifting import TARGETS, VIEWS, Shift, lie

LARGEST_FILE = 32 * 2**20
"""Bytes of a file that is given to the page."""

_AT_ONCE = 2  # answers that are computed at the same time, to bound memory; further ones wait
_WORDS = ("runner-up", "rest")
_LONGEST_NAME = 200
_MOST_CLASSES = 2**31  # beyond it, numbers are in no tensor


class Desk:
    """Answers to whoever asks; threads may ask at once.

    Args:
        served: the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from diffsal import find_target_layer
        >>> from diffsal.data.preprocessing import Preprocessing
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), *head).eval()
        >>> layer, size = find_target_layer(model), Preprocessing(size=(16, 16))
        >>> desk = Desk(Served(model, layer, size, torch.device("cpu"), ("cat", "dog")))
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (20, 20)).save(file, "PNG")
        >>> given = desk.take(file.getvalue(), "cat.png")
        >>> desk.explain({"image": given["image"], "true": 1})["true_name"]
        'dog'
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self._shelf = Shelf()
        self._turns = Semaphore(_AT_ONCE)

    def take(self, content: bytes, name: str) -> dict[str, Any]:
        """Read a file's content; what is returned under ``image`` is what to ask for it by.

        Raises:
            DiffsalError: more bytes than :data:`LARGEST_FILE`, or no image that can be read.
        """
        if len(content) > LARGEST_FILE:
            raise too_large()
        with self._turns:
            picture = read_picture(self.served, content, _plain(name))
            screen = as_uri(for_screen(picture.image))
        return {
            "image": self._shelf.put(picture),
            "picture": screen,
            "height": picture.size[0],
            "width": picture.size[1],
            "seen": seen_box(self.served.preprocessing, picture.size),
        }

    def explain(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`diffsal.serving.explained.explained`.

        Args:
            asked: ``image``; ``true`` and ``false``, which may be missing.

        Raises:
            DiffsalError: what was asked cannot be answered.
        """
        picture, choices = self._shelf.get(asked.get("image")).picture, _choices(asked)
        with self._turns:
            return explained(self.served, picture, *choices)

    def lie(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`diffsal.serving.shifting.lie`.

        Args:
            asked: as for `explain`; ``strength``; ``target``, which may be missing.

        Raises:
            DiffsalError: what was asked cannot be answered.
        """
        kept, choices = self._shelf.get(asked.get("image")), _choices(asked)
        strength = _number(asked.get("strength"), "strength")
        with self._turns:
            target = str(asked.get("target", TARGETS[0]))
            shift = kept.shift(self.served, target) if strength else Shift(target, {})
            answer = lie(self.served, kept.picture, shift, strength, *choices)
        return answer | {"views": VIEWS}

    def compose(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`diffsal.serving.composing.composed`.

        Args:
            asked: as for `explain`; ``donor``, another image; ``cells``: top, left, bottom, right.

        Raises:
            DiffsalError: what was asked cannot be answered.
        """
        receiver, donor = (self._shelf.get(asked.get(name)).picture for name in ("image", "donor"))
        cells = asked.get("cells")
        if not isinstance(cells, list) or len(cells) != 4 or any(type(n) is not int for n in cells):
            raise DiffsalError("cells are four whole numbers: top, left, bottom, right")
        with self._turns:
            return composed(self.served, receiver, donor, Rectangle(*cells), *_choices(asked))

    def figure(self, asked: Mapping[str, Any]) -> bytes:
        """The figure that `diffsal explain` writes, as a PNG.

        Args:
            asked: as for `explain`.

        Raises:
            DiffsalError: what was asked cannot be answered.
        """
        picture, choices = self._shelf.get(asked.get("image")).picture, _choices(asked)
        with self._turns:
            maps = maps_of(self.served, [picture.tensor], *choices)
            pixels = figure_pixels(drafted(self.served, picture, maps).explanation)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=2)
        return file.getvalue()

    def answers(self) -> dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]:
        """What can be asked in JSON, by the names that the page calls it."""
        return {"explain": self.explain, "lie": self.lie, "compose": self.compose}


def too_large() -> DiffsalError:
    """The error of a file of too many bytes."""
    limit = LARGEST_FILE // 2**20
    return DiffsalError(f"the file is larger than {limit} MB: reduce the image")


def is_from_here(host: str, headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this server, where that is for this machine alone.

    Other sites that somebody has open could otherwise ask it, too, by a name of their own for this
    machine (DNS rebinding) or blindly.

    Args:
        host: what the server listens on.
        headers: of the request, their names in lower case.

    Example:
        >>> is_from_here("127.0.0.1", {"host": "localhost:7860"})
        True
        >>> is_from_here("127.0.0.1", {"host": "elsewhere.example:7860"})
        False
        >>> is_from_here("127.0.0.1", {"host": "localhost:7860", "origin": "https://a.example"})
        False
    """
    if not is_local(host):
        return True
    asked = headers.get("host", "")
    origin = headers.get("origin")
    name = urlsplit(f"//{asked}").hostname or ""
    return is_local(name) and (origin is None or urlsplit(origin).netloc == asked)


def is_local(host: str) -> bool:
    """Whether a host is this machine alone.

    Example:
        >>> is_local("127.0.0.1"), is_local("0.0.0.0")
        (True, False)
    """
    return host in ("127.0.0.1", "localhost", "::1")


def _plain(name: str) -> str:
    """A file's name on one line, of sane length."""
    return " ".join(name.split())[-_LONGEST_NAME:] or "image"


def _choices(asked: Mapping[str, Any]) -> tuple[Choice, Choice]:
    return _choice(asked.get("true")), _choice(asked.get("false"), _WORDS)


def _choice(value: object, words: tuple[str, ...] = ()) -> Choice:
    if value is None or (isinstance(value, str) and value in words):
        return value
    if type(value) is int and abs(value) < _MOST_CLASSES:
        return value
    raise DiffsalError(f"{str(value)[:40]!r} is no class: pass its number")


def _number(value: object, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise DiffsalError(f"{name} is a number")
