"""Words on a picture: fonts, lengths, wrapping, and glyphs that a font lacks.

Matplotlib finds the fonts, of which it brings one; Pillow sets the words, ten times as fast.
"""

import math
from bisect import bisect_left
from functools import cache, lru_cache
from itertools import groupby
from typing import Literal, TypeAlias

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image, ImageDraw, ImageFont

Font = tuple[int, str]  # size in pixels, weight
Align: TypeAlias = Literal["left", "center", "right"]
_BEFORE = {"center": 0.5, "right": 1.0}  # the share of a text that lies left of its place
_CJK = (
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
)


@cache
def _families() -> list[str]:
    return ["DejaVu Sans", *(family for family in _CJK if family in fontManager.get_font_names())]


@cache
def _faces(font: Font) -> list[ImageFont.FreeTypeFont]:
    """The fonts to set words in, of which each has what those before it lack."""
    size, weight = font
    properties = [FontProperties(family=family, weight=weight) for family in _families()]
    return [ImageFont.truetype(findfont(one), size) for one in properties]


@cache
def _family_of(character: str) -> int | None:
    """Which of the families has a character; ``None``: none has."""
    if not character.isprintable():
        return None
    fonts = (get_font(findfont(family)) for family in _families())
    return next((n for n, one in enumerate(fonts) if one.get_char_index(ord(character))), None)


def _runs(text: str, font: Font) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """The parts of a text that one font sets."""
    parts = groupby(text, lambda character: _family_of(character) or 0)
    return [("".join(characters), _faces(font)[family]) for family, characters in parts]


@lru_cache(maxsize=1024)  # most words are the same on all pictures of a folder
def _set(
    text: str, face: ImageFont.FreeTypeFont, fraction: float
) -> tuple[Image.Image, tuple[int, int]]:
    """A text that begins this part of a pixel late, and where its picture's corner lies."""
    left, top, right, bottom = (round(end) for end in face.getbbox(text, anchor="ls"))
    picture = Image.new("L", (right - left + 3, bottom - top + 2))
    ImageDraw.Draw(picture).text((1 - left + fraction, 1 - top), text, 255, face, "ls")
    return picture, (left - 1, top - 1)


def drawable(text: str) -> str:
    """On one line, of sane length, with a box for each character that no font has.

    Example:
        >>> drawable("two\\nlines and a \\0")
        'two lines and a □'
    """
    return "".join(c if _family_of(c) is not None else "□" for c in " ".join(text.split())[:200])


def shortened(name: str) -> str:
    """A class's name within a sentence: at most 24 characters of it.

    Example:
        >>> shortened("a very long name of a class")
        'a very long name of a c…'
    """
    return name if len(name) <= 24 else name[:23].rstrip() + "…"


@lru_cache(maxsize=4096)
def text_length(text: str, font: Font) -> float:
    """In pixels.

    Example:
        >>> text_length("wide", (12, "normal")) < text_length("wide", (12, "bold"))
        True
    """
    return sum(face.getlength(part) for part, face in _runs(text, font))


def write(
    page: ImageDraw.ImageDraw,
    x: float,
    baseline: int,
    text: str,
    font: Font,
    colour: str,
    align: Align = "left",
) -> None:
    """Set one line of words, whose baseline begins, is halfway or ends at a place.

    Places are in pixels from the page's top left corner.

    Example:
        >>> from PIL import Image
        >>> page = Image.new("L", (40, 20), 255)
        >>> write(ImageDraw.Draw(page), 2, 15, "I", (12, "bold"), "black")
        >>> page.getextrema()[0] < 50, page.crop((12, 0, 40, 20)).getextrema()
        (True, (255, 255))
    """
    x -= _BEFORE[align] * text_length(text, font) if align != "left" else 0
    for part, face in _runs(text, font):
        picture, (left, top) = _set(part, face, x % 1)
        page.bitmap((math.floor(x) + left, baseline + top), picture, colour)
        x += text_length(part, font)


def fitted(text: str, font: Font, width: float) -> str:
    """``text``, cut with an ellipsis to at most ``width`` pixels.

    Example:
        >>> cut = fitted("as much as there is room for", (12, "normal"), width=100)
        >>> cut[:10], cut[-1], text_length(cut, (12, "normal")) <= 100
        ('as much as', '…', True)
    """
    if text_length(text, font) <= width:
        return text
    cuts = [text[:end].rstrip() + "…" for end in range(1, len(text))]
    first_too_long = bisect_left(cuts, True, key=lambda cut: text_length(cut, font) > width)
    return cuts[max(0, first_too_long - 1)]


def wrapped(text: str, font: Font, width: float) -> list[str]:
    """The lines of ``text``, none longer than ``width`` pixels.

    Example:
        >>> wrapped("evidence for and against", (12, "normal"), 90)
        ['evidence for', 'and against']
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else ""
        if longer and text_length(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(fitted(word, font, width))
    return lines
