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
on, ``A`` stays in the graph and maps are differentiable with respect to every parameter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffsal.errors import DiffsalError
from diffsal.maps.contrast import Choice, Contrast, contrast
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import Reshape, TargetLayer, find_target_layer, get_target_layer
from diffsal.maps.weightings import WEIGHTINGS, Weighting, first_component, mean_over_layers

Layers: TypeAlias = "TargetLayer | nn.Module | Sequence[TargetLayer | nn.Module] | None"


class capture:  # noqa: N801 - a context, used like torch.no_grad
    """Record the target layers during forward passes, and turn logits into maps.

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

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(5, 3, 8, 8)
        >>> with capture(model) as captured:
        ...     logits = model(images)
        ...     maps = captured.maps(logits, true=torch.tensor([0, 1, 1, 0, 1]))
        >>> loss = (maps.difference - 1).square().mean()  # differentiable
        >>> loss.backward()
        >>> model[0].weight.grad.shape
        torch.Size([4, 3, 3, 3])
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
        if weighting not in WEIGHTINGS:
            known = ", ".join(WEIGHTINGS)
            raise DiffsalError(f"weighting {weighting!r} is unknown: pass one of {known}")
        self._weigh = WEIGHTINGS[weighting]
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
            true: labels, see :func:`diffsal.maps.contrast.contrast`; ``None``: the predictions.
            false: what to set against them, see there.

        Raises:
            DiffsalError: see :func:`diffsal.maps.contrast.contrast`; a layer that did not run,
                whose output is no feature map, or from which no gradient reaches the scores.
        """
        scores, layers = self._differentiate(logits, true, false)
        true_map, false_map = (
            mean_over_layers([contributions.sum(1) for contributions in one_score])
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
        return mean_over_layers([first_component(difference) for difference in differences])

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
    """:class:`capture` in evaluation mode and without gradients; the model is left as it was.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(5, 3, 8, 8)
        >>> with explaining(model) as captured:
        ...     captured.maps(model(images)).true.requires_grad, model.training
        (False, False)
        >>> model.training
        True
    """
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
        true: labels, see :func:`diffsal.maps.contrast.contrast`; ``None``: the predictions.
        false: what to set against them, see there.
        target_layers: see :class:`capture`, as are the rest.

    Raises:
        DiffsalError: see :class:`capture` and :func:`diffsal.maps.contrast.contrast`.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), *head)
        >>> maps = explain(model, torch.rand(5, 3, 8, 8), true=1)
        >>> maps.difference.shape, maps.true_class
        (torch.Size([5, 6, 6]), tensor([1, 1, 1, 1, 1]))
        >>> sums = maps.true.sum((1, 2)) + head[-1].bias[1]  # of a pooled linear head, the logit
        >>> torch.allclose(sums, maps.logits[:, 1], atol=1e-5)
        True
    """
    with explaining(model, target_layers, reshape_transform, weighting) as captured:
        return captured.maps(output_logits(model(inputs)), true, false)


def output_logits(output: Any) -> Any:
    """The logits of a model's output: itself, or its ``logits`` (transformers, Inception).

    Example:
        >>> from types import SimpleNamespace
        >>> output_logits(SimpleNamespace(logits=torch.zeros(2, 3), loss=None)).shape
        torch.Size([2, 3])
    """
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back as it was.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
        >>> with evaluation_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
