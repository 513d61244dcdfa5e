"""What is left behind: nothing, after a thousand explanations, and of hundreds of models."""

import gc
import resource
import tracemalloc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffsal import DifferenceCAM, DiffsalError, capture, explain

IMAGES = torch.rand(1, 3, 4, 4)


def net(*end: nn.Module) -> nn.Sequential:
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head, *end)


class Raises(nn.Module):
    """Every other time."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs % 2:
            raise ValueError("no")
        return x


def train(model: nn.Module) -> None:
    with capture(model) as captured:
        captured.maps(model(IMAGES)).difference.sum().backward()
    model.zero_grad()


def refused(model: nn.Module) -> None:
    with pytest.raises(DiffsalError):
        explain(model, IMAGES.half())


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "explain": lambda model: explain(model, IMAGES),
    "drop-in": lambda model: DifferenceCAM(model)(IMAGES),
    "training": train,
    "refused": refused,
}


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(one), Tensor | nn.Module) for one in gc.get_objects())


def counts(quick: int, whole: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [quick, pytest.param(whole, marks=pytest.mark.slow)])


@counts(30, 1_000)
@pytest.mark.parametrize("way", WAYS)
def test_calls_leave_memory_and_hooks_as_they_were(way: str, count: int) -> None:
    model = net().eval()
    for _ in range(10):
        WAYS[way](model)
    before = alive()

    def grown() -> int:
        """Bytes; a cache fills once, what leaks does so every time."""
        start, _ = tracemalloc.get_traced_memory()
        for _ in range(count):
            WAYS[way](model)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - start

    tracemalloc.start()
    try:
        least = min(grown() for _ in range(3))
    finally:
        tracemalloc.stop()
    assert alive() == before
    assert least < 16 * 1024
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_the_process_is_steady(way: str) -> None:
    model = net().eval()

    def largest() -> int:
        for _ in range(1_000):
            WAYS[way](model)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = largest()
    assert largest() - before < 4 * 1024  # kB


@counts(6, 200)
@pytest.mark.parametrize("way", [*WAYS, "fails"])
def test_models_that_are_dropped_die(way: str, count: int) -> None:
    known: list[weakref.ref[nn.Module]] = []
    for number in range(count):
        model = net(*[Raises()] * (way == "fails")).train(number % 2 == 0)
        try:
            WAYS.get(way, WAYS["explain"])(model)
        except DiffsalError:
            assert way == "fails"
        known += [weakref.ref(module) for module in model.modules()]
        del model
    gc.collect()
    assert not any(one() is not None for one in known)
