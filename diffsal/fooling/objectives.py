"""Losses that train a map to show the attacker's target.

Passive fooling is the paper's (Eq. 2 with a false human map); top-k and center-mass are those of
Heo, Joo and Moon (NeurIPS 2019)."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.fooling.consistency import (
    composite_inconsistency,
    every_test_failed,
    gradient_disagreement,
    inconsistency_whatever_the_seams,
    seams_unrecognised,
)
from diffsal.fooling.targets import Measure, centroid_shift, target_distance, top_cells
from diffsal.maps.salience_maps import SalienceMaps, normalize
from diffsal.training.human_maps import masked_mse, targets_for
from diffsal.training.loop import Look
from diffsal.training.losses import (
    BaselineSalienceLoss,
    DifferenceSalienceLoss,
    SalienceLoss,
    cross_entropy,
)

Objective: TypeAlias = Literal[
    "true",
    "difference",
    "both",
    "composite",
    "gradient",
    "every-test",
    "any-seams",
    "seams",
    "top-k",
    "center-mass",
    "control",
]
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
        >>> seen = torch.zeros(1, 4, 5)
        >>> seen[0, 0, 0] = 1
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> terms = BothMapsLoss().terms(maps, seen)
        >>> terms["true"], terms["false"]  # the false map, -seen, is as far off as can be
        (tensor(0.), tensor(1.))
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__(cross_entropy=alpha, true=beta, false=beta)

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``, ``true`` and ``false``."""
        target, present = targets_for(human_maps, maps.true, "area")
        return {
            "cross_entropy": cross_entropy(maps),
            "true": masked_mse(target, normalize(maps.true), present),
            "false": masked_mse(target, normalize(maps.false), present),
        }


class _ReferenceLoss(SalienceLoss):
    """Cross-entropy, and a measure between the true map and the honest model's."""

    def __init__(self, name: str, measure: Measure, alpha: float, weight: float) -> None:
        super().__init__(cross_entropy=alpha, **{name: weight})
        self.name, self.measure = name, measure

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy`` and the measure's mean over the batch."""
        if human_maps is None or human_maps.shape != maps.true.shape:
            raise DiffsalError(
                f"{type(self).__name__} needs the honest model's maps of shape "
                f"{tuple(maps.true.shape)} in the place of human maps"
            )
        away = self.measure(maps.true, human_maps.to(maps.true.dtype)).mean()
        return {"cross_entropy": cross_entropy(maps), self.name: away}


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
        >>> seen = torch.zeros(1, 4, 5)
        >>> seen[0, 0, 0] = 1
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> TopKLoss().terms(maps, seen)["top_cells"]  # one of the two highest cells still is
        tensor(0.5000)
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
        >>> seen = torch.zeros(1, 4, 5)
        >>> seen[0, 0, 0] = 1
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen.flip(1, 2), -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> CenterMassLoss().terms(maps, seen)["centroid_shift"]  # 3/4 down and 4/5 across
        tensor(1.5500)
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__("centroid_shift", centroid_shift, alpha, -beta)


class ControlLoss(SalienceLoss):
    """α·CE alone: of an attack, what is left without its target.

    Training changes maps anyway. A fooled model is compared with the honest model fine-tuned as
    long, never with the honest model alone.

    Term: ``cross_entropy``.

    Shape:
        maps of (B, h, w); human maps are ignored; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy, as in the attack that it is the control of.

    Example:
        >>> ControlLoss()
        ControlLoss(cross_entropy=0.5)
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__(cross_entropy=alpha)

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``."""
        return {"cross_entropy": cross_entropy(maps)}


OBJECTIVES: dict[Objective, type[SalienceLoss]] = {
    "true": BaselineSalienceLoss,
    "difference": DifferenceSalienceLoss,
    "both": BothMapsLoss,
    "composite": DifferenceSalienceLoss,
    "gradient": DifferenceSalienceLoss,
    "every-test": DifferenceSalienceLoss,
    "any-seams": DifferenceSalienceLoss,
    "seams": DifferenceSalienceLoss,
    "top-k": TopKLoss,
    "center-mass": CenterMassLoss,
    "control": ControlLoss,
}
"""Objective to loss: bring the true map (the paper), the difference map (an attacker who knows this
package) or both classes' maps to the target; or the true map away from what it was. Those of
:data:`TESTS` are attackers who know a test, too: they bring the difference map to the target and
add γ times its term. The ``control`` has no target."""

Test: TypeAlias = Callable[[Look, Tensor, Tensor, SalienceMaps], Tensor]
"""A look at the model, a batch's images, labels and maps, to a scalar; 0: the test is passed."""

TESTS: dict[Objective, Callable[[nn.Module], Test]] = {
    "composite": lambda _: composite_inconsistency,
    "gradient": lambda _: gradient_disagreement,
    "every-test": lambda _: every_test_failed,
    "any-seams": lambda _: inconsistency_whatever_the_seams,
    "seams": lambda honest: partial(seams_unrecognised, honest=honest),
}
"""Objective to the test that the fooled maps are to pass, of the honest model."""

MEASURES: dict[Objective, Measure] = {
    **dict.fromkeys(OBJECTIVES, target_distance),
    "top-k": top_cells,
    "center-mass": centroid_shift,
}
"""Objective to what tells of each map how far the attack got."""
