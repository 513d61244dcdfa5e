"""Which images the report shows, and their pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from diffsal.auditing.evidence import Evidence
from diffsal.auditing.report import LARGEST, data_uri, picture
from diffsal.auditing.rows import Measured
from diffsal.auditing.settings import Settings
from diffsal.data.index import Sample
from diffsal.errors import DiffsalError
from diffsal.explaining.explanations import Outputs, explain_images
from diffsal.explaining.explanations import Settings as ExplanationSettings
from diffsal.explaining.figures import PANELS
from diffsal.explaining.overlays import SIGNED, Layer, Map, Pixels
from diffsal.models.checkpoints import LoadedModel

_SHOWN = 3  # images of each group, and pairs of the stress test
_OF_EACH_CLASS = 2  # of the same, where there are few classes
_FEW = 3
_GROUPS = (  # id, title, why
    (
        "typical",
        "Typical",
        "right, and near the middle in common-mode share, faithfulness and margin",
    ),
    ("common-mode", "Most common-mode", "the highest common-mode shares"),
    (
        "unfaithful",
        "Least faithful",
        "the difference map's lowest rank correlations with occlusion",
    ),
    ("wrong", "Wrongly classified", "by the largest margins"),
)


def choose_gallery(measured: Measured) -> list[dict[str, Any]]:
    """Which images are shown, and why: positions among the rows, by class where these are few."""
    right = measured.column("correct") == 1
    share = measured.column("common_mode_share")
    faithful = measured.column("occlusion_difference")
    margin = measured.column("margin")
    middling = sum(
        np.abs(stats.rankdata(values) / len(values) - 0.5)
        for values in (np.nan_to_num(share), np.nan_to_num(faithful), margin)
    )
    orders = {
        "typical": np.where(right, middling, math.nan),
        "common-mode": -share,
        "unfaithful": faithful,
        "wrong": np.where(right, math.nan, margin),
    }
    return [
        {"id": identity, "title": title, "why": why, "images": _lowest(measured, orders[identity])}
        for identity, title, why in _GROUPS
    ]


def _lowest(measured: Measured, order: NDArray[np.float64]) -> list[int]:
    labels = np.array([row["label"] for row in measured.rows])
    classes = [name for name in measured.names if (labels == name).any()]
    if not 1 < len(classes) <= _FEW:
        return _first(order, _SHOWN)
    return [
        image
        for name in classes
        for image in _first(np.where(labels == name, order, math.nan), _OF_EACH_CLASS)
    ]


def _first(order: NDArray[np.float64], count: int) -> list[int]:
    known = int((~np.isnan(order)).sum())
    return [int(image) for image in np.argsort(order, kind="stable")[: min(known, count)]]


def draw_gallery(
    gallery: list[dict[str, Any]], evidence: Evidence, scratch: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pictures of the gallery, and of the stress test before and after.

    Args:
        gallery: of :func:`choose_gallery`.
        evidence: what it was chosen from.
        scratch: a folder for files on the way.
    """
    measured, loaded, fooled = evidence.measured, evidence.loaded, evidence.fooled

    def draw(model: LoadedModel, positions: Sequence[int]) -> list[dict[str, Any]]:
        return [
            measured.rows[position]
            | _pictures(
                measured.samples[position],
                model,
                evidence.settings,
                scratch,
                measured.samples[position].label,
            )
            for position in positions
        ]

    groups = [{**group, "images": draw(loaded, group["images"])} for group in gallery]
    if fooled is None:
        return groups, []
    known = np.flatnonzero(~np.isnan(measured.column("target_after")))
    positions = known[np.linspace(0, len(known) - 1, _SHOWN).round().astype(int)].tolist()
    pairs = zip(draw(loaded, positions), draw(fooled, positions), strict=True)
    return groups, [{"before": before, "after": after} for before, after in pairs]


def draw_kinds(evidence: Evidence, scratch: Path) -> list[dict[str, Any]]:
    """Kinds of evidence with pictures: the mean map, and images with what speaks for the decision.

    Args:
        evidence: what the kinds were found in.
        scratch: a folder for files on the way.
    """
    kinds, measured, settings = evidence.kinds, evidence.measured, evidence.settings
    if isinstance(kinds, str):
        return []
    largest = max((np.abs(one["map"]).max() for one in kinds.each), default=0.0)
    drawn = []
    for one in kinds.each:
        examples = []
        for position in one["examples"]:
            row, sample = measured.rows[position], measured.samples[position]
            predicted = measured.names.index(row["predicted"])
            drawings = _pictures(sample, evidence.loaded, settings, scratch, predicted)
            examples.append(row | {"picture": drawings["evidence"]})
        mean = _cells(np.array(one["map"], np.float32), largest, settings.preprocessing.size)
        drawn.append(one | {"mean": data_uri(mean), "examples": examples})
    return drawn


def _cells(values: Map, largest: float, size: tuple[int, int]) -> Pixels:
    """A signed map as coloured cells on white, in the shape of the network's input."""
    colours = Layer(values, -largest, largest, SIGNED).over(
        np.full((*values.shape, 3), 255, np.uint8)
    )
    height, width = (round(LARGEST * side / max(size)) for side in size)
    return np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST))


def draw_composites(evidence: Evidence) -> list[dict[str, Any]]:
    """Composites that are shown: numbers; receiver, donor and both in one as data URIs."""
    test = evidence.composites
    if isinstance(test, str):
        return []
    return [
        one | {"views": [data_uri(pixels) for pixels in one["pixels"]]} for one in test.pictures
    ]


def _pictures(
    sample: Sample, loaded: LoadedModel, settings: Settings, scratch: Path, true: int
) -> dict[str, str]:
    """The image and its maps of a class as data URIs, by the pipeline of `diffsal explain`."""
    manifest = explain_images(
        [sample.path],
        loaded=loaded,
        folder=scratch,
        settings=ExplanationSettings(
            preprocessing=settings.preprocessing,
            device=settings.device,
            true=str(true),
            outputs=Outputs(figure=False, overlays=True),
        ),
        overwrite=True,
    )
    record = manifest["images"][0]
    if "error" in record:  # it was read and explained before
        raise DiffsalError(f"{sample.path}: cannot be drawn: {record['error']}")
    files = zip(PANELS, record["files"], strict=True)
    return {"input": picture(sample.path)} | {
        panel: picture(scratch / name) for panel, name in files
    }
