"""Models as strangers write them: what they do in a forward pass, and what they are made of.

Each is small: convolutions, something odd, a mean over space, a linear layer called ``fc``, so that
what the map has to add up to is known: the margin less the difference of the biases.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 4
EXACT = "adds up"
"""What is expected of a model: its map adds up to the margin, less the biases of ``fc``."""
FIRST_ORDER = "first order"
"""The map is of what the model does, and the residual, which is finite, tells the rest."""
REFUSED = "refused"
"""One line."""
EITHER = "either"
"""Refused in training mode, where no twin can be made; else it adds up."""


class Net(nn.Module):
    """What most of them are made from: (B, 3, 8, 8) to (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.features = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(WIDTH, 2)

    def backbone(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(self.norm(self.first(x)).relu())
        return features

    def head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.drop(features.mean((2, 3))))
        return logits

    def forward(self, x: Tensor) -> Any:
        return self.head(self.backbone(x))


# What a forward pass does to the model.


class CountsInSlots(Net):
    __slots__ = ("runs",)

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.head(self.backbone(x))


class Counts(Net):
    """In a buffer, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.head(self.backbone(x))


class CountsAnew(Counts):
    """In a buffer that is replaced."""

    def forward(self, x: Tensor) -> Tensor:
        self.runs = self.runs + 1
        return self.head(self.backbone(x))


class Remembers(Net):
    """What it answers depends on what it saw before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.backbone(x).mean((2, 3))
        with torch.no_grad():
            self.mean.lerp_(pooled.mean(0), 0.5)
        return self.fc(pooled - self.mean)


class Attention(Net):
    """Its tokens have to be looked at by their values, so that it runs once more."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        tokens = self.backbone(x).flatten(2).transpose(1, 2)
        return self.fc(self.mix(tokens).mean(1))


class KeepsFeatures(Net):
    """And their gradient, as tutorials of Grad-CAM have it."""

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.backbone(x)
        if self.kept.requires_grad:
            self.kept.register_hook(self.keep)
        return self.head(self.kept)


class Trains(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.train()
        return self.fc(self.backbone(x).mean((2, 3)))


class Evaluates(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.eval()
        return self.head(self.backbone(x))


class BuildsItsHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, WIDTH, 3)
        self.fc: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.fc is None:
            self.fc = nn.Linear(WIDTH, 2)
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


class Draws(Net):
    """Random numbers, whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.backbone(x), 0.5, training=True))


class Seeds(Net):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return self.head(self.backbone(x) + torch.rand(()))


# What it does to grad mode.


class Within(Net):
    """Runs its backbone, or all of it, in a context."""

    def __init__(self, context: Callable[[], AbstractContextManager[Any]], whole: bool) -> None:
        super().__init__()
        self.context, self.whole = context, whole

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            features = self.backbone(x)
            if self.whole:
                return self.head(features)
        return self.head(features)


class LeavesGradMode(Net):
    def __init__(self, mode: bool, early: bool) -> None:
        super().__init__()
        self.mode, self.early = mode, early

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            torch.set_grad_enabled(self.mode)
        logits = self.head(self.backbone(x))
        torch.set_grad_enabled(self.mode)
        return logits


class Detaches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).detach())


class DetachesItsOutput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).detach()


class ThroughNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.from_numpy(self.backbone(x).detach().numpy()))


# What is at the layer.


class InPlaceRelu(Net):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.backbone(x)))


class InPlaceBehind(Net):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x).relu_() if self.breaks else self.backbone(x)
        features.mul_(2)  # what the ReLU needs on the way back is gone
        return self.head(features)


class Twice(Net):
    """The last convolution runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.backbone(x).relu()))


class HeadTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        return (self.head(features) + self.head(features.flip(3))) / 2


class Checkpointed(Net):
    def __init__(self, part: str, reentrant: bool) -> None:
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x: Tensor) -> Any:
        backbone, head = self.backbone, self.head
        if self.part == "backbone":
            return head(checkpoint(backbone, x, use_reentrant=self.reentrant))
        return checkpoint(head, backbone(x), use_reentrant=self.reentrant)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 2


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


class Custom(Net):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function.apply(self.backbone(x)))  # type: ignore[no-untyped-call]


class Heads(Net):
    """The mean of several heads, of which one is called ``fc``; the others add no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.backbone(x).mean((2, 3))
        return self.fc(pooled) + torch.stack([head(pooled) for head in self.heads]).mean(0)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.again.weight = self.features.weight

    def backbone(self, x: Tensor) -> Tensor:
        features: Tensor = self.again(super().backbone(x).tanh())
        return features


class OwnParameters(nn.Module):
    """Lists and a plain tensor, and no module for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, WIDTH, 3)
        self.rows = nn.ParameterList([torch.randn(WIDTH) for _ in range(2)])
        self.gain = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x).mean((2, 3)) * self.gain
        return torch.stack([pooled @ row for row in self.rows], 1)


class Functional(Net):
    """Calls its own part with other weights."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {"weight": self.fc.weight * 2, "bias": self.fc.bias}
        pooled = self.backbone(x).mean((2, 3))
        return torch.func.functional_call(self.fc, weights, (pooled,))


class Autocasts(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features = self.backbone(x)
        return self.head(features.float())


# What it returns.


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


class Returns(Net):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.form(self.head(features), features)


# What it is.


class Slots(Net):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) * self.scale)


class Delegates(nn.Module):
    """Whatever it has not, its inner model has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class CallsItself(Net):
    """Its ``__call__`` goes past torch's, and past all hooks of its own."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.forward(*given, **named)


class NoCopy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


class Cyclic(Net):
    def __init__(self) -> None:
        super().__init__()
        self.me = self


class StaysFrozen(Net):
    """As detection's frozen backbones: asking for a mode changes nothing, or raises."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def train(self, mode: bool = True) -> Any:
        if self.raises:
            raise RuntimeError("this model has no modes")
        return self


class ClassConditional(Net):
    """A second input that has a default."""

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        features = self.backbone(x) * scale
        return self.head(features if shift is None else features + shift)


class Squeezes(Net):
    """A batch of one loses its axis."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).squeeze()


class Transposes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).T


class Votes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(self.head(self.backbone(x)).argmax(1), 2).float()


class Constant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc.bias.expand(len(x), 2)


class Raises(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no\nsuch thing")


class Inhales(Net):
    """Raises after the layer, in evaluation of the second kind."""

    def forward(self, x: Tensor) -> Tensor:
        self.backbone(x)
        raise ZeroDivisionError


class Scripted(nn.Module):
    """What TorchScript can read."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, WIDTH, 3)
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Complex(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, dtype=torch.complex64)

    def backbone(self, x: Tensor) -> Tensor:
        return self.features(self.norm(self.first(x)).relu().to(torch.complex64)).abs()


class OneModule(nn.Conv2d):
    """All of it in one module: nothing inside it could be hooked."""

    def __init__(self) -> None:
        super().__init__(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


class Permutes(Net):
    """Its features leave in another memory format."""

    def backbone(self, x: Tensor) -> Tensor:
        return super().backbone(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
