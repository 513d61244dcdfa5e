"""Pictures of a protocol's results: AUROC with every seed as a dot, and the paper's Figure 1."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from diffsal.errors import DiffsalError
from diffsal.explaining.overlays import overlay
from diffsal.protocol.scores import ByMethod
from diffsal.system.files import replacing

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_MAPS = ("true", "false", "difference")


def save_aurocs(path: Path, title: str, areas: ByMethod) -> None:
    """Write a plot of AUROC by subset and method: a dot for each seed, a bar at their mean.

    Args:
        path: of the PNG.
        title: above the plot.
        areas: method, subset and seed to AUROC; methods and subsets in the order of the plot.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.png")
        ...     save_aurocs(file, "AUROC", {"contrast": {"crack": {0: 0.7, 1: 0.8}}})
        ...     Image.open(file).size
        (720, 504)
    """
    methods = list(areas)
    subsets = list(dict.fromkeys(subset for by_subset in areas.values() for subset in by_subset))
    figure = Figure(
        figsize=(max(6.0, 1.2 + 0.3 * len(methods) * len(subsets)), 4.2),
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots()
    for number, method in enumerate(methods):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, subset in enumerate(subsets):
            values = list(areas[method].get(subset, {}).values())
            if not values:
                continue
            centre = place + 0.8 * ((number + 0.5) / len(methods) - 0.5)
            half = 0.25 / len(methods)
            spread = np.linspace(-half, half, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(centre + spread, values, "o", color=colour, alpha=0.6, markersize=3.5)
            ends = [centre - 1.3 * half, centre + 1.3 * half]
            axes.plot(ends, [np.mean(values)] * 2, color=colour, lw=2)
        axes.plot([], [], "o-", color=colour, label=method)
    for place in range(1, len(subsets)):
        axes.axvline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)
    low, high = axes.get_ylim()
    if low < 0.5 < high:
        axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(-0.5, len(subsets) - 0.5)
    axes.set_xticks(range(len(subsets)), subsets, parse_math=False)
    axes.set_ylabel("AUROC")
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=min(len(methods), 3), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def save_fooling(path: Path, title: str, job: Mapping[str, Any]) -> None:
    """Write the page of the paper's Figure 1: t, f and d of each model, each on its own scale.

    Args:
        path: of the PNG.
        title: above the page.
        job: a job of experiment (a), whose pictured samples are shown side by side.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diffsal.auditing.report import data_uri
        >>> maps = dict.fromkeys(_MAPS, [[[1.0, 0.0], [0.0, -1.0]]])
        >>> job = {"classes": ["intact", "worn"], "samples": {"path": ["a.png"], "label": [0]}}
        >>> job |= {"pictured": [0], "pictures": [data_uri(np.zeros((8, 8, 3), np.uint8))]}
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "f.png")
        ...     save_fooling(file, "maps", {**job, "models": {"honest": {"maps": maps}}})
        ...     Image.open(file).size
        (744, 318)
    """
    models, pictures = job["models"], [_decoded(uri) for uri in job["pictures"]]
    columns = 1 + len(_MAPS)
    figure = Figure(
        figsize=(1.45 * columns * len(pictures) + 0.4, 1.55 * len(models) + 1.1),
        layout="constrained",
        facecolor="white",
    )
    parts = figure.subfigures(1, len(pictures), squeeze=False, wspace=0.03)[0]
    for number, (part, picture) in enumerate(zip(parts, pictures, strict=True)):
        axes = part.subplots(len(models), columns, squeeze=False)
        position = job["pictured"][number]
        label = job["classes"][job["samples"]["label"][position]]
        name = Path(job["samples"]["path"][position]).name
        part.suptitle(f"{label} ({name})", fontsize=10, parse_math=False)
        for row, (name, model) in zip(axes, models.items(), strict=True):
            row[0].imshow(picture)
            row[0].set_ylabel(name if number == 0 else "", fontsize=9)
            for axis, kind in zip(row[1:], _MAPS, strict=True):
                axis.imshow(overlay(picture, np.array(model["maps"][kind][number], np.float32)))
            for axis in row:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        for axis, heading in zip(axes[0], ("input", *_MAPS), strict=True):
            axis.set_title(heading, fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.supxlabel("red: highest of the map, blue: lowest; each on its own scale", fontsize=9)
    _save(figure, path)


def _decoded(uri: str) -> Any:
    try:
        content = base64.b64decode(uri.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (ValueError, OSError) as error:
        raise DiffsalError("a picture is damaged; remove its job and run again") from error


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, metadata={"Software": None})
