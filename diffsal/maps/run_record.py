"""One forward pass, looked at: which tensors ran where, and what the logits depend on.

Every module's output is recorded with its place in autograd's graph. A tensor that every path from
the logits to the image passes through is found by counting paths: as many lead through it as there
are. The image goes in twice, once with other pixels in one region, so that the same pass shows
where features move when that region does.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsal.maps.contexts import set_hook
from diffsal.maps.outputs import Squash, declared_outputs, recording_squashes, scores_of_output

Place: TypeAlias = "int | str | None"
"""Where in a module's output a tensor is: an index, a key, or ``None`` where it is the output."""

# Modules that return what they are given; and those of which activation times gradient is the same
# before and behind, so that the earlier may stand for both.
_SAME = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
)
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
_FINEST = 16  # cells along an axis that movements are compared in
_ALIKE = 1.3  # times the mean that the cells which moved most have to move
_REGION = (0.5, 0.9), (0.1, 0.5)  # of height and width: neither symmetric nor central


@dataclass(eq=False)
class Seen:
    """A tensor that a module returned.

    Attributes:
        tensor: as it was returned, for two images.
        names: of the modules that returned it, innermost first.
        places: within each of their outputs.
        vertices: of what each of the modules handed on: a node of the graph, and which of its
            outputs; ``None``: it has none.
        calls: which of each module's calls it was, from 1.
        gradient: of the first image's scores, once differentiated.
    """

    tensor: Tensor
    names: list[str]
    places: list[Place]
    vertices: "list[Vertex | None]"
    calls: list[int]
    gradient: Tensor | None = None

    @property
    def vertex(self) -> "Vertex | None":
        """Of what the innermost module handed on."""
        return self.vertices[0]


Vertex: TypeAlias = tuple[Any, int]


@dataclass(eq=False)
class RunRecord:
    """What one forward pass of an image showed.

    Attributes:
        seen: tensors that modules returned, in the order in which they ran.
        calls: how often each module ran.
        image: (height, width) or (depth, height, width) in pixels; empty where no input is one.
        graph: the graph behind the scores.
        squash: what the model made of its logits.
    """

    seen: list[Seen]
    calls: Counter[str]
    image: tuple[int, ...]
    graph: "Graph"
    squash: Squash | None


class Graph:
    """Autograd's graph from the scores back to the images, and the paths through it."""

    def __init__(self, root: Tensor, sinks: Sequence[Tensor]) -> None:
        self._nodes = _in_order(root.grad_fn)
        self._ends = dict.fromkeys(vertex[0] for sink in sinks if (vertex := _vertex(sink)))
        self._arrivals: defaultdict[Vertex, int] = defaultdict(int)
        self._onwards: dict[Any, int] = {}
        if self._nodes:
            self._arrivals[self._nodes[0], 0] = 1
        inwards: Counter[Any] = Counter(dict.fromkeys(self._nodes[:1], 1))
        for node in self._nodes:
            if node in self._ends:
                continue
            for following in node.next_functions:
                if following[0] is not None:
                    self._arrivals[following] += inwards[node]
                    inwards[following[0]] += inwards[node]
        for node in reversed(self._nodes):
            onwards = sum(self._onwards[one] for one, _ in node.next_functions if one is not None)
            self._onwards[node] = 1 if node in self._ends else onwards

    @property
    def reaches_the_image(self) -> bool:
        """Whether the scores depend on the image at all."""
        return bool(self._nodes) and self._onwards[self._nodes[0]] > 0

    def depends_on(self, vertex: Vertex | None) -> bool:
        """Whether a path from the scores to the image leads through it."""
        return self._paths_through(vertex) > 0

    def is_dominated_by(self, vertex: Vertex | None) -> bool:
        """Whether every path from the scores to the image leads through it."""
        return self.reaches_the_image and (
            self._paths_through(vertex) == self._onwards[self._nodes[0]]
        )

    def carry_the_same(self, vertex: Vertex | None, other: Vertex | None) -> bool:
        """Whether as many paths lead through one as through the other."""
        return self._paths_through(vertex) == self._paths_through(other)

    def frontier(self, vertices: Sequence[Vertex]) -> list[Vertex] | None:
        """The first of them on each path from the scores; ``None`` if a path meets none."""
        wanted, met, visited = set(vertices), [], set()
        pending: list[Vertex] = [(self._nodes[0], 0)] if self._nodes else []
        while pending:
            vertex = pending.pop()
            if vertex in visited or not self.depends_on(vertex):
                continue
            visited.add(vertex)
            if vertex in wanted:
                met.append(vertex)
            elif vertex[0] in self._ends:
                return None
            else:
                pending += [one for one in vertex[0].next_functions if one[0] is not None]
        return met

    def images_behind(self, vertex: Vertex) -> frozenset[int]:
        """Which of the images a tensor was computed from, as positions among the sinks."""
        nodes = set(_in_order(vertex[0]))
        return frozenset(index for index, end in enumerate(self._ends) if end in nodes)

    def lies_behind(self, vertex: Vertex, other: Vertex) -> bool:
        """Whether the first was computed from the second."""
        return other[0] in set(_in_order(vertex[0]))

    def _paths_through(self, vertex: Vertex | None) -> int:
        if vertex is None or vertex[0] not in self._onwards:
            return 0
        return self._arrivals[vertex] * self._onwards[vertex[0]]


def record_run(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> RunRecord:
    """Run a model once on one image of a batch and on the same with other pixels in a region.

    Args:
        model: in evaluation mode.
        inputs: positional ones: tensors are cut to one sample; those with two or more axes behind
            the channels are images.
        named: the same by name.

    Raises:
        Whatever the model raises.
    """
    places: dict[Any, Any] = {**dict(enumerate(inputs)), **named}
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        doubled = {key: _doubled(value) for key, value in places.items()}
        images = [value for value in doubled.values() if is_image(value)]
        recorder = _Recorder(list(images))
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(set_hook(recorder.hook(name), module.register_forward_hook))
        squashes = stack.enter_context(recording_squashes())
        output = model(
            *(doubled[index] for index in range(len(inputs))),
            **{key: doubled[key] for key in named},
        )
        torch.set_grad_enabled(True)  # whatever the model left
        scores, squash = scores_of_output(output, squashes, declared_outputs(model))
        probe = (scores[0] * _weights(scores)).sum() if scores.requires_grad else scores.sum()
        sinks = [sink for sink in recorder.sinks if sink.requires_grad]
        record = RunRecord(
            recorder.seen,
            recorder.calls,
            tuple(images[0].shape[2:]) if images else (),
            Graph(scores, sinks),
            squash,
        )
        _differentiate(probe, [one for one in record.seen if record.graph.depends_on(one.vertex)])
    return record


def movement(features: Tensor) -> Tensor:
    """How far each cell moved with the region: (B, C, h, w) of the two images to (h, w)."""
    return (features[1] - features[0]).detach().double().abs().sum(0)


def moves_with_the_region(moved: Tensor) -> float:
    """How surely cells within the region moved more than others: 0.5 is chance, 1 always.

    NaN where that tells nothing: nothing moved, or all cells moved about alike.

    Args:
        moved: (h, w) or (d, h, w), see :func:`movement`.
    """
    if moved.is_meta:
        return math.nan
    moved = moved.sum(0) if moved.ndim == 3 else moved
    height, width = (min(_FINEST, side) for side in moved.shape)
    moved = F.adaptive_avg_pool2d(moved[None], (height, width))[0]
    rows, columns = (
        (centres >= low) & (centres < high)
        for centres, (low, high) in zip(map(_centres, moved.shape), _REGION, strict=True)
    )
    inside = (rows[:, None] & columns).to(moved.device)
    within, beyond = moved[inside], moved[~inside]
    if not len(within) or not len(beyond) or not bool(moved.isfinite().all()):
        return math.nan
    most = moved.flatten().topk(len(within)).values.mean()
    if not bool(most > _ALIKE * moved.mean()):
        return math.nan
    difference = within[:, None] - beyond
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def _centres(count: int) -> Tensor:
    return (torch.arange(count) + 0.5) / count


def is_image(value: Any) -> bool:
    """Whether an input is a batch of images or volumes."""
    return isinstance(value, Tensor) and value.ndim in (4, 5) and value.is_floating_point()


def _doubled(value: Any) -> Any:
    """One sample twice; of an image, the second with other pixels in the region."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    one = value[:1].detach().clone()
    if not is_image(value):
        return torch.cat([one, one])
    other = one.clone()
    height, width = one.shape[-2:]
    (top, bottom), (left, right) = _REGION
    region = (
        ...,
        slice(int(top * height), max(int(bottom * height), int(top * height) + 1)),
        slice(int(left * width), max(int(right * width), int(left * width) + 1)),
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(other[region].shape, generator=generator, dtype=torch.float32)
    spread = one.float().std() if one.numel() > 1 else one.float().abs().sum()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    other[region] = (one.float().mean() + spread * noise.to(one.device)).to(one.dtype)
    return torch.cat([one, other]).requires_grad_()


class _Recorder:
    """Hooks that note every output, and hand on a clone that may be changed in place."""

    def __init__(self, sinks: list[Tensor]) -> None:
        self.seen: list[Seen] = []
        self.calls: Counter[str] = Counter()
        self.sinks = sinks
        self._by_clone: dict[int, tuple[Seen, int]] = {}
        self._clones: list[Tensor] = []

    def hook(self, name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            self.calls[name] += 1
            if isinstance(module, _SAME) or (
                isinstance(module, _HOMOGENEOUS) and inputs and self._passes(inputs[0], output)
            ):
                return None
            for place, tensor in list(tensors_in(output)):
                if not tensor.is_floating_point() or tensor.ndim < 3:
                    continue
                seen = self._known(tensor)
                if seen is None:
                    tensor, seen = self._new(tensor)
                output = replaced(output, place, self._handed_on(tensor, seen, name, place))
            return output

        return note

    def _new(self, tensor: Tensor) -> tuple[Tensor, Seen]:
        if not tensor.requires_grad:  # made without a graph: as far back as gradients can lead
            tensor = tensor.detach().requires_grad_()
            self.sinks.append(tensor)
        self.seen.append(Seen(tensor, [], [], [], []))
        return tensor, self.seen[-1]

    def _handed_on(self, tensor: Tensor, seen: Seen, name: str, place: Place) -> Tensor:
        """A clone, whose place in the graph is behind whatever the module itself made of it."""
        clone = tensor.clone()
        seen.names.append(name)
        seen.places.append(place)
        seen.vertices.append(_vertex(clone))
        seen.calls.append(self.calls[name])
        self._clones.append(clone)  # kept, so that no other tensor gets its id
        self._by_clone[id(clone)] = seen, clone._version
        return clone

    def _known(self, tensor: Tensor, changes: int = 0) -> Seen | None:
        """What was recorded of a tensor, unless it has been changed in place since."""
        seen, version = self._by_clone.get(id(tensor), (None, 0))
        return seen if tensor._version == version + changes else None

    def _passes(self, given: Tensor, output: Tensor) -> bool:
        """Whether an activation was given a tensor that is recorded; it may work in place."""
        seen = self._known(given, changes=int(output is given))
        if seen is not None and output is given:
            self._by_clone[id(given)] = seen, given._version
        return seen is not None


def tensors_in(output: Any) -> Iterator[tuple[Place, Tensor]]:
    """The tensors of a module's output, and where in it they are."""
    if isinstance(output, Tensor):
        yield None, output
    elif isinstance(output, Mapping):
        yield from ((key, one) for key, one in output.items() if isinstance(one, Tensor))
    elif isinstance(output, tuple | list):
        yield from ((key, one) for key, one in enumerate(output) if isinstance(one, Tensor))


def replaced(output: Any, place: Place, tensor: Tensor) -> Any:
    """A module's output with another tensor at a place."""
    if place is None:
        return tensor
    if isinstance(output, Mapping):  # transformers' ModelOutput among them
        return type(output)(**{**output, place: tensor})
    parts = [tensor if index == place else one for index, one in enumerate(output)]
    if hasattr(output, "_fields"):
        return type(output)(*parts)
    return type(output)(parts)


def _differentiate(probe: Tensor, seen: Sequence[Seen]) -> None:
    if not seen or not probe.requires_grad:
        return
    gradients = torch.autograd.grad(
        probe, [one.tensor for one in seen], retain_graph=True, allow_unused=True
    )
    for one, gradient in zip(seen, gradients, strict=True):
        one.gradient = None if gradient is None else gradient.detach()


def _weights(scores: Tensor) -> Tensor:
    """Of the scores in the probe: distinct, so that the classes' gradients do not cancel."""
    count = scores.shape[1]
    return torch.linspace(1, -1 if count > 1 else 1, count, device=scores.device).to(scores.dtype)


def _vertex(tensor: Tensor) -> Vertex | None:
    if not tensor.requires_grad:
        return None
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    with torch.enable_grad():  # the model may have left them off
        view = tensor.view_as(tensor).grad_fn
    assert view is not None
    return view.next_functions[0]


def _in_order(root: Any) -> list[Any]:
    """The nodes behind one, each after all that lead to it."""
    done: list[Any] = []
    visited: set[Any] = set()
    pending = [(root, False)] if root is not None else []
    while pending:
        node, is_finished = pending.pop()
        if is_finished:
            done.append(node)
        elif node not in visited:
            visited.add(node)
            pending.append((node, True))
            pending += [(one, False) for one, _ in node.next_functions if one is not None]
    return done[::-1]
