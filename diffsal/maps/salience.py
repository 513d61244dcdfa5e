"""The one mechanism behind every map: activations times gradients of two scores.

A forward hook on the target layer records its output ``A``. After one forward pass, the gradient
of each of two scores with respect to ``A`` gives that score's map,

    map = Σ_c A[c] · ∂score/∂A[c],

which for a head of (ReLU,) global average pooling and a linear layer is the class activation map of
the paper (Section 3.1) divided by h·w: its sum is the class's contribution to the logit. For any
other head it is the first-order contribution, and :attr:`SalienceMaps.residual` tells what first
order leaves out. ``difference = true - false`` is Eq. 1 before normalisation.

The same code explains and trains. Where the caller has gradients off, everything up to the layer
runs without a graph, the graph begins at ``A``, and maps come back detached. Where gradients are
on, ``A`` stays in the graph and maps are differentiable with respect to every parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffsal.contrast import Choice, Contrast, contrast
from diffsal.errors import DiffsalError
from diffsal.target_layers import Reshape, TargetLayer, find_target_layer, get_target_layer

__all__ = [
    "Layers",
    "NormalizedMaps",
    "SalienceMaps",
    "Weighting",
    "capture",
    "evaluation_mode",
    "explain",
    "explaining",
    "normalize",
    "output_logits",
    "resize",
]

Weighting: TypeAlias = Literal["elementwise", "channel_mean", "xgrad"]
Layers: TypeAlias = "TargetLayer | nn.Module | Sequence[TargetLayer | nn.Module] | None"


_SMALLEST_SPAN = 1e-19  # its inverse, a factor of the gradient, is still finite in float32


class NormalizedMaps(NamedTuple):
    """Maps in [0, 1], each normalised by itself; (B, H, W) or (B, D, H, W)."""

    true: Tensor
    false: Tensor
    difference: Tensor


@dataclass(frozen=True)
class SalienceMaps:
    """What speaks for the true and for the false class, cell by cell.

    Maps are raw and signed, in logit units per cell of the layer's grid, and at least float32. For
    volumes, read (B, d, h, w) for (B, h, w).

    Attributes:
        true: (B, h, w), contributions to the true score.
        false: (B, h, w), contributions to the false score.
        logits: (B, K), what the model returned.
        true_score: (B,) logit units.
        false_score: (B,) logit units.
        true_class: (B,) int64; -1 where the score is a callable.
        false_class: (B,) int64; -1 where the score is a callable or the rest.
        true_from: whether the true class is a ``label`` that was given, the ``prediction``, or
            stands for a callable ``score``.
    """

    true: Tensor
    false: Tensor
    logits: Tensor
    true_score: Tensor
    false_score: Tensor
    true_class: Tensor
    false_class: Tensor
    true_from: Literal["label", "prediction", "score"]

    @property
    def difference(self) -> Tensor:
        """(B, h, w): ``true - false``, what softmax sees; Eq. 1 before normalisation."""
        return self.true - self.false

    @property
    def common(self) -> Tensor:
        """(B, h, w): ``(true + false) / 2``, what softmax cannot see of two classes' logits."""
        return (self.true + self.false) / 2

    @property
    def margin(self) -> Tensor:
        """(B,) logits: true score minus false score."""
        return self.true_score - self.false_score

    @property
    def residual(self) -> Tensor:
        """(B,) logits: the margin less the sum of the difference map.

        The difference of the biases for a pooled linear head; for any other, also how far first
        order is from the truth.
        """
        return self.margin - self.difference.flatten(1).sum(1)

    @property
    def common_mode_share(self) -> Tensor:
        """(B,) in [0, 1]: var(common) / (var(common) + var(difference / 2)), over cells.

        The part of the true map's variation that the decision does not depend on. NaN where both
        are zero, and for one logit, whose common part is zero by construction.
        """
        common, half = (
            map_.flatten(1).var(1, correction=0) for map_ in (self.common, self.difference / 2)
        )
        share = common / (common + half)
        return torch.full_like(share, torch.nan) if self.logits.shape[1] == 1 else share

    def normalized(self, size: Sequence[int] | None = None) -> NormalizedMaps:
        """Each map resized to ``size`` (pixels), if given, and then normalised to [0, 1]."""
        maps = (self.true, self.false, self.difference)
        if size is not None:
            maps = tuple(resize(map_, size) for map_ in maps)  # type: ignore[assignment]
        return NormalizedMaps(*map(normalize, maps))

    def __len__(self) -> int:
        """B, the number of samples."""
        return len(self.true)

    def __getitem__(self, index: int | slice) -> "SalienceMaps":
        """The maps of some samples, still as a batch."""
        rows = range(len(self))[index]  # IndexError ends a loop over the samples
        if isinstance(rows, int):
            rows = range(rows, rows + 1)
        return self._each(lambda tensor: tensor[rows.start : rows.stop : rows.step])

    def to(self, device: torch.device | str) -> "SalienceMaps":
        """The same maps on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SalienceMaps":
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


def normalize(maps: Tensor, eps: float | None = None) -> Tensor:
    """Min-max normalisation of each sample's map to [0, 1] (the paper's ``norm``).

    A map that is constant up to rounding becomes 0, with finite gradients.

    Args:
        maps: (B, ...), floating point.
        eps: the span, relative to the largest value, up to which a map is constant; ``None``:
            eight roundings of the maps' type, which resizing a constant does not exceed.
    """
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    span = high - low
    eps = 8 * torch.finfo(maps.dtype).eps if eps is None else eps
    varies = span > (eps * torch.maximum(high, -low)).clamp(min=_SMALLEST_SPAN)
    return ((flat - low) / span.where(varies, torch.inf)).view_as(maps)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) or (B, d, h, w), interpolated linearly to ``size``; keeps values, not sums."""
    mode = "bilinear" if maps.ndim == 3 else "trilinear"
    return F.interpolate(maps[:, None], size=tuple(size), mode=mode, align_corners=False)[:, 0]


class capture:  # noqa: N801 - a context, used like torch.no_grad
    """Record the target layers during forward passes, and turn logits into maps.

    Example::

        with capture(model) as captured:
            logits = model(images)
            maps = captured.maps(logits, true=labels)
        loss = criterion(maps, human_maps)      # differentiable
        loss.backward()

    With gradients off (``torch.no_grad``, ``torch.inference_mode``) maps come back detached, and
    the model runs without a graph up to the layer. The model is called by the caller; its training
    mode is left as it is, and in training mode the maps contain the head's dropout, as its logits
    do. One forward pass is recorded at a time: ``maps`` uses it up. On leaving, all hooks are
    removed and grad mode is what it was.

    Args:
        model: the module that is called, wrappers included.
        target_layers: one or several layers; ``None``: the last spatial feature map is found. Of
            several, every layer's maps are brought to the finest grid keeping their sum, and
            averaged, so that they stay in logit units.
        reshape_transform: brings a layer's output to (B, C, h, w) or (B, C, d, h, w), as in
            grad-cam; for layers that are found, it is known.
        weighting: ``elementwise``, Σ_c A·grad; ``channel_mean``, Grad-CAM's; ``xgrad``,
            XGrad-CAM's.

    Raises:
        DiffsalError: the model is compiled, was made in inference mode, or is wrapped in
            ``DistributedDataParallel(static_graph=True)``; a layer is not part of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Layers = None,
        reshape_transform: Reshape | None = None,
        weighting: Weighting = "elementwise",
    ) -> None:
        self._layers = _as_layers(model, target_layers, reshape_transform)
        _check_model(model, self._layers)
        if weighting not in _WEIGHTINGS:
            known = ", ".join(_WEIGHTINGS)
            raise DiffsalError(f"weighting {weighting!r} is unknown: pass one of {known}")
        self._weigh = _WEIGHTINGS[weighting]
        self._activations: list[Tensor | None] = [None] * len(self._layers)
        self._stack = ExitStack()
        self._open = False
        self._trains = True

    def __enter__(self) -> "capture":
        if self._open:
            raise DiffsalError("this capture is open already: make one for each `with`")
        self._trains = torch.is_grad_enabled()
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            for index, layer in enumerate(self._layers):
                handle = layer.module.register_forward_hook(self._hook(index, layer))
                stack.callback(handle.remove)
            stack.callback(self._forget)  # and puts back the grad mode that a hook switched on
            self._stack = stack.pop_all()
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        self._stack.close()

    def maps(self, logits: Tensor, true: Choice = None, false: Choice = None) -> SalienceMaps:
        """The maps of the forward pass that returned ``logits``.

        Args:
            logits: (B, K) or (B,), what the model returned.
            true: labels, see :func:`diffsal.contrast.contrast`; ``None``: the predictions.
            false: what to set against them, see there.

        Raises:
            DiffsalError: see :func:`diffsal.contrast.contrast`; a layer that did not run, whose
                output is no feature map, or from which no gradient reaches the scores.
        """
        scores, layers = self._differentiate(logits, true, false)
        true_map, false_map = (
            _mean_over_layers([contributions.sum(1) for contributions in one_score])
            for one_score in layers
        )
        return self._finish(logits, scores, true_map, false_map)

    def first_component(self, logits: Tensor, true: Choice = None, false: Choice = None) -> Tensor:
        """(B, h, w): the first principal component of the difference's channels, over cells.

        Grad-cam's ``eigen_smooth`` for the difference, with the sign that a singular value
        decomposition leaves open chosen to agree with the difference map. Not in logit units.
        Arguments and errors as for :meth:`maps`.
        """
        _, (true_layers, false_layers) = self._differentiate(logits, true, false)
        differences = [t - f for t, f in zip(true_layers, false_layers, strict=True)]
        return _mean_over_layers([_first_component(difference) for difference in differences])

    def _hook(self, index: int, layer: TargetLayer) -> Callable[[nn.Module, Any, Any], Tensor]:
        def record(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise DiffsalError(
                    f"layer {layer.name!r} returns a {type(output).__name__}, not a tensor: "
                    "name a layer that returns its feature map alone"
                )
            if self._activations[index] is not None:
                raise DiffsalError(
                    f"layer {layer.name!r} ran twice before its maps were taken: it is shared, "
                    "recomputed by activation checkpointing, or the model was called twice; take "
                    "the maps after each forward pass, or name a layer that runs once"
                )
            activation: Tensor = output.clone() if output.is_inference() else output
            if not activation.requires_grad:
                activation = activation.detach().requires_grad_()
            self._activations[index] = activation
            if not self._trains:
                torch.set_grad_enabled(True)  # the graph begins here
            return activation.clone()  # an in-place op behind the layer must not change the record

        return record

    def _differentiate(
        self, logits: Tensor, true: Choice, false: Choice
    ) -> tuple[Contrast, tuple[list[Tensor], list[Tensor]]]:
        """Both scores, and for each the (B, C, h, w) contributions of every layer."""
        try:
            activations = self._recorded()
            scores = contrast(logits, true, false)
            pair = scores.true_score, scores.false_score
            gradients = [self._gradients(score, activations) for score in pair]
        finally:
            self._forget()
        true_layers, false_layers = (
            [
                self._contributions(layer, activation, gradient, scores)
                for layer, activation, gradient in zip(self._layers, activations, one, strict=True)
            ]
            for one in gradients
        )
        return scores, (true_layers, false_layers)

    def _recorded(self) -> list[Tensor]:
        if not self._open:
            raise DiffsalError(
                "maps are taken inside the capture: call captured.maps within `with`"
            )
        missing = [
            layer.name
            for layer, activation in zip(self._layers, self._activations, strict=True)
            if activation is None
        ]
        if missing:
            raise DiffsalError(
                f"layer {missing[0]!r} did not run since the last maps: call the model first, "
                "inside the capture, and name a layer that its forward pass uses"
            )
        return [activation for activation in self._activations if activation is not None]

    def _gradients(self, score: Tensor, activations: list[Tensor]) -> list[Tensor]:
        gradients: Sequence[Tensor | None] = [None] * len(activations)
        if score.requires_grad:
            try:
                gradients = torch.autograd.grad(
                    score,
                    activations,
                    torch.ones_like(score),
                    retain_graph=True,
                    create_graph=self._trains,
                    allow_unused=True,
                )
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise DiffsalError(
                    "the model recomputes its head by reentrant activation checkpointing, through "
                    "which no map can be taken: pass use_reentrant=False to torch.utils.checkpoint"
                ) from error
        for layer, gradient in zip(self._layers, gradients, strict=True):
            if gradient is None:
                raise DiffsalError(
                    f"no gradient flows from the scores to layer {layer.name!r}: the model's own "
                    "forward pass turns gradients off or detaches behind it, or the layer does not "
                    "influence the logits; name a later layer, or take the no_grad out"
                )
        return [gradient for gradient in gradients if gradient is not None]

    def _contributions(
        self, layer: TargetLayer, activation: Tensor, gradient: Tensor, scores: Contrast
    ) -> Tensor:
        if layer.reshape is not None:
            activation, gradient = layer.reshape(activation), layer.reshape(gradient)
        if activation.ndim not in (4, 5) or len(activation) != len(scores.true_score):
            raise DiffsalError(
                f"layer {layer.name!r} gives {tuple(activation.shape)} for a batch of "
                f"{len(scores.true_score)}: (batch, channels, height, width) is needed; name "
                "another layer, or pass a reshape_transform"
            )
        dtype = torch.promote_types(activation.dtype, torch.float32)
        return self._weigh(activation.to(dtype), gradient.to(dtype))

    def _finish(
        self, logits: Tensor, scores: Contrast, true_map: Tensor, false_map: Tensor
    ) -> SalienceMaps:
        maps = SalienceMaps(
            true=true_map,
            false=false_map,
            logits=logits if logits.ndim == 2 else logits[:, None],
            true_score=scores.true_score,
            false_score=scores.false_score,
            true_class=scores.true_class,
            false_class=scores.false_class,
            true_from=scores.true_from,
        )
        if self._trains:
            return maps
        return replace(
            maps,
            logits=maps.logits.detach(),
            true_score=maps.true_score.detach(),
            false_score=maps.false_score.detach(),
        )

    def _forget(self) -> None:
        self._activations = [None] * len(self._layers)
        torch.set_grad_enabled(self._trains)


@contextmanager
def explaining(
    model: nn.Module,
    target_layers: Layers = None,
    reshape_transform: Reshape | None = None,
    weighting: Weighting = "elementwise",
) -> Iterator[capture]:
    """:class:`capture` in evaluation mode and without gradients; the model is left as it was."""
    with (
        evaluation_mode(model),
        torch.no_grad(),
        capture(model, target_layers, reshape_transform, weighting) as captured,
    ):
        yield captured


def explain(
    model: nn.Module,
    inputs: Tensor,
    true: Choice = None,
    false: Choice = None,
    *,
    target_layers: Layers = None,
    reshape_transform: Reshape | None = None,
    weighting: Weighting = "elementwise",
) -> SalienceMaps:
    """Maps of a batch in evaluation mode, in one forward pass; the model is left as it was.

    Args:
        model: any classifier that returns logits, or an object with ``logits``.
        inputs: (B, C, H, W) or (B, C, D, H, W), on the model's device, of its dtype.
        true: labels, see :func:`diffsal.contrast.contrast`; ``None``: the predictions.
        false: what to set against them, see there.
        target_layers: see :class:`capture`, as are the rest.

    Raises:
        DiffsalError: see :class:`capture` and :func:`diffsal.contrast.contrast`.
    """
    with explaining(model, target_layers, reshape_transform, weighting) as captured:
        return captured.maps(output_logits(model(inputs)), true, false)


def output_logits(output: Any) -> Any:
    """The logits of a model's output: itself, or its ``logits`` (transformers, Inception)."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back as it was."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _elementwise(activation: Tensor, gradient: Tensor) -> Tensor:
    return activation * gradient


def _channel_mean(activation: Tensor, gradient: Tensor) -> Tensor:
    space = tuple(range(2, activation.ndim))
    return activation * gradient.mean(space, keepdim=True)


def _xgrad(activation: Tensor, gradient: Tensor) -> Tensor:
    space = tuple(range(2, activation.ndim))
    total = activation.sum(space, keepdim=True)
    weighted = (activation * gradient).sum(space, keepdim=True)
    return activation * (weighted / total.where(total != 0, 1))


_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elementwise": _elementwise,
    "channel_mean": _channel_mean,
    "xgrad": _xgrad,
}


def _mean_over_layers(maps: list[Tensor]) -> Tensor:
    if len(maps) == 1:
        return maps[0]
    with torch.autocast(maps[0].device.type, enabled=False):  # it would take products in half
        return torch.stack(_on_finest_grid(maps)).mean(0)


def _on_finest_grid(maps: list[Tensor]) -> list[Tensor]:
    if len({map_.ndim for map_ in maps}) > 1:
        raise DiffsalError("the target layers mix images and volumes: name layers of one kind")
    size = [max(sizes) for sizes in zip(*(map_.shape[1:] for map_ in maps), strict=True)]
    return [_spread(map_, size) for map_ in maps]


def _spread(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bring (B, h, w) maps to a finer grid; every cell's value is shared out, so sums stay.

    Along each axis the shares are those of linear interpolation, scaled to add up to one.
    """
    for axis, (old, new) in enumerate(zip(maps.shape[1:], size, strict=True), start=1):
        cells = torch.eye(old, dtype=maps.dtype, device=maps.device)
        shares = F.interpolate(cells[None], size=new, mode="linear", align_corners=False)[0]
        maps = torch.tensordot(maps.movedim(axis, -1), shares / shares.sum(1, keepdim=True), 1)
        maps = maps.movedim(-1, axis)
    return maps


def _first_component(contributions: Tensor) -> Tensor:
    cells = contributions.flatten(2).transpose(1, 2)
    centred = cells - cells.mean(1, keepdim=True)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    projection = left[:, :, 0] * singular[:, :1]
    agrees = (projection * centred.sum(2)).sum(1, keepdim=True) >= 0
    return torch.where(agrees, projection, -projection).reshape(contributions[:, 0].shape)


def _check_model(model: nn.Module, layers: Sequence[TargetLayer]) -> None:
    """Refuse what cannot be captured; one walk, as it is taken at every training step."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.static_graph:
            raise DiffsalError(
                "DistributedDataParallel(static_graph=True) gives silently wrong gradients for "
                "losses of maps: build it without static_graph"
            )
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None and tensor.is_inference():
                raise DiffsalError(
                    "the model's parameters or buffers were made in inference mode, which autograd "
                    "cannot use: build or load the model outside torch.inference_mode()"
                )
        in_place = module.__dict__.get("_compiled_call_impl") is not None
        if in_place or "_orig_mod" in module._modules:
            _check_outside(module, layers, in_place)


def _check_outside(compiled: nn.Module, layers: Sequence[TargetLayer], in_place: bool) -> None:
    if any(part is layer.module for part in compiled.modules() for layer in layers):
        what = (
            "pass a copy on which .compile() was not called"
            if in_place
            else "pass the module it was made from (compiled._orig_mod)"
        )
        raise DiffsalError(f"hooks do not run inside a compiled {type(compiled).__name__}: {what}")


def _as_layers(
    model: nn.Module, layers: Layers, reshape_transform: Reshape | None
) -> list[TargetLayer]:
    if layers is None:
        layers = find_target_layer(getattr(model, "_orig_mod", model))
    chosen = [layers] if isinstance(layers, TargetLayer | nn.Module) else list(layers)
    if not chosen:
        raise DiffsalError("target_layers is empty: name a layer, or pass None to have it found")
    named = [one if isinstance(one, TargetLayer) else _locate(model, one) for one in chosen]
    if reshape_transform is None:
        return named
    return [replace(layer, reshape=reshape_transform) for layer in named]


def _locate(model: nn.Module, layer: nn.Module) -> TargetLayer:
    for name, module in model.named_modules():
        if module is layer:
            return get_target_layer(model, name) if name else TargetLayer("", model)
    raise DiffsalError(f"the target layer {type(layer).__name__} is not part of the model")
