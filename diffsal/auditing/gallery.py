"""Which images the report shows, and their pictures."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from diffsal.auditing.evidence import Evidence
from diffsal.auditing.report import LARGEST, data_uri, thumbnail
from diffsal.auditing.rows import Measured, Row
from diffsal.auditing.settings import Settings
from diffsal.auditing.wording import written
from diffsal.data.index import Sample
from diffsal.errors import DiffsalError
from diffsal.explaining.figures import Explanation, overlay_layers
from diffsal.explaining.overlays import SIGNED, Layer, Map, Pixels
from diffsal.explaining.records import class_names, draft
from diffsal.explaining.sheets import PictureRow
from diffsal.maps.contrast import class_count
from diffsal.maps.salience import explain
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.devices import running

_SHOWN = 3  # images of each group, and pairs of the stress test
_OF_EACH_CLASS = 2  # of the same, where there are few classes
_FEW = 3
_CAPTIONS = {"true": "class map", "false": "other class"}
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
    gallery: list[dict[str, Any]], evidence: Evidence
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pictures of the gallery, and of the stress test before and after.

    Args:
        gallery: of :func:`choose_gallery`.
        evidence: what it was chosen from.
    """
    measured, loaded, fooled = evidence.measured, evidence.loaded, evidence.fooled

    def draw(model: LoadedModel, positions: Sequence[int]) -> list[dict[str, Any]]:
        return [
            measured.rows[position] | _as_uris(_panels(position, model, evidence))
            for position in positions
        ]

    groups = [{**group, "images": draw(loaded, group["images"])} for group in gallery]
    if fooled is None:
        return groups, []
    known = np.flatnonzero(~np.isnan(measured.column("target_after")))
    positions = known[np.linspace(0, len(known) - 1, _SHOWN).round().astype(int)].tolist()
    pairs = zip(draw(loaded, positions), draw(fooled, positions), strict=True)
    return groups, [{"before": before, "after": after} for before, after in pairs]


def draw_kinds(evidence: Evidence) -> list[dict[str, Any]]:
    """Kinds of evidence with pictures: the mean map, and images with what speaks for the decision.

    Args:
        evidence: what the kinds were found in.
    """
    return [
        one
        | {
            "mean": data_uri(mean),
            "examples": [row | {"picture": data_uri(drawn)} for row, drawn in examples],
        }
        for one, mean, examples in _drawn_kinds(evidence)
    ]


def _drawn_kinds(
    evidence: Evidence,
) -> Iterator[tuple[dict[str, Any], Pixels, list[tuple[Row, Pixels]]]]:
    """Each kind, its mean map, and rows and pictures of the images nearest to that."""
    kinds, measured, settings = evidence.kinds, evidence.measured, evidence.settings
    if isinstance(kinds, str):
        return
    largest = max((np.abs(one["map"]).max() for one in kinds.each), default=0.0)
    for one in kinds.each:
        examples = []
        for position in one["examples"]:
            row = measured.rows[position]
            predicted = measured.names.index(row["predicted"])
            drawn = _panels(position, evidence.loaded, evidence, predicted)["evidence"]
            examples.append((row, drawn))
        mean = _cells(np.array(one["map"], np.float32), largest, settings.preprocessing.size)
        yield one, mean, examples


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


def picture_rows(
    name: str, gallery: list[dict[str, Any]], evidence: Evidence
) -> list[PictureRow] | None:
    """What the report shows under a name, as rows of pictures; ``None``: there is no such name.

    Args:
        name: ``composites``, ``kinds``, or the ``id`` of a group of the gallery.
        gallery: of :func:`choose_gallery`.
        evidence: what it was chosen from.

    Raises:
        DiffsalError: there is nothing to show, and why.
    """
    if name == "composites":
        return _composite_rows(evidence)
    if name == "kinds":
        return _kind_rows(evidence)
    group = next((group for group in gallery if group["id"] == name), None)
    if group is None:
        return None
    if not group["images"]:
        raise DiffsalError(f"{name}: no image is of this kind; see the table")
    return [
        (
            _named(evidence.measured.rows[position]),
            [
                (_CAPTIONS.get(panel, panel), pixels)
                for panel, pixels in _panels(position, evidence.loaded, evidence).items()
            ],
        )
        for position in group["images"]
    ]


def _composite_rows(evidence: Evidence) -> list[PictureRow]:
    test = evidence.composites
    if isinstance(test, str):
        raise DiffsalError(f"composites: the test could not be run: {test}")
    return [
        (
            f"{one['donor']} in {one['receiver']}: foretold {written(one['predicted'])}, the model "
            f"says {written(one['actual'])} logits",
            list(zip(("the image", "the donor", "the composite"), one["pixels"], strict=True)),
        )
        for one in test.pictures
    ]


def _kind_rows(evidence: Evidence) -> list[PictureRow]:
    if isinstance(evidence.kinds, str):
        raise DiffsalError(f"kinds: there are none to tell: {evidence.kinds}")
    if not evidence.kinds.each:
        raise DiffsalError("kinds: none are distinct, the maps vary without falling into groups")
    return [
        (
            f"Kind {number}: {one['images']} images",
            [("mean map", mean), *((_named(row), drawn) for row, drawn in examples)],
        )
        for number, (one, mean, examples) in enumerate(_drawn_kinds(evidence), 1)
    ]


def _named(row: Row) -> str:
    return f"{row['path']}, label {row['label']}, predicted {row['predicted']}"


def _as_uris(panels: dict[str, Pixels]) -> dict[str, str]:
    return {panel: data_uri(pixels) for panel, pixels in panels.items()}


def _panels(
    position: int, loaded: LoadedModel, evidence: Evidence, true: int | None = None
) -> dict[str, Pixels]:
    """Thumbnails of an image and of its maps of a class; ``None``: of its label."""
    sample = evidence.measured.samples[position]
    of_class = sample.label if true is None else true
    explanation = explained(sample, loaded, evidence.settings, of_class)
    panels = overlay_layers(explanation).items()
    return {"input": thumbnail(explanation.image)} | {
        panel: thumbnail(layer.over(explanation.image)) for panel, layer in panels
    }


def explained(
    sample: Sample,
    loaded: LoadedModel,
    settings: Settings,
    true: int,
    names: Sequence[str] | None = None,
) -> Explanation:
    """What `diffsal explain` shows of an audited image.

    Args:
        sample: of the settings' source.
        loaded: on the settings' device.
        settings: of the audit.
        true: the class taken as true.
        names: of the classes.
    """
    pixels = settings.source.pixels(sample)
    image = settings.source.items([sample], settings.preprocessing)[0][0]
    dtype = next(loaded.model.parameters()).dtype
    with running(settings.device, image.shape[1:], 1):
        inputs = image[None].to(settings.device, dtype)
        maps = explain(loaded.model, inputs, true, target_layers=loaded.target_layer).to("cpu")
    size = (pixels.shape[0], pixels.shape[1])
    told = class_names(names, class_count(maps.logits)), settings.preprocessing
    return draft(sample.path, "", pixels, size, maps, *told).explanation
