"""From logits and labels to the two scores whose maps are compared.

Softmax sees differences of logits only, so a decision is explained by two scores, not by one. This
is the one place that knows how a model's output is turned into them:

==================  ====================  ==========================================================
model output        true score            false score
==================  ====================  ==========================================================
2 logits            logit of the label    the other logit
1 logit z           +z/2 (class 1),       the negative of the true score, so that the margin is the
                    -z/2 (class 0)        log-odds z (class 1) or -z (class 0)
K logits            logit of the label    a class, the runner-up, or the rest
==================  ====================  ==========================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffsal.errors import DiffsalError

Score: TypeAlias = Callable[[Tensor], Tensor]
"""One sample's output (K,) to a scalar, as grad-cam's targets are called."""

Choice: TypeAlias = "int | str | Score | Tensor | Sequence[int | Score] | None"
"""Who is true, or false: see :func:`contrast`."""

NO_CLASS = -1
"""Stands in ``true_class`` and ``false_class`` where a score is not the logit of one class."""


@dataclass(frozen=True)
class Contrast:
    """Two scores per sample, in logit units, and the classes that they stand for.

    Attributes:
        true_score: (B,) in the logits' graph.
        false_score: (B,) in the logits' graph.
        true_class: (B,) int64, :data:`NO_CLASS` for a callable.
        false_class: (B,) int64, :data:`NO_CLASS` for a callable and for the rest.
        true_from: where the true class comes from: a ``label`` that was given, the model's
            ``prediction``, or a ``score``, which is a callable that was given.

    Example:
        >>> scores = contrast(torch.tensor([[2.0, 0.5]]), true=1)
        >>> scores.true_score, scores.false_score
        (tensor([0.5000]), tensor([2.]))
    """

    true_score: Tensor
    false_score: Tensor
    true_class: Tensor
    false_class: Tensor
    true_from: Literal["label", "prediction", "score"]


def class_count(logits: Tensor) -> int:
    """Number of classes that ``logits`` (B, K) tell apart: 2 for one logit, else K.

    Example:
        >>> class_count(torch.zeros(4, 1)), class_count(torch.zeros(4, 5))
        (2, 5)
    """
    return max(logits.shape[1], 2)


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities (B, max(K, 2)): softmax, or both sides of the sigmoid of one logit.

    Example:
        >>> probabilities(torch.tensor([[0.0], [2.0]]))
        tensor([[0.5000, 0.5000],
                [0.1192, 0.8808]])
    """
    if logits.shape[1] == 1:
        return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1)
    return logits.softmax(dim=1)


def contrast(logits: Tensor, true: Choice = None, false: Choice = None) -> Contrast:
    """Choose the two scores of each sample.

    Args:
        logits: (B, K) or, for one logit, (B,); floating point.
        true: the label: a class for all samples, (B,) classes, or a callable (one for all, or one
            per sample) from one sample's logits (K,) to a scalar. ``None``: the predicted class.
        false: what to set against it: the same choices, ``"runner-up"`` (the strongest other
            class) or ``"rest"`` (the mean of the other logits, weighted by the detached softmax
            over them alone; over all, if the true score is a callable). Its gradient is that of
            their log-sum-exp, so the difference map is that of the true class's log-odds.
            ``None``: the other class of two, the runner-up of more; a callable as ``true`` needs
            it named.

    Classes on the CPU are checked; on another device that would stall the training step, and
    an index out of range raises there.

    Raises:
        DiffsalError: logits that cannot be contrasted, a class out of range, a count of choices
            that is not B, true and false classes that are the same.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, 2.0]])
        >>> contrast(logits).false_class  # the runner-up
        tensor([2])
        >>> contrast(logits, true=0, false="rest").false_score  # between 1 and 2, nearer to 2
        tensor([1.7311])
    """
    logits = _as_logits(logits)
    size = logits.shape[0]
    if _is_score(true):
        if false is None or (isinstance(false, str) and false == "runner-up"):
            raise DiffsalError(
                "a callable target has no opposite: name false= (a class, a callable or 'rest')"
            )
        named = true_class = torch.full((size,), NO_CLASS, device=logits.device)
        true_score = _call_scores(true, logits, "true")
    else:
        named = predicted_class(logits) if true is None else _as_classes(true, logits, "true")
        true_class = _moved(named, logits)
        true_score = _class_score(logits, true_class)
    false_class, false_score = _false(logits, named, false)
    return Contrast(
        true_score=true_score,
        false_score=false_score,
        true_class=true_class,
        false_class=false_class,
        true_from="score" if _is_score(true) else "prediction" if true is None else "label",
    )


def predicted_class(logits: Tensor) -> Tensor:
    """(B,) int64: the largest logit, or the sign of the only one.

    Example:
        >>> predicted_class(torch.tensor([[-0.3], [0.3]]))
        tensor([0, 1])
        >>> predicted_class(torch.tensor([[2.0, 5.0]]))
        tensor([1])
    """
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).long()
    return logits.argmax(dim=1)


def _as_logits(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor):
        raise DiffsalError(
            f"the model's output is a {type(logits).__name__}, not a tensor of logits: "
            "pass a model, or a wrapper of it, that returns (batch, classes)"
        )
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise DiffsalError(
            f"the model's output has shape {tuple(logits.shape)} and type {logits.dtype}, "
            "which cannot be contrasted: floating-point logits (batch, classes) are needed"
        )
    return logits


def _is_score(choice: Choice) -> bool:
    return callable(choice) or (
        isinstance(choice, Sequence)
        and not isinstance(choice, str)
        and any(callable(one) for one in choice)
    )


def _call_scores(choice: Choice, logits: Tensor, side: str) -> Tensor:
    size = logits.shape[0]
    scores = [choice] * size if callable(choice) else list(choice)  # type: ignore[arg-type]
    if len(scores) != size or not all(callable(score) for score in scores):
        raise DiffsalError(
            f"{side}= holds {len(scores)} targets for a batch of {size}: "
            "pass one callable for all, or one for each sample"
        )
    values = [score(row) for score, row in zip(scores, logits, strict=True)]
    if not all(isinstance(value, Tensor) and value.numel() == 1 for value in values):
        raise DiffsalError(
            f"a callable given as {side}= does not return a single number for one sample's logits"
        )
    return torch.stack([value.reshape(()) for value in values])


def _as_classes(choice: Choice, logits: Tensor, side: str) -> Tensor:
    size, count = logits.shape[0], class_count(logits)
    if type(choice) is int and 0 <= choice < count:  # with no tensor to look into
        return torch.full((size,), choice)
    try:
        classes = torch.as_tensor(choice)
    except (TypeError, ValueError, RuntimeError):
        kind = repr(choice) if isinstance(choice, str) else f"a {type(choice).__name__}"
        raise DiffsalError(f"{side}= is {kind}, not a class: pass indices below {count}") from None
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise DiffsalError(f"{side}= has type {classes.dtype}: pass class indices as integers")
    if classes.ndim == 0:
        classes = classes.expand(size)
    if classes.shape != (size,):
        raise DiffsalError(
            f"{side}= has shape {tuple(classes.shape)} for a batch of {size}: "
            "pass one class for all, or one for each sample"
        )
    if classes.device.type == "cpu":
        wrong = [one for one in classes.tolist() if not 0 <= one < count]
        if wrong:
            raise DiffsalError(
                f"{side}= names class {wrong[0]}, but the model tells {count} classes apart: "
                f"pass 0 to {count - 1}"
            )
    if classes.is_inference():
        classes = classes.clone()  # autograd saves the index, which inference tensors refuse
    return classes


def _moved(classes: Tensor, logits: Tensor) -> Tensor:
    return classes.to(logits.device, torch.int64, non_blocking=True)


def _class_score(logits: Tensor, classes: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        half = logits[:, 0] / 2
        return torch.where(classes == 1, half, -half)
    return logits.gather(1, classes[:, None])[:, 0]


def _false(logits: Tensor, named: Tensor, false: Choice) -> tuple[Tensor, Tensor]:
    """The false class and score; ``named`` are the true classes, where the caller has them."""
    true_class = _moved(named, logits)
    if _is_score(false):
        return torch.full_like(true_class, NO_CLASS), _call_scores(false, logits, "false")
    if isinstance(false, str):
        if false == "rest":
            return torch.full_like(true_class, NO_CLASS), _rest_score(logits, true_class)
        if false != "runner-up":
            raise DiffsalError(f"false={false!r} is unknown: pass a class, 'runner-up' or 'rest'")
        classes = _runner_up(logits, true_class)
    elif false is None:
        classes = _runner_up(logits, true_class)
    else:
        against = _as_classes(false, logits, "false")
        # Of labels on the CPU it is told there, where no GPU has to be waited for.
        if bool((against.to(named.device) == named).any()):
            raise DiffsalError(
                "the false class is the true class of at least one sample, so that their "
                "difference is zero everywhere: name another class"
            )
        classes = _moved(against, logits)
    return classes, _class_score(logits, classes)


def _runner_up(logits: Tensor, true_class: Tensor) -> Tensor:
    """(B,) the strongest class but the true one; of two classes, the other."""
    if class_count(logits) == 2:
        return 1 - true_class
    return logits.detach().scatter(1, true_class[:, None], -torch.inf).argmax(dim=1)


def _rest_score(logits: Tensor, true_class: Tensor) -> Tensor:
    """(B,) the mean of the others, each weighted by its share of their probability."""
    if logits.shape[1] == 1:
        other = _class_score(logits, 1 - true_class)
        return torch.where(true_class == NO_CLASS, logits[:, 0], other)
    others = torch.arange(logits.shape[1], device=logits.device) != true_class[:, None]
    weights = logits.detach().masked_fill(~others, -torch.inf).softmax(dim=1)
    return (weights * logits).sum(dim=1)
