"""Does a map lie where people marked, or along the edges? Pointing game, energy, overlap."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffsal.errors import DiffsalError
from diffsal.faithfulness.statistics import Maps, one_map_each
from diffsal.maps.salience_maps import normalize, resize


def pointing_game(maps: Maps, human: Maps) -> Tensor:
    """Whether the map's maximum lies in the human map (Zhang et al. 2018, with no tolerance).

    Args:
        maps: (B, h, w), resized to the human maps where they differ.
        human: (B, H, W), masks or graded maps, not below 0: what reaches half of the image's own
            maximum counts as marked.

    Returns:
        (B,) 0 or 1; among several maxima, the share of them that lies inside. NaN where the map is
        constant or nothing is marked.

    Example:
        >>> mask = torch.tensor([[[1, 0, 0, 0]]])
        >>> pointing_game(torch.tensor([[[5.0, 1.0, 0.0, 2.0]]]), mask)
        tensor([1.])
        >>> pointing_game(torch.tensor([[[5.0, 5.0, 0.0, 2.0]]]), mask)  # one of two maxima
        tensor([0.5000])
    """
    values, marked, known = _compare(maps, human)
    peaks = values == values.amax(1, keepdim=True)
    return ((peaks & marked).sum(1) / peaks.sum(1)).where(known, torch.nan)


def energy_inside(maps: Maps, human: Maps) -> Tensor:
    """Share of the normalised map that lies in the human map (relevance mass, Arras et al. 2022).

    Arguments as for :func:`pointing_game`. Chance is the share of the image that is marked: that
    much a map scores that knows nothing of it.

    Returns:
        (B,) in [0, 1]; NaN where the map is constant or nothing is marked.

    Example:
        >>> mask = torch.tensor([[[1, 0, 0, 0]]])
        >>> energy_inside(torch.tensor([[[5.0, 1.0, 0.0, 2.0]]]), mask)  # 5 of 8
        tensor([0.6250])
    """
    values, marked, known = _compare(maps, human)
    return ((values * marked).sum(1) / values.sum(1)).where(known, torch.nan)


def intersection_over_union(maps: Maps, human: Maps, threshold: float = 0.5) -> Tensor:
    """Overlap of the human map with where the normalised map reaches ``threshold``.

    Other arguments as for :func:`pointing_game`.

    Returns:
        (B,) in [0, 1]; NaN where the map is constant or nothing is marked.

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 0]]])
        >>> intersection_over_union(torch.tensor([[[5.0, 1.0, 0.0, 3.0]]]), mask)
        tensor([0.3333])
    """
    values, marked, known = _compare(maps, human)
    above = values >= threshold
    return ((above & marked).sum(1) / (above | marked).sum(1)).where(known, torch.nan)


def marked_share(human: Maps) -> Tensor:
    """(B,) in (0, 1]: the share of each image that is marked, see :func:`pointing_game`.

    It is what :func:`energy_inside` and :func:`pointing_game` come to by chance; NaN where nothing
    is marked.

    Example:
        >>> marked_share(torch.tensor([[[1, 0, 0, 0]], [[0, 0, 0, 0]]]))
        tensor([0.2500,    nan], dtype=torch.float64)
    """
    marked = _marked(torch.as_tensor(human).flatten(1))
    return marked.double().mean(1).where(marked.any(1), torch.nan)


def frame_mass(maps: Maps, width: int) -> Tensor:
    """Share of the normalised map in a frame along the edges, where passive fooling puts it.

    Args:
        maps: (B, h, w).
        width: of the frame, in the map's own cells.

    Returns:
        (B,) in [0, 1]; NaN where the map is constant. Chance is the frame's share of the area.

    Raises:
        DiffsalError: a frame that is empty or leaves no middle.

    Example:
        >>> middle = torch.zeros(1, 3, 3)
        >>> middle[0, 1, 1] = 1
        >>> frame_mass(middle, 1), frame_mass(-middle, 1)
        (tensor([0.]), tensor([1.]))
    """
    maps = torch.as_tensor(maps)
    frame = edge_frame(maps.shape[1:], width).to(maps.device)
    return energy_inside(maps, frame.expand(len(maps), -1, -1))


def edge_frame(size: Sequence[int], width: int) -> Tensor:
    """(h, w) float32: 1 in a frame of ``width`` cells along the edges, 0 in the middle.

    Raises:
        DiffsalError: a frame that is empty or leaves no middle.

    Example:
        >>> edge_frame((3, 4), 1)
        tensor([[1., 1., 1., 1.],
                [1., 0., 0., 1.],
                [1., 1., 1., 1.]])
    """
    if not 0 < 2 * width < min(size):
        raise DiffsalError(
            f"a frame {width} wide does not fit a map of {size[0]} × {size[1]}: "
            f"pass a width from 1 to {(min(size) - 1) // 2}"
        )
    frame = torch.ones(tuple(size))
    frame[width:-width, width:-width] = 0
    return frame


def _compare(maps: Maps, human: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) normalised values, (B, N) what people marked, (B,) whether both say anything."""
    maps = torch.as_tensor(maps)
    human = one_map_each(human, maps)
    if maps.shape != human.shape:
        maps = resize(maps, human.shape[1:])
    values, human = normalize(maps).flatten(1), human.flatten(1)
    marked = _marked(human)
    return values, marked, (values.amax(1) > 0) & marked.any(1)


def _marked(human: Tensor) -> Tensor:
    """(B, N) bool, from (B, N): where a human map reaches half of its own maximum."""
    return (human > 0) & (human >= human.amax(1, keepdim=True) / 2)
