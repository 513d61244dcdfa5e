"""Pictures of one explanation: the class maps over the image, and the signed evidence in logits.

Two scales, not to be confused. A class map and the difference are drawn on their **own scale**,
lowest value blue, highest red, as in the paper's Figure 1: they show where, not how much. The
**evidence** is the raw difference in logits per cell: red above zero, blue below, white at zero.
Both are multiplied into the greyed image, so that over white the colours are the colour map's own.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import Colormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from PIL import Image

from diffsal.files import replacing

__all__ = ["Explanation", "overlay", "save_figure", "save_overlays"]

Pixels = NDArray[np.uint8]
Map = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Everything that one picture shows. Numbers are finite unless said otherwise.

    Attributes:
        title: What was explained, usually the file's name. Titles and names may be any string.
        image: uint8 (H, W, 3), RGB.
        true: float32 (H, W): the true class's raw map in logits per cell, resized to the image;
            NaN where the model did not see the image.
        false: The same for the false class.
        difference: The same for true - false.
        cells: (h, w) of the maps as the layer made them.
        true_name: Name of the class taken as true.
        false_name: Name of what it is held against.
        true_from: Why it is taken as true: it is the ``label`` given, the model's ``prediction``,
            or a ``score`` that the caller chose.
        true_probability: None where there is none, as for a score.
        false_probability: Likewise.
        predicted_name: Name of the class that the model predicts.
        predicted_probability: Its probability.
        outputs: Number of the model's logits.
        margin: True score - false score, in logits.
        evidence_for: Sum of the positive cells of the difference, in logits; not below 0.
        evidence_against: Sum of the negative cells, in logits; not above 0.
        residual: margin - evidence_for - evidence_against: the bias, and whatever else the cells
            do not carry.
        common_mode_share: var(common) / (var(common) + var(difference / 2)), in [0, 1]; NaN where
            both class maps are constant.
    """

    title: str
    image: Pixels
    true: Map
    false: Map
    difference: Map
    cells: tuple[int, int]
    true_name: str
    false_name: str
    true_from: Literal["label", "prediction", "score"]
    true_probability: float | None
    false_probability: float | None
    predicted_name: str
    predicted_probability: float
    outputs: int
    margin: float
    evidence_for: float
    evidence_against: float
    residual: float
    common_mode_share: float


def save_overlays(folder: Path, stem: str, explanation: Explanation) -> list[Path]:
    """Write each map over the image as a PNG of the image's own size.

    Returns:
        ``<stem>.true.png``, ``<stem>.false.png``, ``<stem>.difference.png`` (each on its own
        scale) and ``<stem>.evidence.png`` (signed, symmetric about zero), in ``folder``.
    """
    paths = []
    for name, layer in _layers(explanation).items():
        paths.append(folder / f"{stem}.{name}.png")
        _save_png(paths[-1], layer.over(explanation.image))
    return paths


def save_figure(path: Path, explanation: Explanation) -> None:
    """Write the figure of ``explanation`` as a PNG, about 1200 pixels wide.

    It shows the image, the maps of the true and the false class and their difference (own scale
    each), the signed evidence with a colour bar in logits, and the sum that decides: evidence for
    + evidence against + residual = margin. Equal input gives equal bytes.
    """
    _save_png(path, _page(explanation))


def _save_png(path: Path, pixels: Pixels) -> None:
    with replacing(path) as scratch:
        Image.fromarray(pixels).save(scratch, format="PNG", compress_level=2)  # a third of the time


# Maps as colours

# Red high, blue low; the yellow between tells the own scale from the signed one. Both are safe for
# the colour-blind. The signed one stops short of its ends, which turn black over dark images.
_OWN = matplotlib.colormaps["RdYlBu_r"]
_SIGNED = ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(0.1, 0.9, 255)))
_DARKEST = 0.65  # what black in the image leaves of a colour's brightness


@dataclass(frozen=True)
class _Layer:
    """A map and the scale that it is drawn on."""

    values: Map
    low: float
    high: float
    colormap: Colormap

    def over(self, image: Pixels) -> Pixels:
        """Colour ``image``, of any size, by the map; leave it as it is where the map is NaN."""
        values = _resized(self.values, image.shape[1], image.shape[0])
        span = self.high - self.low or 1.0  # a constant map is all low
        colours = self.colormap((values - self.low) / span, bytes=True)[..., :3]
        grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float32) / 255
        tinted = colours * (_DARKEST + (1 - _DARKEST) * grey)[..., None]
        return np.where(np.isnan(values)[..., None], image, (tinted + 0.5).astype(np.uint8))

    def bar(self, width: int) -> Pixels:
        """The scale itself, lowest value left."""
        colours: Pixels = self.colormap(np.linspace(0, 1, width), bytes=True)[:, :3]
        return np.repeat(colours[None], 10, axis=0)


def overlay(image: Pixels, values: Map) -> Pixels:
    """Colour an image (H, W, 3) by a raw map of any size, on the map's own scale."""
    return _own_layer(values).over(image)


def _own_layer(values: Map) -> _Layer:
    # Unlike min and max these pass NaN by, unless there is nothing else.
    low, high = (float(end.reduce(values, axis=None)) for end in (np.fmin, np.fmax))
    return _Layer(values, low, high, _OWN)


def _layers(explanation: Explanation) -> dict[str, _Layer]:
    layers = {
        name: _own_layer(getattr(explanation, name)) for name in ("true", "false", "difference")
    }
    limit = max(abs(layers["difference"].low), abs(layers["difference"].high))
    limit = limit if limit > 0 else 1.0  # of zeros, or of nothing but NaN
    layers["evidence"] = _Layer(explanation.difference, -limit, limit, _SIGNED)
    return layers


def _resized(pixels: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """Resize an image (H, W, 3) or a map (H, W), averaging where it shrinks."""
    if pixels.shape[:2] == (height, width):
        return pixels
    resample = Image.Resampling.BICUBIC if pixels.ndim == 3 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), resample, reducing_gap=3.0))


# The page

_LAYOUTS = (  # for images of at most this width / height: a column's width, and the rows of cells
    (0.55, 172, (("input", "true", "false", "difference", "evidence", "sum"),)),
    (1.7, 365, (("input", "true", "false"), ("sum", "difference", "evidence"))),
    (math.inf, 560, (("input", "sum"), ("true", "false"), ("difference", "evidence"))),
)
_TALLEST, _SUM = 480, 260  # most height of a panel, least width of the sum
_MARGIN, _GAP = 28, 28
_HEADER, _HEADING, _BAR = 92, 44, 42  # room above the cells, above a panel, below the last panels
_ROW, _LINE = 24, 17  # from one baseline to the next: in the sum, in the remarks

_Font = tuple[int, str]  # size in pixels, weight
_SMALL, _PLAIN, _BOLD, _LARGE = (12, "normal"), (13, "normal"), (14, "bold"), (20, "bold")
_BLACK, _GREY, _PALE = "#1a1a1a", "#5f6368", "#9aa0a6"
_RULE = 208  # the grey of lines
_RED, _BLUE = to_hex(_SIGNED(1.0)), to_hex(_SIGNED(0.0))


def _page(explanation: Explanation) -> Pixels:
    shown = replace(
        explanation,
        title=_drawable(explanation.title),
        true_name=_drawable(explanation.true_name),
        false_name=_drawable(explanation.false_name),
        predicted_name=_drawable(explanation.predicted_name),
    )
    height, width = shown.image.shape[:2]
    column, rows = next((column, rows) for most, column, rows in _LAYOUTS if width / height <= most)
    scale = min(column / width, _TALLEST / height)
    image = _resized(shown.image, max(1, round(width * scale)), max(1, round(height * scale)))
    column = max(image.shape[1], min(column, _SUM))
    widths = {cell: column for row in rows for cell in row} | {"sum": max(column, _SUM)}
    remarks = [_wrapped(text, _SMALL, widths["sum"]) for text in _remarks(shown)]
    heights = dict.fromkeys(widths, len(image)) | {
        "evidence": len(image) + _BAR,
        "sum": 4 * _ROW + sum(8 + _LINE * len(lines) for lines in remarks),
    }

    places: dict[str, tuple[int, int, int]] = {}  # left, top below the heading, width
    top = _HEADER
    for row in rows:
        left = _MARGIN
        for cell in row:
            places[cell] = (left, top + _HEADING, widths[cell])
            left += widths[cell] + _GAP
        top += _HEADING + max(heights[cell] for cell in row) + _GAP

    sheet = _Sheet(left - _GAP + _MARGIN, top)
    room = sheet.width - 2 * _MARGIN
    sheet.line(_MARGIN, 44, room, shown.title, font=_LARGE)
    sheet.line(_MARGIN, 69, room, _decision(shown), colour=_GREY)
    for cell, (title, end, subtitle) in _headings(shown).items():
        left, top, width = places[cell]
        sheet.line(left, top - 29, width, title, end, font=_BOLD)
        sheet.line(left, top - 11, width, subtitle, font=_SMALL, colour=_GREY)
    layers = _layers(shown)
    sheet.frame(*places["input"][:2], image)
    for cell, layer in layers.items():
        sheet.frame(*places[cell][:2], layer.over(image))
    left, top, width = places["difference"]
    _draw_own_bar(sheet, left, top + len(image), width, layers["difference"])
    left, top, width = places["evidence"]
    _draw_signed_bar(sheet, left, top + len(image), width, layers["evidence"], shown.true_name)
    _draw_sum(sheet, *places["sum"], shown, remarks)
    return sheet.pixels()


class _Sheet:
    """A white page; positions are in pixels from its top left corner, those of text baselines."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.figure = Figure((width / 72, height / 72), dpi=72, facecolor="white")  # 1 pt = 1 px
        self.canvas = FigureCanvasAgg(self.figure)
        self.downwards = Affine2D().scale(1, -1).translate(0, height)
        self.pasted: list[tuple[int, int, Pixels]] = []

    def pixels(self) -> Pixels:
        self.canvas.draw()  # type: ignore[no-untyped-call]
        page = np.array(self.canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
        for left, top, pixels in self.pasted:
            page[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return page

    def paste(self, left: int, top: int, pixels: Pixels) -> None:
        self.pasted.append((left, top, pixels))

    def frame(self, left: int, top: int, pixels: Pixels) -> None:
        self.paste(
            left - 1, top - 1, np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=_RULE)
        )

    def write(
        self, x: float, baseline: int, text: str, font: _Font, colour: str, align: str = "left"
    ) -> None:
        self.figure.text(
            x,
            baseline,
            text,
            transform=self.downwards,
            font=_properties(font),
            color=colour,
            ha=align,
            va="baseline",
            parse_math=False,
            usetex=False,
        )

    def line(
        self,
        left: int,
        baseline: int,
        width: int,
        text: str,
        end: str = "",
        font: _Font = _PLAIN,
        colour: str = _BLACK,
        end_font: _Font = _PLAIN,
        end_colour: str = _BLACK,
    ) -> None:
        """Write ``end`` flush right in ``width`` pixels, and ``text`` in the room that is left."""
        self.write(left + width, baseline, end, end_font, end_colour, "right")
        room = width - (_length(end, end_font) + 8 if end else 0)
        self.write(left, baseline, _fitted(text, font, room), font, colour)


def _draw_own_bar(sheet: _Sheet, left: int, top: int, width: int, layer: _Layer) -> None:
    sheet.paste(left, top + 9, layer.bar(width))
    sheet.line(left, top + 34, width, "lowest", "highest", _SMALL, end_font=_SMALL)


def _draw_signed_bar(
    sheet: _Sheet, left: int, top: int, width: int, layer: _Layer, name: str
) -> None:
    sheet.paste(left, top + 9, layer.bar(width))
    low, high = _logits(layer.low, layer.high)
    sheet.line(left, top + 34, width, low, high, _SMALL, end_font=_SMALL)
    sheet.write(left + width / 2, top + 34, "0", _SMALL, _BLACK, "center")
    against, in_favour = (
        _fitted(f"{side} {name}", _SMALL, width / 2 - 4) for side in ("against", "for")
    )
    sheet.line(left, top + 50, width, against, in_favour, _SMALL, _BLUE, _SMALL, _RED)


def _draw_sum(
    sheet: _Sheet, left: int, top: int, width: int, shown: Explanation, remarks: list[list[str]]
) -> None:
    *numbers, margin = _logits(
        shown.evidence_for, shown.evidence_against, shown.residual, shown.margin
    )
    terms = (
        f"red cells: for {shown.true_name}",
        f"blue cells: against {shown.true_name}",
        "bias and rest, not on the map",
    )
    baseline = top + 13
    for term, colour, number in zip(terms, (_RED, _BLUE, _PALE), numbers, strict=True):
        sheet.write(left, baseline, "■", _BOLD, colour)
        sheet.line(left + 18, baseline, width - 18, term, number)
        baseline += _ROW
    sheet.paste(left, baseline - 15, np.full((1, width, 3), _RULE, np.uint8))
    sheet.line(left, baseline + 5, width, "margin", margin, _BOLD, end_font=_BOLD)
    baseline += 5 + _ROW
    for lines in remarks:
        baseline += 8
        for line in lines:
            sheet.write(left, baseline, line, _SMALL, _GREY)
            baseline += _LINE


# Words

_WHY = {"prediction": "predicted", "label": "given as label", "score": "given as score"}


def _decision(shown: Explanation) -> str:
    true, false, predicted = map(_short, (shown.true_name, shown.false_name, shown.predicted_name))
    return (
        f"Predicted: {predicted} ({_probability(shown.predicted_probability)}). "
        f"Taken as true: {true} ({_WHY[shown.true_from]}). Held against: {false}."
    )


def _headings(shown: Explanation) -> dict[str, tuple[str, str, str]]:
    """Each cell's title, what stands flush right of it, and its subtitle."""
    height, width = shown.image.shape[:2]
    h, w = shown.cells
    true, false = shown.true_name, shown.false_name
    return {
        "input": ("Input", f"{width} × {height}", f"maps of {w} × {h} cells"),
        "true": (
            true,
            _probability(shown.true_probability),
            f"true class, {_WHY[shown.true_from]}",
        ),
        "false": (false, _probability(shown.false_probability), "false class"),
        "difference": ("Difference", "own scale", "true class − false class"),
        "evidence": ("Evidence", "logits per cell", "red for, blue against"),
        "sum": ("What decides", "logits", f"{_short(true)} against {_short(false)}"),
    }


def _remarks(shown: Explanation) -> Iterator[str]:
    if shown.margin:
        higher, lower = (shown.true_name, shown.false_name)[:: 1 if shown.margin > 0 else -1]
        side = "above" if shown.margin > 0 else "below"
        yield f"Margin {side} 0: {_short(higher)} scores higher than {_short(lower)}."
    if abs(shown.residual) > shown.evidence_for - shown.evidence_against:
        yield "What is not on the map weighs more than all of its cells."
    if shown.outputs == 1:
        yield "Common-mode share: not applicable, the model has one output."
    elif math.isnan(shown.common_mode_share):
        yield "Common-mode share: undefined, both class maps are constant."
    else:
        yield (
            f"{_percent(shown.common_mode_share)} of the class maps' variance is common to both "
            "classes: to first order, softmax between the two cannot see it"
            + ("; against a third class it can matter." if shown.outputs > 2 else ".")
            + " A low share does not prove a map faithful."
        )
    if np.isnan(shown.difference).any():
        yield "The model did not see the parts of the image that are left untinted."


def _logits(*values: float) -> list[str]:
    """Signed; at least two decimals, and three digits of the largest."""
    largest = max(map(abs, values))
    exponent = math.floor(math.log10(largest)) if largest else 0
    form = f"+.{max(2, 2 - exponent)}f" if -4 <= exponent < 6 else "+.2e"
    return [format(value + 0.0, form).replace("-", "−") for value in values]  # + 0.0: no -0.0


def _probability(value: float | None) -> str:
    if value is None:
        return ""
    return "p > 0.999" if value > 0.9995 else "p < 0.001" if value < 0.0005 else f"p = {value:.3f}"


def _percent(share: float) -> str:
    return "Over 99%" if share > 0.995 else "Under 1%" if share < 0.005 else f"{share:.0%}"


# Text that fits

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
def _properties(font: _Font) -> FontProperties:
    return FontProperties(family=_families(), size=font[0], weight=font[1])


@cache
def _has_glyph(character: str) -> bool:
    fonts = [get_font(findfont(family)) for family in _families()]
    return character.isprintable() and any(font.get_char_index(ord(character)) for font in fonts)


def _drawable(text: str) -> str:
    """On one line, of sane length, with a box for each character that no font has."""
    return "".join(c if _has_glyph(c) else "□" for c in " ".join(text.split())[:200])


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23].rstrip() + "…"


@cache
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, 72)  # type: ignore[no-untyped-call]


def _length(text: str, font: _Font) -> float:
    """In pixels."""
    measure = _ruler().get_text_width_height_descent
    return float(measure(text, _properties(font), False)[0])  # type: ignore[no-untyped-call]


def _fitted(text: str, font: _Font, width: float) -> str:
    """``text``, cut with an ellipsis to at most ``width`` pixels."""
    if _length(text, font) <= width:
        return text
    cuts = [text[:end].rstrip() + "…" for end in range(1, len(text))]
    first_too_long = bisect_left(cuts, True, key=lambda cut: _length(cut, font) > width)
    return cuts[max(0, first_too_long - 1)]


def _wrapped(text: str, font: _Font, width: float) -> list[str]:
    """The lines of ``text``, none longer than ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else ""
        if longer and _length(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(_fitted(word, font, width))
    return lines
