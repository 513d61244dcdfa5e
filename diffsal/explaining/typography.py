"""Words on a picture: fonts, lengths, wrapping, and glyphs that a font lacks."""

from bisect import bisect_left
from functools import cache

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

Font = tuple[int, str]  # size in pixels, weight
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
def font_properties(font: Font) -> FontProperties:
    """The same as matplotlib takes it, with the families that have what DejaVu Sans lacks."""
    return FontProperties(family=_families(), size=font[0], weight=font[1])


@cache
def _has_glyph(character: str) -> bool:
    fonts = [get_font(findfont(family)) for family in _families()]
    return character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts)


def drawable(text: str) -> str:
    """On one line, of sane length, with a box for each character that no font has.

    Example:
        >>> drawable("two\\nlines and a \\0")
        'two lines and a □'
    """
    return "".join(c if _has_glyph(c) else "□" for c in " ".join(text.split())[:200])


def shortened(name: str) -> str:
    """A class's name within a sentence: at most 24 characters of it.

    Example:
        >>> shortened("a very long name of a class")
        'a very long name of a c…'
    """
    return name if len(name) <= 24 else name[:23].rstrip() + "…"


@cache
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, 72)  # type: ignore[no-untyped-call]


def text_length(text: str, font: Font) -> float:
    """In pixels.

    Example:
        >>> text_length("wide", (12, "normal")) < text_length("wide", (12, "bold"))
        True
    """
    measure = _ruler().get_text_width_height_descent
    return float(measure(text, font_properties(font), False)[0])  # type: ignore[no-untyped-call]


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
