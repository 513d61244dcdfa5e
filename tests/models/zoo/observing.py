"""What is measured of a family, by means of its own, and what is wrong with it.

The model sees three images, and the first with other pixels in each of its quadrants, four times.

- ``unsteady``: a pooled head's residual is the difference of its biases, the same for all images.
- ``bypassed``: with the layer's output of a second image put in, the logits are the second's.
- ``in_place``: of four quadrants that change, a cell moves most, for a cell, with its own.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from models.zoo.families import Family
from torch import Tensor, nn

import diffsal
from diffsal.errors import DiffsalError
from diffsal.maps.outputs import output_logits
from diffsal.maps.run_record import replaced, tensors_in
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import TargetLayer, find_target_layer

Find: TypeAlias = Callable[[nn.Module, Tensor | None], TargetLayer]

_IMAGES = 3
_DRAWS = 4  # of other pixels: where features mix widely, one draw alone is noisy
_QUADRANTS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # lower half, right half
_TELLING = 1.05  # times what it moves on average that a cell moves with one of the quadrants
_COSTLY = 8e6  # parameters, above which float32 has to do
IN_PLACE = 0.6  # of the cells; half of them are where a transposed grid is right, too
_STEADY = 1e-3  # of the margins' spread
_ROUNDING = 1e-6  # of the same: with more, nothing can be told


@dataclass(frozen=True)
class Observation:
    """What was measured; a family that is refused has its message alone.

    Attributes:
        layer: its name.
        layout: channels-first, channels-last or tokens.
        grid: of the map.
        unsteady: spread of the residual over images, per spread of the margin.
        rounding: of the margin in its type, per spread of the margin.
        finite: whether maps and margins are.
        bypassed: how far the logits stay from the second image's, per distance of the two.
        in_place: share of cells that move most with their own quadrant, 0.25 by chance; NaN where
            all cells move alike with all quadrants.
        message: why it was refused, or what stopped it.
        stopped: whether that was no refusal.
        seconds: that it took.
    """

    layer: str = ""
    layout: str = ""
    grid: tuple[int, ...] = ()
    unsteady: float = math.nan
    rounding: float = math.nan
    finite: bool = False
    bypassed: float = math.nan
    in_place: float = math.nan
    message: str = ""
    stopped: bool = False
    seconds: float = 0.0


def complaints(family: Family, seen: Observation) -> list[str]:
    """What is not as it should be for a family; empty where all is right."""
    if family.head == "refused" or seen.message:
        return list(_of_refusal(family, seen.message))
    has_class_token = "tokens:" in seen.layout and "tokens:0" not in seen.layout
    wrong = {
        f"a grid of {seen.grid} is no map": math.prod(seen.grid) < 2,
        "not finite": not seen.finite,
        "the logits hardly depend on the image": not seen.rounding <= _ROUNDING,
        f"the residual varies by {seen.unsteady:.1e} of the margin": family.head == "pooled"
        and not seen.unsteady <= _STEADY,
        # Beside a class token that passes the last block by, the layer is what patches pass.
        f"{seen.bypassed:.1e} of the logits bypass it": not seen.bypassed <= _STEADY
        and not (family.head == "first order" and has_class_token),
        f"only {seen.in_place:.2f} of the cells move with what is under them": seen.in_place
        < IN_PLACE,
    }
    return [complaint for complaint, is_so in wrong.items() if is_so]


def _of_refusal(family: Family, message: str) -> Iterator[str]:
    if not message:
        yield "a layer is found where there is none"
    elif family.head != "refused":
        yield f"refused: {message}"
    elif "\n" in message or not re.search(family.reason, message):
        yield f"refused with another message: {message}"


def observe(family: Family, find: Find = find_target_layer) -> Observation:
    """Build a model of a family, find its layer and measure: in float64 where that is cheap."""
    started = time.perf_counter()
    torch.manual_seed(0)
    model = redraw(family.make()).eval()
    is_cheap = sum(parameter.numel() for parameter in model.parameters()) < _COSTLY
    images = _images(family.shape or _shape(model))
    example = None if family.shape is None else images[:_IMAGES]
    seen = _observed(model, images, example, torch.float64 if is_cheap else torch.float32, find)
    if seen.rounding > _ROUNDING:  # drawn so that the image is lost among biases
        _calibrate(model, images)
        seen = _observed(model, images, example, torch.float64, find)
    return replace(seen, seconds=time.perf_counter() - started)


def _observed(
    model: nn.Module, images: Tensor, example: Tensor | None, dtype: torch.dtype, find: Find
) -> Observation:
    model, images = model.to(dtype), images.to(dtype)
    try:
        layer = find(model, None if example is None else example.to(dtype))
    except DiffsalError as error:
        return Observation(message=str(error))
    layers = [layer, *layer.branches]
    with ExitStack() as stack:
        outputs = [stack.enter_context(_Output(one)) for one in layers]
        maps = diffsal.explain(model, images[:_IMAGES], true=1, target_layers=layer)
    return Observation(
        layer=str(layer),
        layout=" + ".join(dict.fromkeys(str(one.reshape or "channels-first") for one in layers)),
        grid=tuple(maps.true.shape[1:]),
        unsteady=_unsteady(maps),
        rounding=_rounding(maps.margin),
        finite=bool(torch.isfinite(maps.difference).all() & torch.isfinite(maps.margin).all()),
        bypassed=_bypassed(model, outputs, images, maps.logits),
        in_place=min(in_place(one) for one in _changed(model, layers, images)),
    )


@torch.no_grad()
def _changed(model: nn.Module, layers: list[TargetLayer], images: Tensor) -> list[Tensor]:
    """Each layer's features of the first image and of the changed ones; a draw at a time."""
    parts: list[list[Tensor]] = []
    for draw in images[_IMAGES:].split(len(_QUADRANTS)):
        with ExitStack() as stack:
            outputs = [stack.enter_context(_Output(one)) for one in layers]
            model(torch.cat([images[:1], draw]))
        parts.append([one.features for one in outputs])
    return [
        torch.cat([draws[0][:1], *(one[1:] for one in draws)]) for draws in zip(*parts, strict=True)
    ]


def torchcams_layer(model: nn.Module, example: Tensor | None) -> TargetLayer:
    """The layer that torch-cam takes by itself, at its last call, whose output it keeps."""
    from torchcam.methods._utils import locate_candidate_layer

    dtype = next(model.parameters()).dtype
    shape = _shape(model) if example is None else tuple(example.shape[1:])
    name = locate_candidate_layer(model.float(), shape)  # which runs it in float32
    model.to(dtype)
    if not name:
        raise DiffsalError("torch-cam finds no layer")
    calls: list[None] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        model(torch.zeros(1, *shape, dtype=dtype))
    handle.remove()
    return TargetLayer(name, module, call=len(calls) if len(calls) > 1 else None)


def redraw(model: nn.Module) -> nn.Module:
    """Draw what a library initialises to a constant: scales at zero, and heads, hide errors.

    What begins small, as layer scales do, stays near 0.1, as it is once trained: with 1, mixers mix
    all positions alike.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() == 0 or parameter.unique().numel() > 1:
                continue
            if parameter.ndim > 1 and parameter.abs().max() == 0:
                width = parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
            elif parameter.ndim <= 1 and "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.ndim <= 1:
                scale = 0.1 if 0 < parameter.abs().max() <= 0.1 else 1.0
                drawn = torch.rand(parameter.shape, generator=generator) + 0.5
                parameter.copy_(drawn * scale)
    return model


@torch.no_grad()
def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of the images."""
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model.double()(images.double())
    model.eval()


def _shape(model: nn.Module) -> tuple[int, ...]:
    """What the model says of its images, else three channels of 224 pixels."""
    timm = getattr(model, "pretrained_cfg", None)
    if timm:
        return tuple(timm["input_size"])
    if hasattr(model, "in_size"):  # pytorchcv's
        return 3, *model.in_size
    config: Any = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", 224)
    return 3, *((side, side) if isinstance(side, int) else side)


def _images(shape: tuple[int, ...]) -> Tensor:
    """Images of distinct brightness, contrast and colour, and the first, changed by quadrants."""
    generator = torch.Generator().manual_seed(1)
    count, axes = _IMAGES, len(shape) - 1
    colour = torch.randn((count, shape[0], *(1,) * axes), generator=generator)
    blocks = torch.randn((count, shape[0], *(4,) * axes), generator=generator)
    coarse = F.interpolate(blocks, size=shape[1:], mode="nearest")
    images = colour + coarse + torch.randn((count, *shape), generator=generator)
    changed = []
    for lower, right in _QUADRANTS * _DRAWS:
        one = images[0].clone()
        height, width = shape[-2] // 2, shape[-1] // 2
        region = one[..., lower * height :, right * width :][..., :height, :width]
        region.copy_(torch.randn(region.shape, generator=generator) * 2)
        changed.append(one)
    return torch.cat([images, torch.stack(changed)])


class _Output:
    """Record a layer's features over space, or put others in."""

    def __init__(self, layer: TargetLayer, instead: Tensor | None = None) -> None:
        self.layer, self._instead = layer, instead
        self.features = torch.empty(0)
        self.raw = torch.empty(0)

    def __enter__(self) -> "_Output":
        self._calls = 0
        self._handle = self.layer.module.register_forward_hook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._calls += 1
        if self.layer.call not in (None, self._calls):
            return None
        self.raw = dict(tensors_in(output))[self.layer.place].detach().clone()
        self.features = self.layer.reshape(self.raw) if self.layer.reshape else self.raw
        return None if self._instead is None else replaced(output, self.layer.place, self._instead)


def _spread(values: Tensor) -> float:
    return float(values.max() - values.min())


def _rounding(margin: Tensor) -> float:
    spread = _spread(margin)
    return (
        torch.finfo(margin.dtype).eps * float(margin.abs().max()) / spread if spread else math.inf
    )


def _unsteady(maps: SalienceMaps) -> float:
    spread = _spread(maps.margin)
    return _spread(maps.residual) / spread if spread else math.nan


@torch.no_grad()
def _bypassed(model: nn.Module, outputs: list["_Output"], images: Tensor, logits: Tensor) -> float:
    with ExitStack() as stack:
        for one in outputs:
            stack.enter_context(_Output(one.layer, one.raw[1:2]))
        patched = output_logits(model(images[:1]))
    first, second = logits[:1], logits[1:2]
    return float((patched - second).norm() / (first - second).norm())


def in_place(features: Tensor) -> float:
    """Of the cells of each quadrant, how many move more with it than with the other three.

    Args:
        features: of the first image, then of the changed ones: quadrant by quadrant, draw by draw.
    """
    moved = (features[1:] - features[0]).double().abs().sum(1)
    moved = moved.sum(1) if moved.ndim == 4 else moved
    # Some quadrants move everything more than others: each is measured by its mean over cells.
    moved = moved / moved.mean((1, 2), keepdim=True)
    moved = moved.unflatten(0, (-1, len(_QUADRANTS))).mean(0)
    rows, columns = (_centres(side) for side in moved.shape[1:])
    own = 2 * (rows > 0.5).long()[:, None] + (columns > 0.5).long()
    clear = ((rows - 0.5).abs() > 1e-6)[:, None] & ((columns - 0.5).abs() > 1e-6)
    most = moved.max(0).values / moved.mean(0)
    if not bool(clear.any()) or not bool(most[clear].mean() > _TELLING):
        return math.nan
    return float((moved.argmax(0) == own)[clear].double().mean())


def _centres(count: int) -> Tensor:
    return (torch.arange(count) + 0.5) / count
