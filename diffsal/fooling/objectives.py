"""Losses that train a map to show the attacker's target.

Passive fooling is the paper's (Eq. 2 with a false human map); top-k and center-mass are those of
Heo, Joo and Moon (NeurIPS 2019)."""

from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from diffsal.errors import DiffsalError
from diffsal.fooling.targets import Measure, centroid_shift, target_distance, top_cells
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.training.losses import (
    BaselineSalienceLoss,
    CrossEntropyLoss,
    DifferenceSalienceLoss,
    SalienceLoss,
)

Objective: TypeAlias = Literal["true", "difference", "both", "top-k", "center-mass"]
"""What training moves: see :data:`OBJECTIVES`."""


class BothMapsLoss(SalienceLoss):
    """Both classes' maps are to look like the target: α·CE + β·(MSE(h, norm t) + MSE(h, norm f)).

    Terms: ``cross_entropy``, ``true``, ``false``.

    Shape:
        maps of (B, h, w), targets as the human maps of the other losses; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of each map's term.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, labels = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.tensor([0, 1, 1])
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 3, 8, 8)), true=labels)
        >>> BothMapsLoss()(maps, torch.rand(3, 6, 6)).shape
        torch.Size([])
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__(cross_entropy=alpha, true=beta, false=beta)
        self.baseline = BaselineSalienceLoss()

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``, ``true`` and ``false``."""
        swapped = replace(maps, true=maps.false, false=maps.true)
        return {
            **self.baseline.terms(maps, human_maps),
            "false": self.baseline.terms(swapped, human_maps)["true"],
        }


class _ReferenceLoss(SalienceLoss):
    """Cross-entropy, and a measure between the true map and the honest model's."""

    def __init__(self, name: str, measure: Measure, alpha: float, weight: float) -> None:
        super().__init__(cross_entropy=alpha, **{name: weight})
        self.name, self.measure = name, measure
        self.cross_entropy = CrossEntropyLoss()

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy`` and the measure's mean over the batch."""
        if human_maps is None or human_maps.shape != maps.true.shape:
            raise DiffsalError(
                f"{type(self).__name__} needs the honest model's maps of shape "
                f"{tuple(maps.true.shape)} in the place of human maps"
            )
        away = self.measure(maps.true, human_maps.to(maps.true.dtype)).mean()
        return {**self.cross_entropy.terms(maps, None), self.name: away}


class TopKLoss(_ReferenceLoss):
    """Heo et al.'s top-k fooling: α·CE + β·mean of norm t over the honest map's highest cells.

    Terms: ``cross_entropy``, ``top_cells``, see :func:`top_cells`.

    Shape:
        maps of (B, h, w), and as human maps the honest model's (B, h, w); the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the highest cells.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, labels = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.tensor([0, 1, 1])
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 3, 8, 8)), true=labels)
        >>> TopKLoss()(maps, torch.rand(3, 6, 6)).shape
        torch.Size([])
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__("top_cells", top_cells, alpha, beta)


class CenterMassLoss(_ReferenceLoss):
    """Heo et al.'s center-mass fooling: α·CE - β·distance of the centroids of t and the honest map.

    Terms: ``cross_entropy``, ``centroid_shift``, see :func:`centroid_shift`.

    Shape:
        maps of (B, h, w), and as human maps the honest model's (B, h, w); the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the distance.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from diffsal.maps.salience import capture
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, labels = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.tensor([0, 1, 1])
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 3, 8, 8)), true=labels)
        >>> CenterMassLoss()(maps, torch.rand(3, 6, 6)).shape
        torch.Size([])
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__("centroid_shift", centroid_shift, alpha, -beta)


OBJECTIVES: dict[Objective, type[SalienceLoss]] = {
    "true": BaselineSalienceLoss,
    "difference": DifferenceSalienceLoss,
    "both": BothMapsLoss,
    "top-k": TopKLoss,
    "center-mass": CenterMassLoss,
}
"""Objective to loss: bring the true map (the paper), the difference map (an attacker who knows this
package) or both classes' maps to the target; or the true map away from what it was."""

MEASURES: dict[Objective, Measure] = {
    **dict.fromkeys(get_args(Objective)[:3], target_distance),
    "top-k": top_cells,
    "center-mass": centroid_shift,
}
"""Objective to what tells of each map how far the attack got."""
