"""When a map says little: the sentences that stand beside it, wherever it is shown."""

from collections.abc import Sequence

from diffsal.maps.numbers import signed
from diffsal.maps.salience_maps import SalienceMaps, normalize

FEWEST_CELLS = 5
"""Along an axis: with fewer, a map shows regions, and drawing it smoothly would promise places."""


def is_coarse(cells: Sequence[int]) -> bool:
    """Whether a grid (h, w) has so few cells that they are to be seen one by one.

    Example:
        >>> is_coarse((7, 7)), is_coarse((2, 2))
        (False, True)
    """
    return min(cells[-2:]) < FEWEST_CELLS


def explains_little(margin: float, residual: float) -> bool:
    """Whether half the margin, in logits, or more is not on the map.

    Example:
        >>> explains_little(margin=4.0, residual=-2.5), explains_little(margin=4.0, residual=0.1)
        (True, False)
    """
    return abs(residual) >= abs(margin) / 2 and residual != 0


def caveats(maps: SalienceMaps) -> list[list[str]]:
    """What has to be said of each sample's maps: a sentence each, none where there is nothing.

    Example:
        >>> import torch
        >>> from diffsal.maps.salience import explain
        >>> head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), *head)
        >>> caveats(explain(model, torch.rand(1, 3, 16, 16)))[0][-1]
        'The grid has only 2 × 2 cells: the map tells regions, not places.'
    """
    return [_of_one(maps[index]) for index in range(len(maps))]


def _of_one(maps: SalienceMaps) -> list[str]:
    said = []
    margin, residual = float(maps.margin), float(maps.residual)
    if not all(bool(one.isfinite().all()) for one in (maps.logits, maps.true, maps.false)):
        return ["Logits or maps are not finite: they tell nothing."]
    if not bool(normalize(maps.difference).any()):  # up to rounding: it is drawn so
        said.append("The difference map is constant: it marks nothing.")
    if explains_little(margin, residual):
        whole, missing = signed(margin, residual)
        said.append(
            f"The map explains little: of a margin of {whole} logits, {missing} are not on it."
        )
    if is_coarse(maps.true.shape[1:]):
        cells = " × ".join(map(str, maps.true.shape[1:]))
        said.append(f"The grid has only {cells} cells: the map tells regions, not places.")
    return said
