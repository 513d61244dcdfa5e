"""From what a model returns to logits: containers, and outputs that are probabilities.

A model that ends in a sigmoid or a softmax returns probabilities. Read as logits they would turn a
confident "no" into a timid "yes", so they are recognised by the operation that made them, and the
maps are taken of what went into it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffsal.errors import DiffsalError

Outputs: TypeAlias = Literal["logits", "probabilities"]
"""What a user may say that a model returns."""

Squash: TypeAlias = Literal["sigmoid", "softmax", "log-softmax"]
"""What a model did to its logits before it returned them."""

_SQUASHES: dict[Any, Squash] = {
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, torch.special.expit, F.sigmoid), "sigmoid"),
    **dict.fromkeys((Tensor.sigmoid, Tensor.sigmoid_), "sigmoid"),
    **dict.fromkeys((torch.softmax, torch.special.softmax, F.softmax, Tensor.softmax), "softmax"),
    **dict.fromkeys((torch.log_softmax, torch.special.log_softmax), "log-softmax"),
    **dict.fromkeys((F.log_softmax, Tensor.log_softmax), "log-softmax"),
}
_ENDS: dict[
    str, Squash
] = {  # the nodes of autograd whose results are probabilities or their logarithms
    "SigmoidBackward0": "sigmoid",
    "HardsigmoidBackward0": "sigmoid",
    "TanhBackward0": "sigmoid",  # (1 + tanh) / 2
    "SoftmaxBackward0": "softmax",
    "ExpBackward0": "softmax",  # written out
    "LogSoftmaxBackward0": "log-softmax",
}
# What picks, moves or averages probabilities.
_THROUGH = (
    *(
        "View",
        "ReshapeAlias",
        "UnsafeView",
        "Unsqueeze",
        "Squeeze",
        "Clone",
        "Alias",
        "Select",
    ),
    *(
        "Slice",
        "ToCopy",
        "Cat",
        "Stack",
        "Mean",
        "Add",
        "Sub",
        "Rsub",
        "Div",
        "Mul",
        "Sum",
    ),
    *("Clamp", "Permute", "Transpose", "Expand", "Flatten", "Index", "T"),
)
_DECLARED = "_diffsal_outputs"
_MOST_NODES = 200  # to look at behind the output
_SUM = 1e-3  # how far from one the sum of probabilities may be, in half precision too


class Recorded(NamedTuple):
    """A sigmoid or softmax that ran."""

    squash: Squash
    before: Tensor
    after: Tensor


class ModelScores(NamedTuple):
    """Logits (B, K), and what the model had made of them; ``None``: it returned logits."""

    logits: Tensor
    squash: Squash | None


_KNOWN: "WeakKeyDictionary[nn.Module, dict[bool, Squash | None]]" = WeakKeyDictionary()


def declare_outputs(model: nn.Module, outputs: Outputs | None) -> None:
    """Say what a model returns, where that cannot be told from how it is made.

    Args:
        model: whoever explains it from now on goes by it.
        outputs: ``None``: it is told from the model again.

    Raises:
        DiffsalError: another word.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Hardtanh(0, 1))
        >>> declare_outputs(model, "probabilities")
        >>> logits_of_run(model, torch.rand(2, 1, 2, 2)).squash
        'sigmoid'
    """
    _check_word(outputs)
    model.__dict__[_DECLARED] = outputs  # there, so that copies of the model have it too


def logits_of_run(model: nn.Module, *inputs: Any) -> ModelScores:
    """Run a model, and read what it returns as logits (B, K).

    Raises:
        DiffsalError: see :func:`scores_of_output`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1))
        >>> logits_of_run(model, torch.rand(2, 1, 2, 2)).squash
        'softmax'
    """
    if not may_squash(model, model.training):
        return scores_of_output(model(*inputs), (), declared_outputs(model))
    with recording_squashes() as squashes:
        found = scores_of_output(model(*inputs), squashes, declared_outputs(model))
    remember_squash(model, found.squash, model.training)
    return found


def may_squash(model: nn.Module, training: bool, outputs: Outputs | None = None) -> bool:
    """Whether a model may return probabilities, in that mode: unless it was seen not to."""
    outputs = outputs or declared_outputs(model)
    return outputs != "logits" and _KNOWN.get(model, {}).get(training, "unknown") is not None


def declared_outputs(model: nn.Module) -> Outputs | None:
    """What was said of a model by :func:`declare_outputs`."""
    declared: Outputs | None = model.__dict__.get(_DECLARED)
    return declared


def remember_squash(model: nn.Module, squash: Squash | None, training: bool) -> None:
    """Spare the model's next runs what it takes to note sigmoids, where it has none at its end."""
    _KNOWN.setdefault(model, {})[training] = squash


class _Recording(TorchFunctionMode):
    def __init__(self, found: list[Recorded]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        squash = _SQUASHES.get(function)
        if squash is None or not args:
            return function(*args, **(kwargs or {}))
        before = args[0].clone() if function in (Tensor.sigmoid_, torch.sigmoid_) else args[0]
        after = function(*args, **(kwargs or {}))
        self.found[:] = [*self.found[-7:], Recorded(squash, before, after)]
        return after


@contextmanager
def recording_squashes() -> Iterator[list[Recorded]]:
    """Note the last sigmoids and softmaxes that run, with what went into them.

    Example:
        >>> with recording_squashes() as squashes:
        ...     output = torch.sigmoid(torch.tensor([[2.0]]))
        >>> scores_of_output(output, squashes)
        ModelScores(logits=tensor([[2.]]), squash='sigmoid')
    """
    found: list[Recorded] = []
    with _Recording(found):
        yield found


def output_logits(output: Any) -> Any:
    """The tensor of logits in what a model returns: itself, its ``logits``, or the only candidate.

    Args:
        output: a tensor; an object or mapping with ``logits`` (transformers, Inception); or a
            tuple, list or mapping of which one tensor is (B, K).

    Raises:
        DiffsalError: several tensors could be the logits, or none.

    Example:
        >>> output_logits({"logits": torch.zeros(2, 3), "features": torch.zeros(2, 64)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return _flat(output)
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if logits is None else logits
    if isinstance(logits, Tensor):
        return _flat(logits)
    if not isinstance(output, Mapping | Sequence) or isinstance(output, str):
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    found = [_flat(part) for part in parts if isinstance(part, Tensor)]
    found = [part for part in found if part.ndim <= 2 and part.is_floating_point()]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} tensors that could be its logits" if found else "no tensor of logits"
    raise DiffsalError(
        f"the model returns a {type(output).__name__} with {what}: wrap it in a module that "
        "returns (batch, classes) alone"
    )


def scores_of_output(
    output: Any, squashes: Sequence[Recorded] = (), outputs: Outputs | None = None
) -> ModelScores:
    """The logits behind a model's output.

    Where the output is what a recorded sigmoid or softmax returned, they are what went into it;
    where only the graph or, written out, the values tell that these are probabilities, they are
    log p, or the log-odds of single outputs.

    Args:
        output: what the model returned, see :func:`output_logits`.
        squashes: of :func:`recording_squashes`.
        outputs: what the caller knows the output to be; ``None``: it is recognised.

    Raises:
        DiffsalError: an unknown word for ``outputs``, or values that are no probabilities; see
            :func:`output_logits`.
    """
    _check_word(outputs)
    result = output_logits(output)
    if not isinstance(result, Tensor) or not result.is_floating_point() or outputs == "logits":
        return ModelScores(result, None)
    result = result[:, None] if result.ndim == 1 else result
    for one in reversed(squashes):
        if _is_same(result, one.after):
            return ModelScores(one.before.reshape(result.shape), one.squash)
    squash = _end_of(result)
    if outputs == "probabilities" and squash != "log-softmax":
        squash = "softmax" if _sums_to_one(result) else "sigmoid"
        if not _is_share(result):
            raise DiffsalError(
                "the model's outputs are not all within 0 and 1, so they are no probabilities: "
                "leave out outputs='probabilities'"
            )
    return _undone(result, squash)


def _check_word(outputs: Outputs | None) -> None:
    if outputs not in (None, *get_args(Outputs)):
        raise DiffsalError(f"outputs={outputs!r} is unknown: pass 'logits' or 'probabilities'")


def _undone(result: Tensor, squash: Squash | None) -> ModelScores:
    if squash is None or squash == "log-softmax":
        return ModelScores(result, squash)
    if not _is_share(result):
        return ModelScores(result, None)
    exact = result.to(torch.promote_types(result.dtype, torch.float32))
    least = torch.finfo(exact.dtype).tiny
    if result.shape[1] > 1 and _sums_to_one(result):
        return ModelScores(exact.clamp(min=least).log(), "softmax")
    most = 1 - torch.finfo(exact.dtype).eps / 2
    return ModelScores(exact.clamp(least, most).logit(), "sigmoid")


def _end_of(result: Tensor) -> Squash | None:
    """The one kind of operation that everything in the output came out of, if it squashes."""
    ends: set[Squash | None] = set()
    visited: set[Any] = set()
    pending = [result.grad_fn]
    while pending and len(visited) < _MOST_NODES:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.name().partition("Backward")[0] in _THROUGH:
            pending += [one for one, _ in node.next_functions]
        else:
            ends.add(_ENDS.get(node.name()))
    return ends.pop() if len(ends) == 1 else None


def _flat(tensor: Tensor) -> Tensor:
    """(B, K, 1, 1) as (B, K)."""
    is_map = tensor.ndim > 2 and tensor[0, 0].numel() == 1
    return tensor.flatten(1) if is_map else tensor


def _is_same(result: Tensor, other: Tensor) -> bool:
    return result is other or (
        result.numel() == other.numel()
        and result.dtype == other.dtype
        and len(result) == len(other)
        and result.data_ptr() == other.data_ptr()
        and result.data_ptr() != 0
    )


def _is_share(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _sums_to_one(values: Tensor) -> bool:
    return values.shape[1] > 1 and bool(((values.float().sum(1) - 1).abs() < _SUM).all())
