"""Odd models × their mode × the caller's grad mode: maps that are right, or one line; no trace."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hostile import odd_models as odd
from hostile.odd_models import EITHER, EXACT, FIRST_ORDER, REFUSED, Net, Returns, Within
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from diffsal import DiffsalError, explain
from diffsal.maps.outputs import output_logits
from diffsal.maps.salience_maps import SalienceMaps

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    expected: str = EXACT
    near: float | None = None
    """How far the map's sum may be off; ``None``: by what weights of its type may."""


def changed(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A plain network, changed in place or replaced."""

    def make() -> nn.Module:
        net = Net()
        result = change(net)
        return result if isinstance(result, nn.Module) else net

    return make


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, torch.qint8)


def lazy(ran: bool) -> nn.Module:
    net = Net()
    net.features, net.fc = nn.LazyConv2d(odd.WIDTH, 3), nn.LazyLinear(2)
    if ran:
        net.eval()(images())
    return net


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def scaled(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 3


def in_layout(net: Net) -> nn.Module:
    return net.to(memory_format=torch.channels_last)


def frozen(net: Net, *, every: bool) -> None:
    for number, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(not every and number % 2 == 0)


def scripted_norm(net: Net) -> None:
    net.norm = torch.jit.script(net.norm)


def traced() -> nn.Module:
    module: nn.Module = torch.jit.trace(Net().eval(), images())
    return module


def with_nan(net: Net) -> None:
    net.fc.weight.data[0, 0] = torch.nan


CASES = {
    "plain": Case(Net),
    "counts in place": Case(odd.Counts),
    "counts anew": Case(odd.CountsAnew),
    "counts, tokens": Case(odd.Attention),
    "remembers what it saw": Case(odd.Remembers, FIRST_ORDER),
    "keeps features and gradients": Case(odd.KeepsFeatures),
    "calls train": Case(odd.Trains, FIRST_ORDER),
    "calls eval": Case(odd.Evaluates),
    "builds its head": Case(odd.BuildsItsHead),
    "draws": Case(odd.Draws),
    "seeds": Case(odd.Seeds, FIRST_ORDER),
    "no_grad, backbone": Case(partial(Within, torch.no_grad, False), REFUSED),
    "no_grad, all": Case(partial(Within, torch.no_grad, True), REFUSED),
    "enable_grad, all": Case(partial(Within, torch.enable_grad, True)),
    "inference_mode, backbone": Case(partial(Within, torch.inference_mode, False), REFUSED),
    "inference_mode, all": Case(partial(Within, torch.inference_mode, True), REFUSED),
    "autocast, all": Case(
        partial(Within, partial(torch.autocast, "cpu", torch.bfloat16), True), near=0.03
    ),
    "autocast, backbone": Case(odd.Autocasts, near=0.03),
    "leaves gradients off": Case(partial(odd.LeavesGradMode, False, False)),
    "leaves gradients on": Case(partial(odd.LeavesGradMode, True, False)),
    "turns gradients off first": Case(partial(odd.LeavesGradMode, False, True), REFUSED),
    "turns gradients on first": Case(partial(odd.LeavesGradMode, True, True)),
    "detaches features": Case(odd.Detaches, REFUSED),
    "detaches logits": Case(odd.DetachesItsOutput, REFUSED),
    "through numpy": Case(odd.ThroughNumpy, REFUSED),
    "votes": Case(odd.Votes, REFUSED),
    "constant": Case(odd.Constant, REFUSED),
    "raises": Case(odd.Raises, REFUSED),
    "raises late": Case(odd.Inhales, REFUSED),
    "in-place ReLU at the layer": Case(odd.InPlaceRelu),
    "in place behind the layer": Case(partial(odd.InPlaceBehind, False)),
    "in place, and no way back": Case(partial(odd.InPlaceBehind, True), REFUSED),
    "layer runs twice": Case(odd.Twice),
    "head runs twice": Case(odd.HeadTwice),
    "checkpointed backbone": Case(partial(odd.Checkpointed, "backbone", False)),
    "checkpointed head": Case(partial(odd.Checkpointed, "head", False)),
    "reentrant backbone": Case(partial(odd.Checkpointed, "backbone", True), REFUSED),
    "reentrant head": Case(partial(odd.Checkpointed, "head", True), REFUSED),
    "custom function": Case(partial(odd.Custom, odd._Doubled)),
    "straight through": Case(partial(odd.Custom, odd._StraightThrough), FIRST_ORDER),
    "no way back": Case(partial(odd.Custom, odd._NoWayBack), REFUSED),
    "list of heads": Case(odd.Heads),
    "tied weights": Case(odd.Tied),
    "parameters of its own": Case(odd.OwnParameters),
    "functional call": Case(odd.Functional),
    "returns a mapping": Case(partial(Returns, lambda y, a: {"logits": y, "features": a})),
    "returns a tuple": Case(partial(Returns, lambda y, a: (y, a))),
    "returns a list": Case(partial(Returns, lambda y, a: [a, y])),
    "returns a named tuple": Case(partial(Returns, odd.Pair)),
    "returns a dataclass": Case(partial(Returns, odd.Answer)),
    "returns nothing": Case(partial(Returns, lambda y, a: None), REFUSED),
    "returns a string": Case(partial(Returns, lambda y, a: "cat"), REFUSED),
    "returns features alone": Case(partial(Returns, lambda y, a: a), REFUSED),
    "returns two of logits": Case(partial(Returns, lambda y, a: (y, y)), REFUSED),
    "returns whole numbers": Case(partial(Returns, lambda y, a: y.long()), REFUSED),
    "returns complex numbers": Case(partial(Returns, lambda y, a: y + 0j), REFUSED),
    "__slots__": Case(odd.Slots),
    "counts in __slots__": Case(odd.CountsInSlots),
    "__getattr__": Case(odd.Delegates),
    "__call__": Case(odd.CallsItself),
    "no deepcopy": Case(odd.NoCopy),
    "contains itself": Case(odd.Cyclic),
    "train does nothing": Case(partial(odd.StaysFrozen, False)),
    "train raises": Case(partial(odd.StaysFrozen, True)),
    "more inputs": Case(odd.ClassConditional),
    "squeezes": Case(odd.Squeezes),
    "transposes": Case(odd.Transposes, REFUSED),
    "complex inside": Case(odd.Complex, FIRST_ORDER),
    "one module": Case(odd.OneModule, REFUSED),
    "permutes": Case(odd.Permutes),
    "weight norm": Case(changed(lambda net: parametrizations.weight_norm(net.features) and None)),
    "spectral norm": Case(changed(lambda net: parametrizations.spectral_norm(net.fc) and None)),
    "spectral norm, old": Case(changed(lambda net: spectral_norm(net.features) and None)),
    "a hook scales the layer": Case(
        changed(lambda net: net.features.register_forward_hook(scaled) and None)
    ),
    "a hook scales the logits": Case(
        changed(lambda net: net.register_forward_hook(scaled) and None), FIRST_ORDER
    ),
    "a hook before the layer": Case(
        changed(
            lambda net: net.features.register_forward_pre_hook(lambda _, x: (x[0] * 2,)) and None
        )
    ),
    "a hook behind gradients": Case(
        changed(lambda net: net.features.register_full_backward_hook(lambda *_: None) and None)
    ),
    "half": Case(changed(lambda net: net.half())),
    "bfloat16": Case(changed(lambda net: net.bfloat16())),
    "float64": Case(changed(lambda net: net.double())),
    "channels last": Case(changed(in_layout)),
    "frozen": Case(changed(partial(frozen, every=True))),
    "frozen in part": Case(changed(partial(frozen, every=False))),
    "DataParallel": Case(changed(nn.DataParallel)),
    "compiled": Case(changed(lambda net: torch.compile(net, backend="eager")), REFUSED),
    "compiled in place": Case(changed(lambda net: net.compile(backend="eager")), REFUSED),
    "layer compiled": Case(changed(lambda net: net.features.compile(backend="eager")), REFUSED),
    "scripted": Case(lambda: torch.jit.script(odd.Scripted()), REFUSED),
    "traced": Case(traced, REFUSED),
    "scripted in part": Case(changed(scripted_norm), EITHER),
    "quantised": Case(quantised, REFUSED),
    "lazy": Case(partial(lazy, False), REFUSED),
    "lazy, ran": Case(partial(lazy, True)),
    "made in inference mode": Case(in_inference_mode, REFUSED),
    "meta": Case(on_meta, REFUSED),
    "NaN": Case(changed(with_nan), FIRST_ORDER),
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 8, 8, generator=generator).to(dtype)


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make()


def state(model: nn.Module) -> dict[str, Any]:
    """What no explanation may change."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in kinds],
        "tensors": {name: bits(tensor) for name, tensor in tensors},
        "gradients": {name: (one.requires_grad, one.grad is None) for name, one in tensors},
    }


def bits(tensor: Tensor) -> Any:
    if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return type(tensor)
    return str(tensor.dtype), repr(tensor.detach().tolist())  # as NaN is not itself


def flags(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def put_in(model: nn.Module, training: bool) -> None:
    for module in model.modules():  # whatever its own train() does
        module.training = training


def runs() -> Iterator[Any]:
    """Every model in every mode; in `make test`, each in one of the six in turn."""
    ways = list(product([False, True], MODES))
    for number, name in enumerate(CASES):
        for turn, (training, mode) in enumerate(ways):
            marks = [] if turn == number % len(ways) else [pytest.mark.slow]
            way = f"{name}, {'training' if training else 'evaluation'}, {mode}"
            yield pytest.param(name, training, mode, marks=marks, id=way)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "training", "mode"), list(runs()))
def test_maps_that_are_right_or_one_line(name: str, training: bool, mode: str) -> None:
    case = CASES[name]
    model, bare = made(case), made(case)
    put_in(model, training)
    put_in(bare, False)
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), None)
    x = images(dtype or torch.float32)
    for turn in range(2):  # the layer is looked for in the first
        before, modes, drawn = state(model), flags(model), torch.get_rng_state()
        with MODES[mode]():
            try:
                found: SalienceMaps | DiffsalError = explain(model, x)
            except DiffsalError as error:
                found = error
            assert torch.is_grad_enabled() == (mode == "grad")
        after, rng = state(model), torch.get_rng_state()
        assert flags(model).items() >= modes.items()  # or more, where a run built some
        if isinstance(found, DiffsalError):
            assert "\n" not in str(found)
            assert case.expected in (REFUSED, EITHER if training else REFUSED), found
            assert after == before or turn
        else:
            assert case.expected != REFUSED
            torch.set_rng_state(drawn)
            with torch.no_grad():
                logits = output_logits(bare(x)).float()
            assert after == state(bare)
            assert torch.equal(rng, torch.get_rng_state())
            check(found, logits, model, case, dtype or torch.float32)


def check(
    maps: SalienceMaps, logits: Tensor, model: nn.Module, case: Case, dtype: torch.dtype
) -> None:
    near = case.near or TOLERANCE[dtype]
    assert torch.equal(maps.difference.nan_to_num(), (maps.true - maps.false).nan_to_num())
    torch.testing.assert_close(maps.logits.float(), logits, rtol=near, atol=near, equal_nan=True)
    assert maps.difference.isfinite().all() or not logits.isfinite().all()
    if case.expected == FIRST_ORDER:
        return
    bias = dict(model.named_modules()).get("fc") or dict(model.named_modules()).get("module.fc")
    if bias is None:
        bias = dict(model.named_modules()).get("inner.fc")
    offset = torch.zeros(2) if bias is None else bias.bias.detach()
    sums = maps.difference.flatten(1).sum(1)
    expected = maps.margin - (offset[maps.true_class] - offset[maps.false_class])
    torch.testing.assert_close(sums.to(dtype), expected.to(dtype), rtol=near, atol=near)
    assert maps.difference.ndim == 3
