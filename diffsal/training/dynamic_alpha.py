"""The weight of the cross-entropy that the authors' newest training script takes, for any loss."""

from collections.abc import Mapping

from torch import Tensor

from diffsal.errors import DiffsalError
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.training.losses import SalienceLoss

_EPSILON = 1e-8  # the script's


class DynamicAlphaLoss(SalienceLoss):
    """Another loss's terms, weighed by their own sizes: α·CE + (1 - α)·S, α = CE / (CE + S).

    S is the mean of the loss's salience terms, each by its weight there: for Eq. 2 and 3 the term
    itself. As in the VISER script of the paper's authors (github.com/CVRL/VISER), α is part of the
    graph, so that the loss is (CE² + S²) / (CE + S). **Where CE is below 0.41 S, less
    cross-entropy makes this loss larger**: decisions, once good, are not improved further. The
    sizes are those of a batch, or of each process's share of it, so that shards of a batch do not
    average to the whole's loss.

    Terms: those of the other loss.

    Shape:
        as the other loss's.

    Args:
        loss: with a cross-entropy and one salience term or more; of its weights, the
            cross-entropy's is not used.

    Raises:
        DiffsalError: a loss of cross-entropy alone.

    Example:
        >>> import torch
        >>> from diffsal.training.losses import BaselineSalienceLoss
        >>> criterion = DynamicAlphaLoss(BaselineSalienceLoss())
        >>> terms = {"cross_entropy": torch.tensor(3.0), "true": torch.tensor(1.0)}
        >>> criterion.weighted_sum(terms)  # α is 3/4
        tensor(2.5000)
    """

    def __init__(self, loss: SalienceLoss) -> None:
        super().__init__(**loss.weights)
        self.loss = loss
        self.salience = {name: w for name, w in loss.weights.items() if name != "cross_entropy"}
        if not self.salience:
            raise DiffsalError(
                "dynamic_alpha weighs cross-entropy against salience, and this loss has none: "
                "choose another method, or leave dynamic_alpha out"
            )

    def terms(self, maps: SalienceMaps, human_maps: Tensor | None) -> dict[str, Tensor]:
        """Those of the other loss."""
        return self.loss.terms(maps, human_maps)

    def weighted_sum(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The loss from its terms."""
        total = sum(self.salience.values())
        weighted = [weight / total * terms[name] for name, weight in self.salience.items()]
        salience = sum(weighted[1:], start=weighted[0])
        alpha = terms["cross_entropy"] / (terms["cross_entropy"] + salience + _EPSILON)
        return alpha * terms["cross_entropy"] + (1 - alpha) * salience

    def extra_repr(self) -> str:
        """The salience terms' weights; the other loss stands below."""
        return ", ".join(f"{name}={weight}" for name, weight in self.salience.items())
