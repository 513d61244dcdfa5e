"""Where features lie over the image, and which of them all of the decision passes through.

One run of the model is looked at, not its names (:mod:`diffsal.maps.run_record`). What is chosen is
the last feature map over space that every path from the logits back to the image leads through; it
is verified: its cells move when the region of the image under them does, and the logits depend on
them.

In a class-token transformer the patch tokens of the last block have no influence any more: their
gradient is exactly zero. There the layer is the first one in that block through which the patches
still reach the class token, the norm at its entrance. Where several branches look at the image and
nothing over space is common to them, all of them are taken.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.examples import Inputs, example_inputs
from diffsal.maps.layouts import Layout, fits, possible_layouts
from diffsal.maps.modes import evaluated
from diffsal.maps.outputs import Squash, remember_squash
from diffsal.maps.run_record import (
    Place,
    RunRecord,
    Seen,
    Vertex,
    movement,
    moves_with_the_region,
    record_run,
)

Example: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any] | None"

_POOLING = (
    *(
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
    ),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
)

_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_SURE = 0.7  # of moves_with_the_region, where 0.5 is chance
_HOLLOW_TRIES = 3  # sizes of noise that a copy without memory is tried on
_COVERED = 1e-3  # of the gradient at the patches, what may bypass a layer within a block


def called(name: str, call: int | None) -> str:
    """A layer's name and, where it runs several times, which of its calls: ``act#3``."""
    return name if call is None else f"{name}#{call}"


@dataclass(frozen=True)
class Candidate:
    """A tensor over space that ran.

    Attributes:
        name: of the outermost module that returned it.
        place: which part of that module's output it is.
        call: which of the module's calls it was, from 1, where it ran several times.
        layout: how it lies over the image.
        is_sure: whether the layout is: the shape leaves no choice, or its cells move with the image
            under them.
        carries_all: whether every path from the logits to the image leads through it.
        alive: share of its cells that the logits depend on.
    """

    name: str
    place: Place
    call: int | None
    layout: Layout
    is_sure: bool
    carries_all: bool
    alive: float

    def __str__(self) -> str:
        return called(self.name, self.call)


@dataclass(frozen=True)
class Look:
    """What one run of a model showed.

    Attributes:
        chosen: where maps are taken: one candidate, or branches; empty where there is none.
        candidates: all of them, in the order in which they ran.
        reason: why none was chosen.
    """

    chosen: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    reason: str = ""


_LOOKS: "WeakKeyDictionary[nn.Module, Look]" = WeakKeyDictionary()


def look_at(model: nn.Module, example: Example = None) -> Look:
    """Run a model once on one image and see over which grids its features lie.

    Args:
        model: see :func:`find_target_layer`, as is the example.

    Raises:
        DiffsalError: the model does not run on the example, or on noise of any size.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        >>> look = look_at(nn.Sequential(nn.Conv2d(3, 8, 16, 16), *head))
        >>> [(one.name, str(one.layout), one.layout.grid) for one in look.candidates]
        [('0', 'channels-first', (14, 14))]
    """
    known = _LOOKS.get(model)
    if known is not None and all(has_module(model, one.name) for one in known.candidates):
        return known
    with evaluated(model, on_trial=True) as run, _same_random_state(model):
        squash, look = _look_without_computing(run, example) or _look_at_values(run, example)
        remember_squash(model, squash, training=False)
    _LOOKS[model] = look
    return look


def _same_random_state(model: nn.Module) -> AbstractContextManager[None]:
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _look_at_values(model: nn.Module, example: Example) -> tuple[Squash | None, Look]:
    record = _run(model, list(example_inputs(model, example)), example)
    look = _look(record, model)
    if not look.chosen and not any(one.alive for one in look.candidates):
        drawn = _without_zeros(model)
        look = _look(_run(drawn, list(example_inputs(model, example)), example), drawn)
    return record.squash, look


def _look_without_computing(
    model: nn.Module, example: Example
) -> tuple[Squash | None, Look] | None:
    """The same from shapes alone, on a copy without memory; ``None`` where values have to tell.

    Tokens need values: their order, and whether they are alive, is in no shape.
    """
    try:
        with torch.inference_mode(False):
            hollow = _hollow(model)
        inputs = list(islice(example_inputs(hollow, example), _HOLLOW_TRIES))
        record = _run(hollow, [_on_meta(one) for one in inputs], example)
        look = _look(record, hollow)
    except Exception:  # whatever a model does that needs numbers
        return None
    through = [one for one in look.candidates if one.carries_all]
    clear = all(one.is_sure and one.layout.kind != "tokens" for one in through)
    return (record.squash, look) if len(look.chosen) == 1 and clear else None


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of the structure: tensors without memory, no hooks behind modules."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    hollow = _copied(model, memo)
    for module in hollow.modules():
        if _is_plain_batch_norm(module):
            module.forward = partial(_scaled, module)
    return hollow


def _is_plain_batch_norm(module: Any) -> bool:
    is_one = type(module) in _BATCH_NORMS and "forward" not in vars(module)
    return is_one and not module.training and module.running_mean is not None


def _scaled(norm: Any, features: Tensor) -> Any:
    """As batch norm in shape and graph: torch takes milliseconds to find these of each one."""
    norm._check_input_dim(features)
    if features.shape[1] != norm.num_features:
        raise ValueError(f"{norm.num_features} channels are expected, not {features.shape[1]}")
    shape = (-1, *[1] * (features.ndim - 2))
    given = (norm.running_mean, norm.running_var) if norm.weight is None else norm.parameters()
    scale, shift = (one.to(features.dtype).view(shape) for one in given)
    return features * scale + shift


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy without the hooks behind modules, which other threads set and remove meanwhile."""
    for module in model.modules():
        memo[id(module._forward_hooks)] = OrderedDict()
        memo[id(module._forward_pre_hooks)] = module._forward_pre_hooks.copy()
    return deepcopy(model, memo)


def _on_meta(inputs: Inputs) -> Inputs:
    positional, named = inputs
    return tuple(map(_moved, positional)), {key: _moved(one) for key, one in named.items()}


def _moved(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _without_zeros(model: nn.Module) -> nn.Module:
    """A copy whose weights that begin at zero are drawn, so that what is behind them shows."""
    with torch.inference_mode(False):
        drawn = _copied(model, {})
        generator = torch.Generator().manual_seed(0)
        for parameter in drawn.parameters():
            if parameter.is_floating_point() and not parameter.detach().any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise * (parameter.numel() / len(parameter)) ** -0.5)
    return drawn


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a model has a module of that name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _run(model: nn.Module, inputs: Sequence[Inputs], example: Example) -> RunRecord:
    """The record of the first inputs that the model takes."""
    reason: Exception | None = None
    for positional, named in inputs:
        try:
            return record_run(model, positional, named)
        except DiffsalError:
            raise
        except Exception as error:  # whatever a model raises on inputs that are not its own
            reason = reason or error
    what = " ".join(f"{type(reason).__name__}: {reason}".split())[:200]
    tried = "this example" if example is not None else "noise of any usual size"
    raise DiffsalError(
        f"{type(model).__name__} does not run on {tried} ({what}): pass example=, an input that it "
        "takes, or name the layer and pass a reshape_transform"
    )


def _look(record: RunRecord, model: nn.Module) -> Look:
    if not record.image:
        return Look((), (), "no feature map over space, as no input is an image,")
    found = list(_candidates(record, model))
    candidates = tuple(candidate for _, candidate in found)
    if not record.graph.reaches_the_image:
        return Look((), candidates, _why_no_gradient(model))
    single = _last_common(found, record)
    if single is not None and not _is_early(single, found):
        return Look((single,), candidates)
    branches = _branches(found, record)
    if len({record.graph.images_behind(_vertex(seen)) for seen, _ in branches}) > 1:
        names = ", ".join(str(one) for _, one in branches)
        return Look(
            (),
            candidates,
            f"several images reach the logits, each by a layer of its own ({names})",
        )
    if branches:
        return Look(tuple(one for _, one in branches), candidates)
    if single is not None:
        return Look((single,), candidates)
    return Look((), candidates, _why_none(candidates, model))


def _why_no_gradient(model: nn.Module) -> str:
    if any("quantized" in type(module).__module__ for module in model.modules()):
        return "no gradient leads through quantised layers (explain the model in floating point)"
    return "no gradient leads from the logits to the image"


def _why_none(candidates: Sequence[Candidate], model: nn.Module) -> str:
    """Why no layer could be chosen."""
    if not candidates and any(isinstance(one, torch.jit.ScriptModule) for one in model.modules()):
        return "no hooks run in what is scripted or traced, so that no feature map was found"
    if any(one.carries_all for one in candidates) and not any(one.alive for one in candidates):
        return "the logits change with no feature map, as their gradient is zero on this input,"
    return "no feature map over space that the logits pass through was found"


def _candidates(record: RunRecord, model: nn.Module) -> Iterator[tuple[Seen, Candidate]]:
    before: list[Layout] = []  # latest first
    for seen in record.seen:
        layout, is_sure = _layout(seen, record, before)
        module = _outermost(seen, record, model)
        if layout is None or module is None:
            continue
        if is_sure:
            before.insert(0, layout)
        yield (
            seen,
            Candidate(
                *module,
                layout,
                is_sure,
                record.graph.is_dominated_by(seen.vertex),
                _alive(seen, layout),
            ),
        )


def _layout(seen: Seen, record: RunRecord, before: Sequence[Layout]) -> tuple[Layout | None, bool]:
    """How a tensor lies over the image, and whether that is sure.

    Where the shape leaves a choice, and for tokens, whose order no shape tells, the layout is taken
    of which the cells move with the image under them.
    """
    if len(seen.tensor) != 2:
        return None, False
    grids = dict.fromkeys(one.grid for one in before if one.kind != "tokens")
    prefixes = dict.fromkeys(one.prefix for one in before if one.kind == "tokens")
    possible = possible_layouts(seen.tensor.shape, record.image, list(grids), list(prefixes))
    if len(possible) == 1 and possible[0].kind != "tokens" and fits(possible[0].grid, record.image):
        return possible[0], True
    surely = [moves_with_the_region(movement(layout(seen.tensor))) for layout in possible]
    for layout, one in zip(possible, surely, strict=True):
        if one >= _SURE:
            return layout, True
    if not possible:
        return None, False
    # Where all cells move alike, tokens are taken to lie as those before them did.
    is_usual = possible[0].kind == "tokens" and possible[0].prefix in (*prefixes, 0)
    return possible[0], math.isnan(surely[0]) and is_usual


def _outermost(
    seen: Seen, record: RunRecord, model: nn.Module
) -> tuple[str, Place, int | None] | None:
    """The last module that returned a tensor, of those that do not pool, and at which call.

    One that made something of it first, which the logits depend on, is none. One that ran once goes
    before one that ran again, and one that returned it alone before one that returned it among
    others.
    """
    usable: list[tuple[str, Place, int | None]] = [
        (name, place, None if record.calls[name] == 1 else call)
        for name, place, vertex, call in zip(
            seen.names, seen.places, seen.vertices, seen.calls, strict=True
        )
        if record.graph.carry_the_same(vertex, seen.vertex)
        and not isinstance(model.get_submodule(name), _POOLING)
    ]
    once = [one for one in usable if one[2] is None] or usable
    alone = [one for one in once if one[1] is None] or once
    return alone[-1] if alone else None


def _alive(seen: Seen, layout: Layout) -> float:
    if seen.gradient is None:
        return 0.0
    if seen.gradient.is_meta:  # nothing was computed: what depends on it is taken to be alive
        return 1.0
    return float((layout(seen.gradient)[0] != 0).any(0).double().mean())


def _last_common(found: Sequence[tuple[Seen, Candidate]], record: RunRecord) -> Candidate | None:
    """The last candidate that all of the logits pass through, and that they depend on."""
    later: list[tuple[Seen, Candidate]] = []
    for seen, candidate in reversed(found):
        if candidate.carries_all and _is_alive(candidate) and candidate.is_sure:
            return _within_last_block(seen, candidate, later[::-1]) or candidate
        later.append((seen, candidate))
    return None


def _is_alive(candidate: Candidate) -> bool:
    """Whether logits depend on it; beside class tokens, a few live patches are an extra."""
    return candidate.alive > (0.5 if candidate.layout.prefix else 0)


def _within_last_block(
    seen: Seen, candidate: Candidate, later: Sequence[tuple[Seen, Candidate]]
) -> Candidate | None:
    """Behind a common layer whose tokens die out: the first through which its patches still act.

    The class token bypasses it, and so do the patches' own ways that end before the logits.
    """
    if candidate.layout.kind != "tokens" or candidate.layout.prefix == 0:
        return None
    if not any(one.carries_all and not _is_alive(one) for _, one in later):
        return None
    whole = candidate.layout(_gradient(seen))
    for inner, one in later:
        if one.layout != candidate.layout or not _is_alive(one) or not one.is_sure:
            continue
        (through,) = torch.autograd.grad(
            inner.tensor,
            seen.tensor,
            _gradient(inner),
            retain_graph=True,
            allow_unused=True,
        )
        if through is None:
            continue
        bypassing = (candidate.layout(through) - whole)[0].norm()
        if bypassing <= _COVERED * whole[0].norm():
            return one
    return None


def _gradient(seen: Seen) -> Tensor:
    assert seen.gradient is not None
    return seen.gradient


def _is_early(single: Candidate, found: Sequence[tuple[Seen, Candidate]]) -> bool:
    """Whether far coarser features follow that no single layer unites."""
    cells = math.prod(single.layout.grid)
    later = [one for _, one in found if one.alive and one.is_sure]
    finest = max((math.prod(one.layout.grid) for one in later[-1:]), default=cells)
    return cells > 4 * finest


def _branches(
    found: Sequence[tuple[Seen, Candidate]], record: RunRecord
) -> list[tuple[Seen, Candidate]]:
    """The last candidates of all ways from the logits to the image, if none feeds another."""
    by_vertex = {
        seen.vertex: one
        for seen, one in found
        if seen.vertex is not None and one.alive and one.is_sure
    }
    met = record.graph.frontier(list(by_vertex)) or []
    feeds = any(
        record.graph.lies_behind(one, other) for one in met for other in met if one != other
    )
    if len(met) < 2 or feeds:
        return []
    chosen = {by_vertex[vertex] for vertex in met}
    return [(seen, one) for seen, one in found if one in chosen]


def _vertex(seen: Seen) -> Vertex:
    assert seen.vertex is not None
    return seen.vertex
