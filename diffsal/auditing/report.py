"""From an audit to one HTML page that needs nothing else: no script, no file, no network.

The page is ``templates/report.html``, filled in by jinja2, which escapes all that comes from
outside. Plots are inline SVG in the page's own colours, so that they are legible in light, in dark
and on paper; pictures are inline PNG."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from diffsal.auditing.rows import MEASURES_OF_MAPS
from diffsal.auditing.wording import written

Columns: TypeAlias = Mapping[str, NDArray[np.float64]]
Line: TypeAlias = tuple[str, Sequence[float], Sequence[float]]

LARGEST = 224
"""Pixels of a picture's longer side."""
_BINS = 24
_SCALES = {
    "rank correlation": (-1.0, 1.0),
    "skill": (-1.0, 1.0),
    "silhouette": (-1.0, 1.0),
    "share": (0.0, 1.0),
    "area": (0.0, 1.0),
    "probability difference": (-1.0, 1.0),
    "mean squared distance": (0.0, 1.0),
}
_MAPS = {"true": "class map", "difference": "difference map", "neutral": ""}


def render_report(
    audit: Mapping[str, Any],
    columns: Columns,
    gallery: Sequence[Mapping[str, Any]],
    stress: Sequence[Mapping[str, Any]],
    composites: Sequence[Mapping[str, Any]],
    kinds: Sequence[Mapping[str, Any]],
) -> str:
    """The page.

    Args:
        audit: the content of ``audit.json``.
        columns: the numbers of ``per-image.csv``, (N,) each, for the distributions.
        gallery: groups of images, with rows of ``per-image.csv`` and pictures as data URIs.
        stress: the same of single images ``before`` and ``after`` the stress test.
        composites: what ``composites.shown`` of ``audit.json`` has, and ``views`` as data URIs.
        kinds: what ``clusters.kinds`` has, the ``mean`` map as a data URI, and ``examples``: rows
            with a ``picture``.
    """
    environment = Environment(
        loader=PackageLoader("diffsal.auditing"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["written"] = written
    return environment.get_template("report.html").render(
        audit=audit,
        plots=_plots(audit, columns),
        strip=_strip,
        gallery=gallery,
        stress=stress,
        composites=composites,
        kinds=kinds,
    )


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (H, W, 3), no larger than a report needs.

    Example:
        >>> thumbnail(np.zeros((448, 224, 3), np.uint8)).shape
        (224, 112, 3)
    """
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST, LARGEST))
    return np.asarray(image)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """The thumbnail of an image (H, W, 3) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(thumbnail(pixels)).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class _Axes:
    """A plot's area in pixels, and the values at its ends."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 36
    right: int = 328
    top: int = 12
    bottom: int = 150

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        points = (f"{self.across(x):.1f} {self.up(y):.1f}" for x, y in zip(xs, ys, strict=True))
        return "M" + "L".join(points)

    def drawn(
        self, title: str, marks: Markup, name: str, x: Mapping[float, str], y: Mapping[float, str]
    ) -> Markup:
        """The plot with axes, and ticks where ``x`` and ``y`` have names for values."""
        grid = Markup().join(
            Markup(
                '<path class="grid" d="M{0} {2:.1f}H{1}"/><text x="{3}" y="{4:.1f}" '
                'text-anchor="end">{5}</text>'
            ).format(self.left, self.right, self.up(value), self.left - 6, self.up(value) + 4, text)
            for value, text in y.items()
        )
        ticks = Markup().join(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                self.across(value), self.bottom + 16, text
            )
            for value, text in x.items()
        )
        return Markup(
            '<svg class="plot" viewBox="0 0 340 192" role="img" aria-label="{0}">{1}{2}'
            '<path class="axis" d="M{3} {4}H{5}"/>{6}'
            '<text x="{7}" y="{8}" text-anchor="middle">{9}</text></svg>'
        ).format(
            title,
            grid,
            marks,
            self.left,
            self.bottom,
            self.right,
            ticks,
            (self.left + self.right) / 2,
            self.bottom + 34,
            name,
        )


def _plots(audit: Mapping[str, Any], columns: Columns) -> dict[str, list[Markup]]:
    """By the finding that they belong to."""
    curves, random = audit["curves"], audit["randomisation"]
    plots = {
        "common-mode": [_histogram(columns, ["common_mode_share"], "common-mode share", (0, 1))],
        "agreement": [
            _histogram(columns, ["true_difference"], "class map with difference map", (-1, 1))
        ],
        "occlusion": [
            _histogram(columns, ["occlusion_true", "occlusion_difference"], "faithfulness", (-1, 1))
        ],
        "location": [
            _histogram(columns, [f"{name}_true", f"{name}_difference"], title, (0, 1))
            for name, title in (
                ("energy", "share of the map inside human maps"),
                ("frame", "share of the map in the edge frame"),
            )
        ],
        "insertion-deletion": [
            _lines(
                [
                    (kind, curves[f"{name}_{kind}"]["mean"], curves[f"{name}_{kind}"]["error"])
                    for kind in ("true", "difference")
                    if f"{name}_{kind}" in curves
                ],
                curves["share"],
                f"{name}: share of pixels {what}",
                (0, 1),
            )
            for name, what in (("insertion", "put back"), ("deletion", "taken away"))
        ],
    }
    if random is not None:
        lines = [
            (kind, random[kind], [0.0] * len(random[kind]))
            for kind in ("true", "difference")
            if None not in random[kind]
        ]
        stages = [float(stage) for stage in range(1, len(random["layers"]) + 1)]
        plots["sanity"] = [_lines(lines, stages, "stage, from the top layer to all", (-1, 1))]
    return {name: [plot for plot in drawn if plot] for name, drawn in plots.items()}


def _kind(name: str) -> str:
    """Which map a number is of, by which it is coloured."""
    if name.startswith("composite_skill"):
        return "true" if name.endswith("_true") else "difference"
    measure, _, kind = name.rpartition("_")
    return kind if measure in MEASURES_OF_MAPS else "neutral"


def _histogram(
    columns: Columns, names: Sequence[str], title: str, ends: tuple[float, float]
) -> Markup:
    """How many images have which value; empty where none has any."""
    values = {name: columns[name][~np.isnan(columns[name])] for name in names}
    values = {name: known for name, known in values.items() if len(known)}
    if not values:
        return Markup()
    counts = {name: np.histogram(known, _BINS, ends)[0] for name, known in values.items()}
    most = max(int(count.max()) for count in counts.values())
    axes = _Axes(ends, (0, most))
    edges = np.repeat(np.linspace(*ends, _BINS + 1), 2)
    steps = Markup().join(
        Markup('<path class="{} area" d="{}"/>').format(
            _kind(name), axes.path(edges.tolist(), [0, *np.repeat(count, 2).tolist(), 0])
        )
        for name, count in counts.items()
    )
    medians = Markup().join(
        Markup('<path class="{} median" d="{}"/>').format(
            _kind(name), axes.path([float(np.median(known))] * 2, [0, most])
        )
        for name, known in values.items()
    )
    label = f"Histogram of {title} over {max(map(len, values.values()))} images; " + ", ".join(
        f"{_MAPS[_kind(name)]} median {written(float(np.median(known)))}".lstrip()
        for name, known in values.items()
    )
    return axes.drawn(label, steps + medians, title, _ticks(ends), {0: "0", most: str(most)})


def _lines(
    lines: Sequence[Line], xs: Sequence[float], title: str, ends: tuple[float, float]
) -> Markup:
    """Means with bands of 1.96 standard errors; empty where there are none."""
    if not lines or len(xs) < 2:
        return Markup()
    axes = _Axes((xs[0], xs[-1]), ends)
    marks = Markup()
    for kind, mean, error in lines:
        middle, half = np.array(mean), 1.96 * np.array(error)
        low, high = np.clip(middle - half, *ends), np.clip(middle + half, *ends)
        there_and_back = [*xs, *reversed(xs)]
        marks += Markup('<path class="{0} band" d="{1}Z"/><path class="{0} line" d="{2}"/>').format(
            kind, axes.path(there_and_back, [*low, *high[::-1]]), axes.path(xs, mean)
        )
    ticks = _ticks((0, 1)) if xs[-1] == 1 else {xs[0]: "1", xs[-1]: str(int(xs[-1]))}
    last = ", ".join(
        f"{_MAPS[kind]} from {written(mean[0])} to {written(mean[-1])}" for kind, mean, _ in lines
    )
    return axes.drawn(f"Curves of {title}: {last}", marks, title, ticks, _ticks(ends))


def _ticks(ends: tuple[float, float]) -> dict[float, str]:
    low, high = ends
    middle = (low + high) / 2
    return {value: f"{value:g}".replace("-", "−") for value in (low, middle, high)}


def _strip(number: Mapping[str, Any]) -> Markup:
    """A number and its interval on the scale of its unit, with a tick at the level of chance."""
    scale = _SCALES.get(number["unit"])
    if scale is None or number["mean"] is None:
        return Markup()
    low, high = (-1.0, 1.0) if " - " in number["name"] else scale

    def across(value: float) -> float:
        return 4 + 132 * (min(max(value, low), high) - low) / (high - low)

    marks = Markup()
    if low < 0:
        marks += Markup('<path class="grid" d="M{0:.1f} 3V17"/>').format(across(0))
    if number["chance"] is not None:
        marks += Markup('<path class="chance" d="M{0:.1f} 3V17"/>').format(across(number["chance"]))
    if number["low"] is not None:
        marks += Markup('<path class="interval" d="M{:.1f} 10H{:.1f}"/>').format(
            across(number["low"]), across(number["high"])
        )
    return Markup(
        '<svg class="strip {3}" viewBox="0 0 140 20" aria-hidden="true">'
        '<path class="axis" d="M4 10H136"/>{0}<circle cx="{1:.1f}" cy="10" r="{2}"/></svg>'
    ).format(marks, across(number["mean"]), 3.5, _kind(number["name"]))
