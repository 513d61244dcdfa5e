"""The picture of one explanation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffsal.explaining.overlays import (
    PALE,
    SIGNED,
    Layer,
    Map,
    Pixels,
    own_layer,
    resized,
    save_png,
)
from diffsal.explaining.regions import outlined
from diffsal.explaining.typography import (
    Align,
    Font,
    drawable,
    fitted,
    shortened,
    text_length,
    wrapped,
    write,
)
from diffsal.maps.numbers import signed

PANELS = ("true", "false", "difference", "evidence")
"""What is laid over the image: each class's map, the difference on its own scale and signed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Everything that one picture shows. Numbers are finite unless said otherwise.

    Attributes:
        title: What was explained, usually the file's name. Titles and names may be any string.
        image: uint8 (H, W, 3), RGB.
        true: float32 (h, w): the true class's raw map in logits per cell, placed over the image and
            of its size, or a smaller one of its shape; NaN where the model did not see the image.
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
        outputs_are: ``logits``, or what the model made of them: ``sigmoid``, ``softmax`` and so on.
        caveats: sentences, see :mod:`diffsal.maps.caveats`.
        size: (H, W) that is told, where `image` is a reduced one.
        regions: Where the evidence is gathered: bool (h, w) over the image, of any size of its
            shape, and the logits there and of all evidence of that sign; the weightiest first.
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
    outputs_are: str = "logits"
    caveats: Sequence[str] = ()
    size: tuple[int, int] | None = None
    regions: Sequence[tuple[NDArray[np.bool_], float, float]] = ()


def save_overlays(folder: Path, stem: str, explanation: Explanation) -> list[Path]:
    """Write each map over the image as a PNG of the image's own size.

    Returns:
        ``<stem>.true.png``, ``<stem>.false.png``, ``<stem>.difference.png`` (each on its own
        scale) and ``<stem>.evidence.png`` (signed, symmetric about zero), in ``folder``.
    """
    paths = []
    for name, layer in overlay_layers(explanation).items():
        paths.append(folder / f"{stem}.{name}.png")
        save_png(paths[-1], layer.over(explanation.image))
    return paths


def save_figure(path: Path, explanation: Explanation) -> None:
    """Write what :func:`figure_pixels` draws as a PNG; equal input gives equal bytes."""
    save_png(path, figure_pixels(explanation))


def overlay_layers(explanation: Explanation) -> dict[str, Layer]:
    """Each panel's map, to be laid over the image: on its own scale, the evidence about zero."""
    *own, signed = PANELS
    layers = {name: own_layer(getattr(explanation, name)) for name in own}
    limit = max(abs(layers["difference"].low), abs(layers["difference"].high))
    limit = limit if limit > 0 else 1.0  # of zeros, or of nothing but NaN
    layers[signed] = Layer(explanation.difference, -limit, limit, SIGNED, PALE)
    return layers


_Place: TypeAlias = tuple[int, int, int]  # a cell's left, its top below the heading, its width
_LAYOUTS = (  # for images of at most this width / height: a column's width, and the rows of cells
    (0.55, 172, (("input", "true", "false", "difference", "evidence", "sum"),)),
    (1.7, 365, (("input", "true", "false"), ("sum", "difference", "evidence"))),
    (math.inf, 560, (("input", "sum"), ("true", "false"), ("difference", "evidence"))),
)
_TALLEST, _SUM = 480, 260  # most height of a panel, least width of the sum
_MARGIN, _GAP = 28, 28
_HEADER, _HEADING, _BAR = 92, 44, 42  # room above the cells, above a panel, below the last panels
_ROW, _LINE = 24, 17  # from one baseline to the next: in the sum, in the remarks
_SMALL, _PLAIN, _BOLD, _LARGE = (12, "normal"), (13, "normal"), (14, "bold"), (20, "bold")
_BLACK, _GREY, _PALE = "#1a1a1a", "#5f6368", "#9aa0a6"
_RULE = 208  # the grey of lines
_RED, _BLUE = to_hex(SIGNED(1.0)), to_hex(SIGNED(0.0))


def figure_pixels(explanation: Explanation) -> Pixels:
    """The figure of ``explanation`` (H, W, 3), about 1200 pixels wide.

    It shows the image, the maps of the true and the false class and their difference (own scale
    each), the signed evidence with a colour bar in logits, and the sum that decides: evidence for
    + evidence against + residual = margin.
    """
    words = ("title", "true_name", "false_name", "predicted_name")
    drawn: dict[str, Any] = {name: drawable(getattr(explanation, name)) for name in words}
    shown = replace(explanation, **drawn)
    height, width = shown.image.shape[:2]
    column, rows = next((column, rows) for most, column, rows in _LAYOUTS if width / height <= most)
    scale = min(column / width, _TALLEST / height)
    image = resized(shown.image, max(1, round(width * scale)), max(1, round(height * scale)))
    column = max(image.shape[1], min(column, _SUM))
    widths = {cell: column for row in rows for cell in row} | {"sum": max(column, _SUM)}
    remarks = [wrapped(text, _SMALL, widths["sum"]) for text in _remarks(shown)]
    heights = dict.fromkeys(widths, len(image)) | {
        "evidence": len(image) + _BAR,
        "sum": 4 * _ROW + sum(8 + _LINE * len(lines) for lines in remarks),
    }
    sheet, places = _laid_out(rows, widths, heights)
    _draw_words(sheet, places, shown)
    _draw_panels(sheet, places, shown, image)
    _draw_sum(sheet, *places["sum"], shown, remarks)
    return sheet.pixels()


def _laid_out(
    rows: Sequence[Sequence[str]], widths: Mapping[str, int], heights: Mapping[str, int]
) -> tuple["_Sheet", dict[str, _Place]]:
    """A page of the size that it takes, and where on it the cells stand."""
    places = {}
    top = _HEADER
    for row in rows:
        left = _MARGIN
        for cell in row:
            places[cell] = (left, top + _HEADING, widths[cell])
            left += widths[cell] + _GAP
        top += _HEADING + max(heights[cell] for cell in row) + _GAP
    return _Sheet(left - _GAP + _MARGIN, top), places


class _Sheet:
    """A white page; positions are in pixels from its top left corner, those of text baselines."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.page = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.page)

    def pixels(self) -> Pixels:
        return np.asarray(self.page)

    def paste(self, left: int, top: int, pixels: Pixels) -> None:
        self.page.paste(Image.fromarray(pixels), (left, top))

    def frame(self, left: int, top: int, pixels: Pixels) -> None:
        height, width = pixels.shape[:2]
        around = left - 1, top - 1, left + width, top + height
        self.pen.rectangle(around, outline=(_RULE, _RULE, _RULE))
        self.paste(left, top, pixels)

    def write(
        self, x: float, baseline: int, text: str, font: Font, colour: str, align: Align = "left"
    ) -> None:
        write(self.pen, x, baseline, text, font, colour, align)

    def line(
        self,
        left: int,
        baseline: int,
        width: int,
        text: str,
        end: str = "",
        font: Font = _PLAIN,
        colour: str = _BLACK,
        end_font: Font = _PLAIN,
        end_colour: str = _BLACK,
    ) -> None:
        """Write ``end`` flush right in ``width`` pixels, and ``text`` in the room that is left."""
        self.write(left + width, baseline, end, end_font, end_colour, "right")
        room = width - (text_length(end, end_font) + 8 if end else 0)
        self.write(left, baseline, fitted(text, font, room), font, colour)


def _draw_words(sheet: _Sheet, places: Mapping[str, _Place], shown: Explanation) -> None:
    """What stands above the cells."""
    room = sheet.width - 2 * _MARGIN
    sheet.line(_MARGIN, 44, room, shown.title, font=_LARGE)
    sheet.line(_MARGIN, 69, room, _decision(shown), colour=_GREY)
    for cell, (title, end, subtitle) in _headings(shown).items():
        left, top, width = places[cell]
        sheet.line(left, top - 29, width, title, end, font=_BOLD)
        sheet.line(left, top - 11, width, subtitle, font=_SMALL, colour=_GREY)


def _draw_panels(
    sheet: _Sheet, places: Mapping[str, _Place], shown: Explanation, image: Pixels
) -> None:
    """The image, the maps over it, and the scales of those that have one below them."""
    layers = overlay_layers(shown)
    sheet.frame(*places["input"][:2], outlined(image, [inside for inside, *_ in shown.regions]))
    height, width = image.shape[:2]
    panels = {name: resized(layers[name].values, width, height) for name in PANELS[:-1]}
    panels["evidence"] = panels["difference"]
    for cell, layer in layers.items():
        sheet.frame(*places[cell][:2], replace(layer, values=panels[cell]).over(image))
    left, top, width = places["difference"]
    _draw_own_bar(sheet, left, top + len(image), width, layers["difference"])
    left, top, width = places["evidence"]
    _draw_signed_bar(sheet, left, top + len(image), width, layers["evidence"], shown.true_name)


def _draw_own_bar(sheet: _Sheet, left: int, top: int, width: int, layer: Layer) -> None:
    if layer.is_constant:
        sheet.line(left, top + 34, width, "constant: marks nothing", "", _SMALL, end_font=_SMALL)
        return
    sheet.paste(left, top + 9, layer.bar(width))
    sheet.line(left, top + 34, width, "lowest", "highest", _SMALL, end_font=_SMALL)


def _draw_signed_bar(
    sheet: _Sheet, left: int, top: int, width: int, layer: Layer, name: str
) -> None:
    sheet.paste(left, top + 9, layer.bar(width))
    low, high = _logits(layer.low, layer.high)
    sheet.line(left, top + 34, width, low, high, _SMALL, end_font=_SMALL)
    sheet.write(left + width / 2, top + 34, "0", _SMALL, _BLACK, "center")
    against, in_favour = (
        fitted(f"{side} {name}", _SMALL, width / 2 - 4) for side in ("against", "for")
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


_WHY = {"prediction": "predicted", "label": "given as label", "score": "given as score"}


def _decision(shown: Explanation) -> str:
    true, false, predicted = map(
        shortened, (shown.true_name, shown.false_name, shown.predicted_name)
    )
    return (
        f"Predicted: {predicted} ({_probability(shown.predicted_probability)}). "
        f"Taken as true: {true} ({_WHY[shown.true_from]}). Held against: {false}."
    )


def _headings(shown: Explanation) -> dict[str, tuple[str, str, str]]:
    """Each cell's title, what stands flush right of it, and its subtitle."""
    height, width = shown.size or shown.image.shape[:2]
    h, w = shown.cells
    true, false, why = shown.true_name, shown.false_name, _WHY[shown.true_from]
    return {
        "input": ("Input", f"{width} × {height}", f"maps of {w} × {h} cells"),
        "true": (true, _probability(shown.true_probability), f"true class, {why}"),
        "false": (false, _probability(shown.false_probability), "false class"),
        "difference": ("Difference", "own scale", "true class − false class"),
        "evidence": ("Evidence", "logits per cell", "red for, blue against"),
        "sum": ("What decides", "logits", f"{shortened(true)} against {shortened(false)}"),
    }


def _remarks(shown: Explanation) -> Iterator[str]:
    if shown.margin:
        higher, lower = (shown.true_name, shown.false_name)[:: 1 if shown.margin > 0 else -1]
        side = "above" if shown.margin > 0 else "below"
        yield f"Margin {side} 0: {shortened(higher)} scores higher than {shortened(lower)}."
    if shown.regions:
        yield _regions(shown)
    yield from shown.caveats
    if shown.outputs_are not in ("logits", "log-softmax"):
        yield f"The model ends in a {shown.outputs_are}: maps are of the logits before it."
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


def _regions(shown: Explanation) -> str:
    told = []
    for number, (_, logits, whole) in enumerate(shown.regions, start=1):
        part, all_of_it = _logits(logits, whole)
        told.append(f"region {number}, {part} of {all_of_it}")
    return f"Outlined: {'; '.join(told)} logits."


def _logits(*values: float) -> list[str]:
    return [number.replace("-", "−") for number in signed(*values)]


def _probability(value: float | None) -> str:
    if value is None:
        return ""
    return "p > 0.999" if value > 0.9995 else "p < 0.001" if value < 0.0005 else f"p = {value:.3f}"


def _percent(share: float) -> str:
    return "Over 99%" if share > 0.995 else "Under 1%" if share < 0.005 else f"{share:.0%}"
