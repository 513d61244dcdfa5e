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

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.admission import Layers, admit, as_layers, check_compiled
from diffsal.maps.contexts import Where, here, plain_attention, set_hook
from diffsal.maps.contrast import Choice, Contrast, contrast
from diffsal.maps.examples import answer, as_inputs
from diffsal.maps.fixed_statistics import Switch, held, norms_to_hold, remember_norms
from diffsal.maps.gradients import gradients_at, over_space
from diffsal.maps.layouts import Reshape
from diffsal.maps.looking import Example
from diffsal.maps.modes import evaluated
from diffsal.maps.outputs import (
    ModelScores,
    Outputs,
    Recorded,
    declared_outputs,
    may_squash,
    output_logits,
    recording_squashes,
    remember_squash,
    scores_of_output,
)
from diffsal.maps.run_record import is_image, replaced, tensors_in
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer
from diffsal.maps.weightings import (
    WEIGHTINGS,
    Weighting,
    first_component,
    mean_over_layers,
    sum_over_branches,
)


class capture:  # noqa: N801 - a context, used like torch.no_grad
    """Record the target layers during forward passes, and turn logits into maps.

    With gradients off (``torch.no_grad``, ``torch.inference_mode``) maps come back detached, and
    the model runs without a graph up to the layer. The model is called by the caller; its training
    mode is left as it is, and in training mode the maps contain the head's dropout, as its logits
    do. One forward pass is recorded at a time: ``maps`` uses it up. On leaving, all hooks are
    removed and grad mode is what it was.

    It acts in the thread, and the asyncio task, that opened it: any other runs, explains or trains
    the same model as if there were no capture. Between the forward pass and ``maps`` gradients are
    on in that thread, so that with gradients off, maps are to be taken before an ``await``.

    Args:
        model: the module that is called, wrappers included.
        target_layers: one or several layers, or their names; ``None``: the last feature map over
            space is found, see :func:`diffsal.maps.target_layers.find_target_layer`. Of several,
            every layer's maps are brought to the finest grid keeping their sum, and averaged, so
            that they stay in logit units; those of a layer's branches are added.
        reshape_transform: brings a layer's output to (B, C, h, w) or (B, C, d, h, w), as in
            grad-cam; for layers that are found, it is known.
        weighting: ``elementwise``, Σ_c A·grad; ``channel_mean``, Grad-CAM's; ``xgrad``,
            XGrad-CAM's.
        fixed_statistics: hold the scale of norms behind the pooling fixed, see
            :mod:`diffsal.maps.fixed_statistics`; ``False``: plain first order.
        outputs: what the model returns, ``logits`` or ``probabilities``; ``None``: it is told from
            the operation that made them, see :mod:`diffsal.maps.outputs`.
        example: an input to find the layer with, see
            :func:`diffsal.maps.target_layers.find_target_layer`.

    Raises:
        DiffsalError: the model is compiled, was made in inference mode, or is wrapped in
            ``DistributedDataParallel(static_graph=True)``; a layer is not part of the model; maps
            are taken, or it is left, in another thread or task than it was entered in.

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
        *,
        fixed_statistics: bool = True,
        outputs: Outputs | None = None,
        example: Example = None,
    ) -> None:
        found = admit(model)
        self._alternatives = as_layers(model, target_layers, reshape_transform, example)
        self._layers = [
            branch for layer in self._alternatives for branch in (layer, *layer.branches)
        ]
        check_compiled(found, self._layers)
        if weighting not in WEIGHTINGS:
            known = ", ".join(WEIGHTINGS)
            raise DiffsalError(f"weighting {weighting!r} is unknown: pass one of {known}")
        self._weigh = WEIGHTINGS[weighting]
        self._model, self._outputs = model, outputs or declared_outputs(model)
        self._modules, self._all_norms = found.modules, found.norms
        self._norms = norms_to_hold(model, found.norms) if fixed_statistics else []
        self._behind: list[nn.Module] = []
        self._switch = Switch()
        self._squashes: list[Recorded] = []
        self._image: tuple[int, ...] | None = None
        self._activations: list[Tensor | None] = [None] * len(self._layers)
        self._calls = [0] * len(self._layers)
        self._hooks, self._modes, self._recording = ExitStack(), ExitStack(), ExitStack()
        self._where: Where | None = None
        self._trains, self._training = True, model.training

    def __enter__(self) -> "capture":
        if self._where is not None:
            raise DiffsalError("this capture is open already: make one for each `with`")
        self._trains = torch.is_grad_enabled()
        with ExitStack() as hooks, ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            for index, layer in enumerate(self._layers):
                register = layer.module.register_forward_hook
                hooks.callback(set_hook(self._hook(index, layer), register))
            for norm in self._norms:
                hooks.callback(set_hook(self._hold(norm), norm.register_forward_hook))
            begin, end = self._model.register_forward_pre_hook, self._model.register_forward_hook
            hooks.callback(set_hook(self._begin, begin, with_kwargs=True))
            hooks.callback(set_hook(self._end, end, always_call=True))
            if self._trains:  # the fused attentions cannot be differentiated twice
                hooks.enter_context(plain_attention())
            modes.callback(self._forget)  # and puts back the grad mode that a hook switched on
            self._hooks, self._modes = hooks.pop_all(), modes.pop_all()
        self._where = here()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        where, self._where = self._where, None
        self._hooks.close()
        if where != here():  # whose grad mode is not what this one found
            self._activations = [None] * len(self._layers)
            raise DiffsalError(
                "this capture is left in another thread or asyncio task than it was entered in, "
                "where its grad mode cannot be put back: enter and leave it in one"
            )
        self._recording.close()
        self._modes.close()

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
        found, scores, layers = self._differentiate(logits, true, false)
        true_map, false_map = (
            self._combined([contributions.sum(1) for contributions in one_score])
            for one_score in layers
        )
        return self._finish(found, scores, true_map, false_map)

    def first_component(self, logits: Tensor, true: Choice = None, false: Choice = None) -> Tensor:
        """(B, h, w): the first principal component of the difference's channels, over cells.

        Grad-cam's ``eigen_smooth`` for the difference, with the sign that a singular value
        decomposition leaves open chosen to agree with the difference map. Not in logit units.
        Arguments and errors as for :meth:`maps`.
        """
        *_, (true_layers, false_layers) = self._differentiate(logits, true, false)
        differences = [t - f for t, f in zip(true_layers, false_layers, strict=True)]
        return self._combined([first_component(difference) for difference in differences])

    def _combined(self, maps: list[Tensor]) -> Tensor:
        """One map of those of all layers: branches are added, alternatives averaged."""
        remaining = iter(maps)
        sums = [
            sum_over_branches([next(remaining) for _ in (layer, *layer.branches)])
            for layer in self._alternatives
        ]
        return mean_over_layers(sums)

    def _hook(self, index: int, layer: TargetLayer) -> Callable[[nn.Module, Any, Any], Tensor]:
        def record(module: nn.Module, inputs: Any, output: Any) -> Any:
            tensor = dict(tensors_in(output)).get(layer.place)
            if tensor is None:
                raise DiffsalError(
                    f"layer {layer.name!r} returns a {type(output).__name__}, not a tensor: "
                    "name a layer that returns its feature map alone"
                )
            self._calls[index] += 1
            if layer.call not in (None, self._calls[index]):
                return None
            if self._activations[index] is not None:
                raise DiffsalError(
                    f"layer {layer.name!r} ran twice before its maps were taken: it is shared, "
                    "recomputed by activation checkpointing, or the model was called twice; take "
                    "the maps after each forward pass, or name a layer that runs once"
                )
            activation = tensor.clone() if tensor.is_inference() else tensor
            if not activation.requires_grad:
                activation = activation.detach().requires_grad_()
            self._activations[index] = activation
            if not self._trains:
                torch.set_grad_enabled(True)  # the graph begins here
            # A clone, as an in-place op behind the layer must not change the record.
            return replaced(output, layer.place, activation.clone())

        return record

    def _hold(self, norm: nn.Module) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        """Of a norm that runs behind the layer, on what is pooled: a scale that can be fixed."""

        def hold(_: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            is_behind = any(activation is not None for activation in self._activations)
            if not is_behind or not isinstance(output, Tensor) or not output.requires_grad:
                return None
            result = held(norm, inputs[0], output, self._switch)
            if result is not None and norm not in self._behind:
                self._behind.append(norm)
            return result

        return hold

    def _begin(self, module: nn.Module, inputs: Any, named: Any) -> None:
        """At the start of each forward pass: what is counted and measured in it."""
        self._calls = [0] * len(self._layers)
        images = [one for one in (*inputs, *named.values()) if is_image(one)]
        self._image = tuple(images[0].shape[2:]) if images else None
        self._training = module.training
        if may_squash(self._model, self._training, self._outputs):
            # For the run alone: a mode that outlived an `await` would be taken off out of turn.
            self._squashes = self._recording.enter_context(recording_squashes())

    def _end(self, *_: Any) -> None:
        self._recording.close()

    def _differentiate(
        self, logits: Tensor, true: Choice, false: Choice
    ) -> tuple[ModelScores, Contrast, tuple[list[Tensor], list[Tensor]]]:
        """The logits, both scores, and for each the (B, C, h, w) contributions of every layer."""
        self._check_where()
        try:
            activations = self._recorded()
            # Of maps after an `await`, another task may have left another grad mode.
            torch.set_grad_enabled(True)
            found = scores_of_output(logits, self._squashes, self._outputs)
            remember_squash(self._model, found.squash, self._training)
            if len(self._norms) == len(self._all_norms):
                remember_norms(self._model, self._all_norms, self._behind)
            scores = contrast(found.logits, true, false)
            pair = scores.true_score, scores.false_score
            names = [layer.name for layer in self._layers]
            self._switch.on = True
            gradients = [
                gradients_at(activations, names, score, create_graph=self._trains) for score in pair
            ]
        finally:
            self._switch.on = False
            self._forget()
        true_layers, false_layers = (
            [
                self._contributions(layer, activation, gradient, scores)
                for layer, activation, gradient in zip(self._layers, activations, one, strict=True)
            ]
            for one in gradients
        )
        return found, scores, (true_layers, false_layers)

    def _check_where(self) -> None:
        if self._where is None:
            raise DiffsalError(
                "maps are taken inside the capture: call captured.maps within `with`"
            )
        if self._where != here():
            raise DiffsalError(
                "maps are taken in the thread and asyncio task that opened the capture: open one "
                "in each, with its forward pass and its maps"
            )

    def _recorded(self) -> list[Tensor]:
        missing = [
            layer.name
            for layer, activation in zip(self._layers, self._activations, strict=True)
            if activation is None
        ]
        if missing:
            raise DiffsalError(
                f"layer {missing[0]!r} did not run since the last maps: call the model first, "
                "inside the capture and in its thread, and name a layer that its forward pass uses"
            )
        return [activation for activation in self._activations if activation is not None]

    def _contributions(
        self, layer: TargetLayer, activation: Tensor, gradient: Tensor, scores: Contrast
    ) -> Tensor:
        batch = len(scores.true_score)
        activation, gradient = over_space(layer, (activation, gradient), self._image, batch)
        dtype = torch.promote_types(activation.dtype, torch.float32)
        return self._weigh(activation.to(dtype), gradient.to(dtype))

    def _finish(
        self, found: ModelScores, scores: Contrast, true_map: Tensor, false_map: Tensor
    ) -> SalienceMaps:
        maps = SalienceMaps(
            true=true_map,
            false=false_map,
            logits=found.logits if found.logits.ndim == 2 else found.logits[:, None],
            true_score=scores.true_score,
            false_score=scores.false_score,
            true_class=scores.true_class,
            false_class=scores.false_class,
            true_from=scores.true_from,
            squash=found.squash,
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
    *,
    fixed_statistics: bool = True,
    outputs: Outputs | None = None,
    example: Example = None,
) -> Iterator[tuple[nn.Module, capture]]:
    """:class:`capture` without gradients, and what to run, in evaluation mode, for the model.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(5, 3, 8, 8)
        >>> with explaining(model) as (run, captured):
        ...     captured.maps(run(images)).true.requires_grad, run.training, model.training
        (False, False, True)
    """
    captured = capture(
        model,
        target_layers,
        reshape_transform,
        weighting,
        fixed_statistics=fixed_statistics,
        outputs=outputs,
        example=example,
    )
    modules = captured._modules
    with evaluated(model, modules=modules) as run, torch.no_grad(), captured:
        yield run, captured


def explain(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    true: Choice = None,
    false: Choice = None,
    *,
    target_layers: Layers = None,
    reshape_transform: Reshape | None = None,
    weighting: Weighting = "elementwise",
    fixed_statistics: bool = True,
    outputs: Outputs | None = None,
) -> SalienceMaps:
    """Maps of a batch in evaluation mode, in one forward pass; the model is left as it was.

    Threads may explain one model at once, and run it meanwhile: what an explanation changes is seen
    by no other. A model in training mode is run as a twin, see :mod:`diffsal.maps.modes`.

    Args:
        model: any classifier; what it returns is read by :mod:`diffsal.maps.outputs`.
        inputs: (B, C, H, W) or (B, C, D, H, W), on the model's device, of its dtype; or a tuple or
            mapping of several inputs.
        true: labels, see :func:`diffsal.maps.contrast.contrast`; ``None``: the predictions.
        false: what to set against them, see there.
        target_layers: see :class:`capture`, as are the rest.

    Raises:
        DiffsalError: see :class:`capture`, :func:`diffsal.maps.contrast.contrast` and
            :func:`diffsal.maps.modes.evaluated`; the model does not run on these inputs.

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
    with explaining(
        model,
        target_layers,
        reshape_transform,
        weighting,
        fixed_statistics=fixed_statistics,
        outputs=outputs,
        example=inputs,
    ) as (run, captured):
        return captured.maps(output_logits(answer(run, as_inputs(inputs))), true, false)
