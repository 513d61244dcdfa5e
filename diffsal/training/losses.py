"""Losses that train with salience maps: Equations 2-5 of the paper, as modules and as functions.

Each takes the maps of one forward pass (:meth:`diffsal.maps.salience.capture.maps`, with the
labels) and the batch's human maps, and contains the cross-entropy. All are weighted sums of terms
that :meth:`SalienceLoss.terms` returns one by one. ``norm`` is
:func:`diffsal.maps.salience_maps.normalize`, and MSE the mean over a map's cells. With one logit
``f = -t``, hence ``norm f = 1 - norm t``: both terms of Eq. 4 that hold human maps are the same
number, and the last term of Eq. 5 is zero.

**Human maps** (B, H, W) or (B, 1, H, W), for volumes (B, D, H, W) or (B, 1, D, H, W), are of any
size, type (floating point, integer, bool) and scale. They are brought to the size of the model's
maps first and normalised after. ``pool="area"`` averages what each cell covers, pixels that it
covers partly by that part, so that the map's mean is kept whatever the two sizes; this is adaptive
average pooling where the model's size divides the human's, and differs from it elsewhere (200 to 7:
there, bins are widened to whole pixels). It reads the same way for a human map smaller than the
model's. ``pool="max"`` takes the largest of the pixels that a cell touches: a defect of a few
pixels disappears in an average over a cell of 32 x 32.

**A sample without a human map** is marked by a map of NaN, so that batches stay tensors; ``None``
stands for a batch without any. It contributes to the terms that need no human map alone, and so
does one whose map holds nothing to learn from: constant at the model's size, or not finite.

**Every term is the sum over the samples that contribute, divided by the batch size**, so that equal
shards of a batch on several processes average to the joint batch's loss and gradient. Everything is
computed in float32 (float64 for float64 maps), under autocast too, and without waiting for the
device."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.contrast import predicted_class
from diffsal.maps.salience_maps import SalienceMaps, normalize
from diffsal.training.human_maps import Pool, check_pool, masked_mse, targets_for

MapOf: TypeAlias = Literal["label", "predicted"]
"""Whose class's map is compared with the human's."""


def cross_entropy_loss(maps: SalienceMaps, human_maps: Tensor | None) -> Tensor:
    """CE alone; the functional form of :class:`CrossEntropyLoss`.

    Example:
        >>> seen = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> cross_entropy_loss(maps, None)  # log 2
        tensor(0.6931)
    """
    return CrossEntropyLoss().forward(maps, human_maps)


def baseline_salience_loss(
    maps: SalienceMaps,
    human_maps: Tensor | None,
    alpha: float = 0.5,
    beta: float = 0.5,
    pool: Pool = "area",
) -> Tensor:
    """α·CE + β·MSE(h, norm t), Eq. 2; the functional form of :class:`BaselineSalienceLoss`.

    Example:
        >>> seen = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> baseline_salience_loss(maps, seen)  # the human saw the same: log 2 / 2
        tensor(0.3466)
    """
    return BaselineSalienceLoss(alpha, beta, pool).forward(maps, human_maps)


def difference_salience_loss(
    maps: SalienceMaps,
    human_maps: Tensor | None,
    alpha: float = 0.5,
    beta: float = 0.5,
    pool: Pool = "area",
) -> Tensor:
    """α·CE + β·MSE(h, norm(t - f)), Eq. 3; as :class:`DifferenceSalienceLoss`.

    Example:
        >>> seen = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> difference_salience_loss(maps, seen.flip(2))  # two of four cells are wrong
        tensor(0.5966)
    """
    return DifferenceSalienceLoss(alpha, beta, pool).forward(maps, human_maps)


def per_class_salience_loss(
    maps: SalienceMaps,
    human_maps: Tensor | None,
    alpha: float = 0.3,
    beta: float = 0.3,
    gamma: float = 0.3,
    pool: Pool = "area",
) -> Tensor:
    """α·CE + β·MSE(h, norm t) + γ·MSE(1 - h, norm f), Eq. 4; as :class:`PerClassSalienceLoss`.

    Example:
        >>> seen = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> per_class_salience_loss(maps, seen)  # both maps are as wanted: 0.3 log 2
        tensor(0.2079)
    """
    return PerClassSalienceLoss(alpha, beta, gamma, pool).forward(maps, human_maps)


def contrast_salience_loss(
    maps: SalienceMaps,
    human_maps: Tensor | None,
    alpha: float = 0.3,
    beta: float = 0.3,
    gamma: float = 0.3,
    pool: Pool = "area",
    detach_target: bool = False,
) -> Tensor:
    """α·CE + β·MSE(h, norm t) + γ·MSE(1 - norm t, norm f), Eq. 5.

    The functional form of :class:`ContrastSalienceLoss`.

    Example:
        >>> seen = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> contrast_salience_loss(maps, None)  # the false map is the true one, not its complement
        tensor(0.5079)
    """
    return ContrastSalienceLoss(alpha, beta, gamma, pool, detach_target).forward(maps, human_maps)


class SalienceLoss(nn.Module):
    """What the losses share: named terms, and their weighted sum.

    Attributes:
        weights: the weight of each term, by its name.

    Example:
        >>> class SparseLoss(SalienceLoss):
        ...     def terms(self, maps, human_maps):
        ...         size = maps.difference.abs().mean()
        ...         return {"cross_entropy": cross_entropy(maps), "size": size}
        >>> SparseLoss(cross_entropy=1.0, size=0.1)
        SparseLoss(cross_entropy=1.0, size=0.1)
    """

    def __init__(self, **weights: float) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, maps: SalienceMaps, human_maps: Tensor | None) -> Tensor:
        """The loss, a scalar.

        Args:
            maps: of a batch of B samples, whose true classes are their labels.
            human_maps: (B, H, W) or (B, 1, H, W), see the module; ``None``: there are none.

        Raises:
            DiffsalError: maps whose true class is not a label; human maps of another batch size,
                number of axes or device.
        """
        return self.weighted_sum(self.terms(maps, human_maps))

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """The terms, unweighted scalars in the graph; arguments and errors as for the loss."""
        raise NotImplementedError

    def weighted_sum(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The loss from its terms, for those who log them: no term is computed twice."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def extra_repr(self) -> str:
        """The weights, by term."""
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())


class CrossEntropyLoss(SalienceLoss):
    """Cross-entropy alone, called like the others: the reference that learns from no map.

    ``CE = -log p(y)``, of the softmax over K logits or the sigmoid of one.

    Term: ``cross_entropy``.

    Shape:
        maps of (B, h, w) with logits (B, K); human maps are ignored; the result is a scalar.

    Example:

        >>> from diffsal.maps.salience import capture
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(4, 2))
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 1, 9, 9)), true=[0, 1, 1])
        >>> loss = CrossEntropyLoss()(maps, None)
        >>> bool(loss == F.cross_entropy(maps.logits, torch.tensor([0, 1, 1])))
        True
    """

    def __init__(self) -> None:
        super().__init__(cross_entropy=1.0)

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``."""
        return {"cross_entropy": cross_entropy(maps)}


class BaselineSalienceLoss(SalienceLoss):
    """Equation 2, as CYBORG does it: the true class's map is to look like the human's.

    ``α·CE + β·MSE(h, norm t)``

    Terms: ``cross_entropy``, ``true``.

    Shape:
        maps of (B, h, w), human maps (B, H, W) or (B, 1, H, W) or ``None``; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the true map's term.
        pool: how human maps are brought to the maps' size, ``area`` or ``max``.
        map_of: whose class's map t is: the ``label``'s, as in the paper, or the ``predicted``
            class's, as in the scripts of its authors. The two differ where a prediction is wrong,
            and then, with three classes or more, the maps' false class has to be the runner-up.

    Example:

        >>> from diffsal.maps.salience import capture
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(4, 2))
        >>> human_maps = torch.zeros(3, 9, 9)
        >>> human_maps[:, :, :4] = 1
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 1, 9, 9)), true=[0, 1, 1])
        >>> criterion = BaselineSalienceLoss()
        >>> criterion(maps, human_maps).backward()
        >>> list(criterion.terms(maps, human_maps))
        ['cross_entropy', 'true']
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        pool: Pool = "area",
        map_of: MapOf = "label",
    ) -> None:
        super().__init__(cross_entropy=alpha, true=beta)
        self.pool, self.map_of = check_pool(pool), map_of

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy`` and ``true``."""
        seen = maps.true
        if self.map_of == "predicted":
            is_right = predicted_class(maps.logits) == maps.true_class
            seen = maps.true.where(is_right[:, None, None], maps.false)
        human, present = targets_for(human_maps, seen, self.pool)
        return {
            "cross_entropy": cross_entropy(maps),
            "true": masked_mse(human, normalize(seen), present),
        }


class DifferenceSalienceLoss(SalienceLoss):
    """Equation 3: what decides between the classes is to lie where the human looked.

    ``α·CE + β·MSE(h, norm(t - f))``

    Terms: ``cross_entropy``, ``difference``.

    Shape:
        maps of (B, h, w), human maps (B, H, W) or (B, 1, H, W) or ``None``; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the difference map's term.
        pool: how human maps are brought to the maps' size, ``area`` or ``max``.

    Example:

        >>> from diffsal.maps.salience import capture
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(4, 2))
        >>> defect = torch.zeros(3, 1, 90, 90, dtype=torch.uint8)
        >>> defect[:, :, 40, 50] = 255
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 1, 9, 9)), true=[0, 1, 1])
        >>> DifferenceSalienceLoss(pool="max")(maps, defect).backward()
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, pool: Pool = "area") -> None:
        super().__init__(cross_entropy=alpha, difference=beta)
        self.pool = check_pool(pool)

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy`` and ``difference``."""
        human, present = targets_for(human_maps, maps.true, self.pool)
        return {
            "cross_entropy": cross_entropy(maps),
            "difference": masked_mse(human, normalize(maps.difference), present),
        }


class PerClassSalienceLoss(SalienceLoss):
    """Equation 4: the true map is to look like the human's, the false map like its complement.

    ``α·CE + β·MSE(h, norm t) + γ·MSE(1 - h, norm f)``

    Terms: ``cross_entropy``, ``true``, ``false``.

    Shape:
        maps of (B, h, w), human maps (B, H, W) or (B, 1, H, W) or ``None``; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the true map's term.
        gamma: weight of the false map's term.
        pool: how human maps are brought to the maps' size, ``area`` or ``max``.

    Example:

        >>> from diffsal.maps.salience import capture
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(4, 2))
        >>> human_maps = torch.rand(3, 9, 9)
        >>> human_maps[1] = torch.nan  # the second sample has none
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 1, 9, 9)), true=[0, 1, 1])
        >>> PerClassSalienceLoss()(maps, human_maps).backward()
    """

    def __init__(
        self, alpha: float = 0.3, beta: float = 0.3, gamma: float = 0.3, pool: Pool = "area"
    ) -> None:
        super().__init__(cross_entropy=alpha, true=beta, false=gamma)
        self.pool = check_pool(pool)

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``, ``true`` and ``false``."""
        human, present = targets_for(human_maps, maps.true, self.pool)
        true, false = _normalized_pair(maps)
        return {
            "cross_entropy": cross_entropy(maps),
            "true": masked_mse(human, true, present),
            "false": masked_mse(1 - human, false, present),
        }


class ContrastSalienceLoss(SalienceLoss):
    """Equation 5: the true map is to look like the human's, the false map like its complement.

    ``α·CE + β·MSE(h, norm t) + γ·MSE(1 - norm t, norm f)``

    The last term needs no human map.

    Terms: ``cross_entropy``, ``true``, ``contrast``.

    Shape:
        maps of (B, h, w), human maps (B, H, W) or (B, 1, H, W) or ``None``; the result is a scalar.

    Args:
        alpha: weight of the cross-entropy.
        beta: weight of the true map's term.
        gamma: weight of the term between the maps.
        pool: how human maps are brought to the maps' size, ``area`` or ``max``.
        detach_target: whether ``1 - norm t`` is a target only, which the last term does not move.
            The paper does not say; its equation, read literally, moves both.

    Example:

        >>> from diffsal.maps.salience import capture
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                       nn.Linear(4, 2))
        >>> with capture(model) as captured:
        ...     maps = captured.maps(model(torch.rand(3, 1, 9, 9)), true=[0, 1, 1])
        >>> criterion = ContrastSalienceLoss()
        >>> terms = criterion.terms(maps, torch.rand(3, 9, 9))
        >>> criterion.weighted_sum(terms).backward()
        >>> {name: term.item() for name, term in terms.items()}.keys()  # for the log
        dict_keys(['cross_entropy', 'true', 'contrast'])
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.3,
        gamma: float = 0.3,
        pool: Pool = "area",
        detach_target: bool = False,
    ) -> None:
        super().__init__(cross_entropy=alpha, true=beta, contrast=gamma)
        self.pool = check_pool(pool)
        self.detach_target = detach_target

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """``cross_entropy``, ``true`` and ``contrast``."""
        human, present = targets_for(human_maps, maps.true, self.pool)
        true, false = _normalized_pair(maps)
        target = 1 - (true.detach() if self.detach_target else true)
        return {
            "cross_entropy": cross_entropy(maps),
            "true": masked_mse(human, true, present),
            "contrast": masked_mse(target, false),
        }


LOSSES: dict[str, type[SalienceLoss]] = {
    "cross-entropy": CrossEntropyLoss,
    "baseline": BaselineSalienceLoss,
    "difference": DifferenceSalienceLoss,
    "per-class": PerClassSalienceLoss,
    "contrast": ContrastSalienceLoss,
}


def _normalized_pair(maps: SalienceMaps) -> tuple[Tensor, Tensor]:
    """Both classes' maps, each sample's by itself: at once, as small steps wait for the host."""
    true, false = normalize(torch.cat([maps.true, maps.false])).chunk(2)
    return true, false


def cross_entropy(maps: SalienceMaps) -> Tensor:
    """The mean over the batch of ``-log p(y)``, in float32 at least; the term of every loss.

    Raises:
        DiffsalError: maps whose true class is not a label.

    Example:
        >>> seen = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> maps = SalienceMaps(seen, -seen, z, z[:, 1], z[:, 0], y, 1 - y, "label")
        >>> cross_entropy(maps)
        tensor(0.6931)
    """
    if maps.true_from != "label":
        raise DiffsalError(
            f"the maps' true class is the {maps.true_from}'s, not the label: a loss needs labels, "
            "take the maps with captured.maps(logits, true=labels)"
        )
    logits = maps.logits.to(torch.promote_types(maps.logits.dtype, torch.float32))
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], maps.true_class.to(logits.dtype))
    return F.cross_entropy(logits, maps.true_class)
