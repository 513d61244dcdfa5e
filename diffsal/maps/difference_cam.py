"""``DifferenceCAM``: the difference of two classes' maps behind grad-cam's interface."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
)
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.admission import as_layers
from diffsal.maps.contrast import NO_CLASS, Choice, Score
from diffsal.maps.examples import answer, as_inputs
from diffsal.maps.layouts import Reshape
from diffsal.maps.looking import Example
from diffsal.maps.modes import in_evaluation_mode
from diffsal.maps.outputs import Outputs, output_logits
from diffsal.maps.salience import capture, explain, explaining
from diffsal.maps.salience_maps import SalienceMaps, normalize, resize
from diffsal.maps.target_layers import TargetLayer
from diffsal.maps.weightings import Weighting
from diffsal.system.devices import on_host

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | Any"
Targets: TypeAlias = Sequence[Any] | Tensor | None

_CLASS_TARGETS = (
    ClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputReST,
)


class DifferenceCAM(BaseCAM):  # type: ignore[misc]
    """The paper's Difference Salience (Equation 1) as a drop-in for grad-cam's CAMs.

    Unlike its parent it takes the maps in evaluation mode and leaves the model as it found it
    (training flags, ``.grad``, hooks), and no exception is swallowed.

    Args:
        model: any classifier that returns logits.
        target_layers: as in grad-cam; ``None``: the last spatial feature map is found.
        reshape_transform: as in grad-cam; torchvision's and timm's ViT and Swin need none.
        false: what to set against the true class, see :func:`diffsal.maps.contrast.contrast`.
        weighting: see :class:`diffsal.maps.salience.capture`, as are the rest.
        fixed_statistics: hold the scale of norms behind the pooling fixed.
        outputs: ``logits`` or ``probabilities``; ``None``: it is told from the model.
        example: an input to find the layer with; ``None``: noise.
        preprocessing: from an image to the model's input (C, H, W), as ``preprocessing`` of
            :func:`diffsal.load_model` and torchvision's transforms do; with it, an image or a list
            of images goes where tensors do: paths, Pillow's images, arrays, whatever it takes.

    Raises:
        DiffsalError: a model without parameters, and see :class:`diffsal.maps.salience.capture`.

    Example:
        >>> head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        >>> model, x = nn.Sequential(nn.Conv2d(3, 4, 3), *head), torch.rand(5, 3, 8, 8)
        >>> with DifferenceCAM(model, target_layers=[model[0]]) as cam:
        ...     heatmap = cam(input_tensor=x, targets=None)  # at the input's size, in [0, 1]
        ...     maps = cam.maps(x, true=1)  # raw, in logit units
        >>> heatmap.shape, heatmap.dtype, maps.difference.shape
        ((5, 8, 8), dtype('float32'), torch.Size([5, 6, 6]))
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[TargetLayer | nn.Module | str] | None = None,
        reshape_transform: Reshape | None = None,
        *,
        false: Choice = None,
        weighting: Weighting = "elementwise",
        fixed_statistics: bool = True,
        outputs: Outputs | None = None,
        example: Example = None,
        preprocessing: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if next(model.parameters(), None) is None:
            raise DiffsalError(f"{type(model).__name__} has no parameters: pass a classifier")
        # It puts what it is given in evaluation mode; and no layers, so none of its hooks.
        super().__init__(in_evaluation_mode(model), [], reshape_transform)
        self.model = model
        self.false = false
        self.preprocessing = preprocessing
        self.layers = as_layers(model, target_layers, self.reshape_transform, example)
        self.target_layers = [layer.module for layer in self.layers]  # as in grad-cam
        self._how: dict[str, Any] = {
            "weighting": weighting,
            "fixed_statistics": fixed_statistics,
            "outputs": outputs,
        }
        with self._explaining():  # a layer or model that cannot be captured is refused here
            pass

    @property
    def target_layer(self) -> TargetLayer:
        """Where maps are taken; the first of several."""
        return self.layers[0]

    def maps(self, input_tensor: Inputs, true: Choice = None, false: Choice = None) -> SalienceMaps:
        """Raw maps in logit units, detached, on the model's device.

        Args:
            input_tensor: (B, C, H, W) or (B, C, D, H, W); or a tuple or mapping of several inputs,
                such as two images, or an image and numbers; or, with ``preprocessing``, an image or
                a list of images.
            true: labels, see :func:`diffsal.maps.contrast.contrast`; ``None``: the predictions.
            false: what to set against them; ``None``: what the constructor was given.

        Raises:
            DiffsalError: see :func:`diffsal.maps.salience.explain`.
        """
        return explain(
            self.model,
            self._to_model(input_tensor),
            _on_cpu(true),
            _on_cpu(self.false if false is None else false),
            target_layers=self.layers,
            **self._how,
        )

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Score] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        *,
        false: Choice = None,
    ) -> NDArray[np.float32]:
        """Heatmaps of the difference: resized to the input, then normalised; no ReLU.

        Args:
            input_tensor: (B, C, H, W) or (B, C, D, H, W); or images, as for :meth:`maps`.
            targets: one of grad-cam's targets per sample. Class and softmax targets name the true
                class, ``BinaryClassifierOutputTarget`` does for one logit, and any other callable
                is the score to contrast, which needs ``false``. ``None``: the predictions.
            aug_smooth: average the maps of ``tta_transforms``; the classes are chosen once, before.
            eigen_smooth: the first principal component, signed as the difference map.
            false: overrides the constructor's.

        Returns:
            (B, H, W) or (B, D, H, W), float32 in [0, 1]; 0 for a constant map.

        Raises:
            DiffsalError: too few or too many targets, a class out of range, targets that do not
                suit the model's output, and see :func:`diffsal.maps.salience.explain`.
        """
        inputs = self._to_model(self._image_batch(self._prepared(input_tensor)))
        false = _on_cpu(self.false if false is None else false)
        compute = self._augmented if aug_smooth else self._raw
        raw = compute(inputs, targets, false, eigen_smooth)
        return on_host(normalize(raw))

    def forward(
        self,
        input_tensor: Tensor,
        targets: Sequence[Score] | None = None,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """As :meth:`__call__`, with the parent's arguments."""
        return self(input_tensor, targets, eigen_smooth=eigen_smooth)

    def forward_augmentation_smoothing(
        self,
        input_tensor: Tensor,
        targets: Sequence[Score] | None = None,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """As :meth:`__call__` with ``aug_smooth``, with the parent's arguments."""
        return self(input_tensor, targets, aug_smooth=True, eigen_smooth=eigen_smooth)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to release: hooks live no longer than a call. Nothing is swallowed."""

    def __del__(self) -> None:
        """Nothing to release, also where the constructor failed."""

    def _explaining(self) -> AbstractContextManager[tuple[nn.Module, capture]]:
        return explaining(self.model, self.layers, **self._how)

    def _to_model(self, inputs: Any) -> Any:
        """Inputs on the model's device."""
        device = next(self.model.parameters()).device
        inputs = self._prepared(inputs)
        if isinstance(inputs, Mapping):
            return {name: one.to(device) for name, one in inputs.items()}
        if isinstance(inputs, tuple | list):
            return tuple(one.to(device) for one in inputs)
        return self._image_batch(inputs).to(device)

    def _prepared(self, inputs: Any) -> Any:
        """A batch of the model's dtype where images were given, else what was given."""
        images = inputs if isinstance(inputs, tuple | list) else [inputs]
        if isinstance(inputs, Mapping) or any(isinstance(one, Tensor) for one in images):
            return inputs
        if self.preprocessing is None:
            raise DiffsalError(
                f"the input is a {type(inputs).__name__}: pass a tensor, or preprocessing= to the "
                "constructor, which makes tensors of images"
            )
        if not images:
            raise DiffsalError("the list of images is empty: pass one or more")
        dtype = next(self.model.parameters()).dtype
        return torch.stack([self.preprocessing(image) for image in images]).to(dtype)

    def _image_batch(self, input_tensor: Tensor) -> Tensor:
        if input_tensor.ndim not in (4, 5):
            raise DiffsalError(
                f"the input has shape {tuple(input_tensor.shape)}: pass (batch, channels, height, "
                "width) or (batch, channels, depth, height, width)"
            )
        return input_tensor

    def _raw(self, inputs: Tensor, targets: Targets, false: Choice, eigen_smooth: bool) -> Tensor:
        """The difference map, or its first component, at the input's size, not normalised."""
        with self._explaining() as (run, captured):
            logits = output_logits(answer(run, as_inputs(inputs)))
            true = _true_choice(targets, logits)
            if eigen_smooth:
                raw = captured.first_component(logits, true, false)
            else:
                raw = captured.maps(logits, true, false).difference
        self.outputs = logits.detach()
        return resize(raw, inputs.shape[2:])

    def _augmented(
        self, inputs: Tensor, targets: Targets, false: Choice, eigen_smooth: bool
    ) -> Tensor:
        with self._explaining() as (run, captured):
            logits = output_logits(answer(run, as_inputs(inputs)))
            maps = captured.maps(logits, _true_choice(targets, logits), false)
        if maps.true_from != "score":
            targets = maps.true_class.cpu()
        if not bool((maps.false_class == NO_CLASS).any()):
            false = maps.false_class.cpu()
        smoothed = [
            transform.deaugment_mask(
                self._raw(transform.augment_image(inputs), targets, false, eigen_smooth)[:, None]
            )[:, 0]
            for transform in self.tta_transforms
        ]
        return torch.stack(smoothed).mean(0)


def _true_choice(targets: Targets, logits: Any) -> Choice:
    """From grad-cam's targets to the true classes, or to the scores where one is no class."""
    if targets is None or isinstance(targets, Tensor):
        return targets
    if not isinstance(targets, Sequence):
        raise DiffsalError(
            f"targets is a {type(targets).__name__}: pass a list with one target for each sample"
        )
    if len(targets) != len(logits):
        raise DiffsalError(
            f"{len(targets)} targets for a batch of {len(logits)}: pass one for each sample"
        )
    one_logit = logits.ndim == 1 or logits.shape[1] == 1
    if any(isinstance(target, BinaryClassifierOutputTarget) for target in targets):
        if not one_logit:
            raise DiffsalError(
                f"BinaryClassifierOutputTarget is for one logit, but the model returns "
                f"{logits.shape[1]}: use ClassifierOutputTarget"
            )
        return [int(target.category == 1) for target in targets]
    if not all(isinstance(target, _CLASS_TARGETS) for target in targets):
        return targets
    if one_logit:
        raise DiffsalError(
            f"{type(targets[0]).__name__} names one of several logits, but the model returns one: "
            "use BinaryClassifierOutputTarget(0 or 1)"
        )
    return [int(target.category) for target in targets]


def _on_cpu(choice: Choice) -> Choice:
    """Labels on the CPU, where their range is checked."""
    return choice.cpu() if isinstance(choice, Tensor) else choice
