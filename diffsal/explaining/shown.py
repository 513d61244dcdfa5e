"""Maps as a figure of one sample, and as notebooks show them; what `SalienceMaps`' methods call."""

import html
import io
import math
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from diffsal.data.forms import ImageLike, as_pixels
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.explaining.figures import figure_pixels
from diffsal.explaining.matplotlib_figures import as_figure
from diffsal.explaining.overlays import SIGNED, Layer, Pixels, reduced
from diffsal.explaining.records import NOT_FINITE, class_names, draft
from diffsal.maps.contrast import NO_CLASS, class_count
from diffsal.maps.numbers import signed
from diffsal.maps.salience_maps import SalienceMaps

_SHOWN = 8  # samples in a notebook
_SIDE = 96  # pixels of a map's longer side in a notebook
_AS_A_WHOLE = "Assumed: the model saw the whole image, resized (see preprocessing)."
_BLANK = 448  # pixels of the longer side of what stands in for an image


def map_figure(
    maps: SalienceMaps,
    image: ImageLike | None = None,
    sample: int = 0,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    title: str = "",
) -> Figure:
    """The figure that `diffsal explain` writes, of one sample.

    Args:
        maps: (B, h, w).
        image: what was explained, see :data:`diffsal.data.forms.ImageLike`; ``None``: white.
        sample: which of the batch.
        classes: one name per class; ``None``: ``class 0`` and so on.
        preprocessing: what made the model's input of the image; ``None``: the image is taken to
            have been resized as a whole, and the figure says so.
        title: empty: the file's name, where the image is one.

    Returns:
        A figure that pyplot knows nothing of; ``figure.savefig(path)`` writes it.

    Raises:
        DiffsalError: volumes, a sample that is not there, maps that are not finite, what is no
            image, too few or too many names.

    Example:
        >>> import diffsal
        >>> from torch import nn
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> maps = diffsal.explain(nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(5, 3, 8, 8))
        >>> figure = map_figure(maps, np.zeros((60, 80, 3), np.uint8), sample=3)
        >>> bool(figure.get_figwidth() > 11)
        True
    """
    one = _one_of(maps, sample)
    pixels = _blank(one) if image is None else as_pixels(image)
    size = (pixels.shape[0], pixels.shape[1])
    if not title and isinstance(image, str | Path):
        title = Path(image).name
    assumed = [] if preprocessing or image is None else [_AS_A_WHOLE]
    made = draft(
        Path(title or "Explanation"),
        "",
        reduced(pixels),
        size,
        one,
        class_names(classes, class_count(one.logits)),
        preprocessing or Preprocessing(size=size),
        assumed,
    )
    return as_figure(figure_pixels(made.explanation))


def _one_of(maps: SalienceMaps, sample: int) -> SalienceMaps:
    if maps.true.ndim != 3:
        raise DiffsalError("maps of volumes have no figure: take slices of them")
    if not -len(maps) <= sample < len(maps):
        raise DiffsalError(f"sample {sample} is not among the {len(maps)} that were explained")
    one = maps[sample].to("cpu")
    if not bool(torch.stack([one.true, one.false]).isfinite().all()):
        raise DiffsalError(f"sample {sample}: {NOT_FINITE}")
    return one


def _blank(one: SalienceMaps) -> Pixels:
    cells = one.true.shape[1:]
    height, width = (max(1, round(_BLANK * count / max(cells))) for count in cells)
    return np.full((height, width, 3), 255, np.uint8)


def as_html(maps: SalienceMaps) -> str:
    """A table of the first samples: what decides, and where.

    Example:
        >>> each = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1]), torch.tensor([0])
        >>> maps = SalienceMaps(*torch.rand(2, 1, 7, 7), torch.rand(1, 2), *each, "label")
        >>> "<td>+1.50</td>" in as_html(maps)  # the margin
        True
    """
    head = "true class", "against", "margin", "for", "against it", "residual", "common mode"
    rows = [_html_row(maps[sample].to("cpu"), sample) for sample in range(min(len(maps), _SHOWN))]
    more = f"<p>and {len(maps) - _SHOWN} more</p>" if len(maps) > _SHOWN else ""
    return (
        f"<p>{html.escape(repr(maps))}</p><table><thead><tr><th></th>"
        + "".join(f"<th>{name}</th>" for name in head)
        + "<th>evidence, red for, blue against</th></tr></thead><tbody>"
        + "".join(rows)
        + f"</tbody></table>{more}"
    )


def _html_row(one: SalienceMaps, sample: int) -> str:
    difference = one.difference.double()
    told = [
        str(int(one.true_class)) if int(one.true_class) != NO_CLASS else "score",
        str(int(one.false_class)) if int(one.false_class) != NO_CLASS else "the rest",
        *signed(
            float(one.margin),
            float(difference.clamp(min=0).sum()),
            float(difference.clamp(max=0).sum()),
            float(one.residual),
        ),
        _share(float(one.common_mode_share)),
    ]
    data = b64encode(_png(_evidence(one))).decode() if one.true.ndim == 3 else ""
    picture = f'<img alt="evidence of sample {sample}" src="data:image/png;base64,{data}">'
    return (
        f"<tr><th>{sample}</th>"
        + "".join(f"<td>{value}</td>" for value in told)
        + f"<td>{picture if data else 'a volume'}</td></tr>"
    )


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def as_png(maps: SalienceMaps) -> bytes:
    """The signed evidence of the first samples side by side, each on its own scale.

    Example:
        >>> each = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1]), torch.tensor([0])
        >>> maps = SalienceMaps(*torch.rand(2, 1, 7, 7), torch.rand(1, 2), *each, "label")
        >>> Image.open(io.BytesIO(as_png(maps))).size
        (96, 96)
    """
    gap = np.full((_SIDE, 8, 3), 255, np.uint8)
    parts: list[Pixels] = []
    for sample in range(min(len(maps), _SHOWN)):
        evidence = _evidence(maps[sample].to("cpu"))
        high = np.full((_SIDE, evidence.shape[1], 3), 255, np.uint8)
        high[: len(evidence)] = evidence
        parts += [gap, high]
    return _png(np.concatenate(parts[1:], axis=1))


def _evidence(one: SalienceMaps) -> Pixels:
    """A sample's difference map as coloured cells on white, symmetric about zero."""
    values: NDArray[np.float32] = one.difference[0].float().numpy()
    largest = float(np.abs(values).max())
    largest = largest if 0 < largest < math.inf else 1.0
    height, width = values.shape
    scale = _SIDE / max(height, width)
    white = np.full((height, width, 3), 255, np.uint8)
    cells = Image.fromarray(Layer(values, -largest, largest, SIGNED).over(white))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cells.resize(size, Image.Resampling.NEAREST))


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
