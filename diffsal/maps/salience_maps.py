"""What a forward pass yields: the true, false and difference maps, in logits (Eq. 1), and
`norm`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsal.maps.contrast import probabilities
from diffsal.maps.numbers import signed
from diffsal.maps.outputs import Squash

_SMALLEST_SPAN = 1e-19  # its inverse, a factor of the gradient, is still finite in float32


class NormalizedMaps(NamedTuple):
    """Maps in [0, 1], each normalised by itself; (B, H, W) or (B, D, H, W).

    Example:
        >>> maps = NormalizedMaps(*torch.rand(3, 5, 8, 8))
        >>> maps.difference.shape
        torch.Size([5, 8, 8])
    """

    true: Tensor
    false: Tensor
    difference: Tensor


class ResizedMaps(NamedTuple):
    """Maps in logits per cell of the layer's grid, at another size; (B, H, W) or (B, D, H, W).

    Their values are kept, so that their sums are none of the margin's.

    Example:
        >>> maps = ResizedMaps(*torch.rand(3, 5, 8, 8))
        >>> maps.difference.shape
        torch.Size([5, 8, 8])
    """

    true: Tensor
    false: Tensor
    difference: Tensor


@dataclass(frozen=True, repr=False)
class SalienceMaps:
    """What speaks for the true and for the false class, cell by cell.

    Maps are raw and signed, in logit units per cell of the layer's grid, and at least float32. For
    volumes, read (B, d, h, w) for (B, h, w).

    Attributes:
        true: (B, h, w), contributions to the true score.
        false: (B, h, w), contributions to the false score.
        logits: (B, K), what the model returned.
        true_score: (B,) logit units.
        false_score: (B,) logit units.
        true_class: (B,) int64; -1 where the score is a callable.
        false_class: (B,) int64; -1 where the score is a callable or the rest.
        true_from: whether the true class is a ``label`` that was given, the ``prediction``, or
            stands for a callable ``score``.
        squash: what the model made of its logits before it returned them: ``sigmoid``, ``softmax``
            or ``log-softmax``; ``None``: nothing.

    Example:
        >>> import diffsal
        >>> from torch import nn
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> maps = diffsal.explain(nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(5, 3, 8, 8))
        >>> len(maps), maps.difference.shape, maps.margin.shape
        (5, torch.Size([5, 6, 6]), torch.Size([5]))
        >>> bias = head[-1].bias[maps.true_class] - head[-1].bias[maps.false_class]
        >>> torch.allclose(maps.residual, bias, atol=1e-5)
        True
    """

    true: Tensor
    false: Tensor
    logits: Tensor
    true_score: Tensor
    false_score: Tensor
    true_class: Tensor
    false_class: Tensor
    true_from: Literal["label", "prediction", "score"]
    squash: Squash | None = None

    @property
    def probabilities(self) -> Tensor:
        """(B, K), or (B, 2) of one logit, float64: what the model's outputs mean, in [0, 1].

        The softmax of its logits; of several outputs that each went through a sigmoid, theirs.
        """
        if self.squash == "sigmoid" and self.logits.shape[1] > 1:
            return self.logits.double().sigmoid()
        return probabilities(self.logits.double())

    @property
    def difference(self) -> Tensor:
        """(B, h, w): ``true - false``, what softmax sees; Eq. 1 before normalisation."""
        return self.true - self.false

    @property
    def common(self) -> Tensor:
        """(B, h, w): ``(true + false) / 2``, what softmax cannot see of two classes' logits."""
        return (self.true + self.false) / 2

    @property
    def margin(self) -> Tensor:
        """(B,) logits: true score minus false score."""
        return self.true_score - self.false_score

    @property
    def residual(self) -> Tensor:
        """(B,) logits: the margin less the sum of the difference map.

        The difference of the biases for a pooled linear head; for any other, also how far first
        order is from the truth.
        """
        return self.margin - self.difference.flatten(1).sum(1)

    @property
    def common_mode_share(self) -> Tensor:
        """(B,) in [0, 1]: var(common) / (var(common) + var(difference / 2)), over cells.

        The part of the true map's variation that the decision does not depend on. NaN where both
        are zero, and for one logit, whose common part is zero by construction.
        """
        pair = torch.stack([self.common.flatten(1), self.difference.flatten(1) / 2])
        largest = pair.detach().abs().amax((0, 2))[:, None]  # whose square may not be a float
        common, half = (pair / largest.where(largest > 0, 1)).var(2, correction=0)
        share = common / (common + half)
        return torch.full_like(share, torch.nan) if self.logits.shape[1] == 1 else share

    def normalized(self, size: Sequence[int] | None = None) -> NormalizedMaps:
        """Each map resized to ``size`` (pixels), if given, and then normalised to [0, 1]."""
        maps = (self.true, self.false, self.difference)
        if size is not None:
            maps = tuple(resize(map_, size) for map_ in maps)  # type: ignore[assignment]
        return NormalizedMaps(*map(normalize, maps))

    def resized(self, size: Sequence[int]) -> ResizedMaps:
        """The maps interpolated to ``size`` (pixels), raw."""
        return ResizedMaps(*(resize(one, size) for one in (self.true, self.false, self.difference)))

    def numpy(self) -> dict[str, Any]:
        """Name to array of maps and numbers, on the CPU: ``true`` (B, h, w), ``margin`` (B,)."""
        names = [field.name for field in fields(self)]
        names += ["difference", "margin", "residual", "common_mode_share", "probabilities"]
        values = {name: getattr(self, name) for name in names}
        return {
            k: one.detach().cpu().numpy() for k, one in values.items() if isinstance(one, Tensor)
        }

    def save(self, path: Any) -> None:
        """Write an ``.npz`` file, see :func:`diffsal.explaining.stored.write_maps`."""
        from diffsal.explaining.stored import write_maps

        write_maps(path, self)

    @staticmethod
    def load(path: Any) -> "SalienceMaps":
        """What :meth:`save` wrote, see :func:`diffsal.explaining.stored.read_maps`."""
        from diffsal.explaining.stored import read_maps

        return read_maps(path)

    def figure(self, image: Any = None, sample: int = 0, **how: Any) -> Any:
        """A matplotlib figure of one sample's maps over its image.

        Arguments and errors: :func:`diffsal.explaining.shown.map_figure`.
        """
        from diffsal.explaining.shown import map_figure

        return map_figure(self, image, sample, **how)

    def regions(self, sample: int = 0, share: float = 0.5) -> Any:
        """Where a sample's evidence is gathered, in cells and logits.

        Arguments and result: :func:`diffsal.explaining.regions.find_regions`.
        """
        from diffsal.explaining.regions import find_regions

        return find_regions(self.difference[sample], share)

    def _repr_html_(self) -> str:
        from diffsal.explaining.shown import as_html

        return as_html(self)

    def _repr_png_(self) -> bytes:
        from diffsal.explaining.shown import as_png

        return as_png(self)

    def __repr__(self) -> str:
        """One line: how many samples, of how many cells, and their margins."""
        cells = " × ".join(map(str, self.true.shape[1:]))
        margins = self.margin.detach().tolist() or [0.0]
        ends = " to ".join(signed(min(margins), max(margins)))
        ends = f", margins {ends} logits" if len(self) else ""
        return f"SalienceMaps({len(self)} × {cells} cells{ends}, on {self.true.device})"

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.true)

    def __getitem__(self, index: int | slice) -> "SalienceMaps":
        """The maps of some samples, still as a batch."""
        rows = range(len(self))[index]  # IndexError ends a loop over the samples
        if isinstance(rows, int):
            rows = range(rows, rows + 1)
        return self._each(lambda tensor: tensor[rows.start : rows.stop : rows.step])

    def to(self, device: torch.device | str) -> "SalienceMaps":
        """The same maps on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SalienceMaps":
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


def normalize(maps: Tensor, eps: float | None = None) -> Tensor:
    """Min-max normalisation of each sample's map to [0, 1] (the paper's ``norm``).

    A map that is constant up to rounding becomes 0, with finite gradients.

    Args:
        maps: (B, ...), floating point.
        eps: the span, relative to the largest value, up to which a map is constant; ``None``:
            eight roundings of the maps' type, which resizing a constant does not exceed.

    Example:
        >>> normalize(torch.tensor([[-1.0, 0.0, 3.0], [7.0, 7.0, 7.0]]))
        tensor([[0.0000, 0.2500, 1.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    span = high - low
    eps = 8 * torch.finfo(maps.dtype).eps if eps is None else eps
    varies = span > (eps * torch.maximum(high, -low)).clamp(min=_SMALLEST_SPAN)
    return ((flat - low) / span.where(varies, torch.inf)).view_as(maps)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) or (B, d, h, w), interpolated linearly to ``size``; keeps values, not sums.

    Example:
        >>> resize(torch.tensor([[[0.0, 1.0]]]), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    mode = "bilinear" if maps.ndim == 3 else "trilinear"
    return F.interpolate(maps[:, None], size=tuple(size), mode=mode, align_corners=False)[:, 0]
