"""Several threads and asyncio tasks on one model: maps are right, nobody beside is disturbed."""

import asyncio
import copy
import functools
import gc
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsal import DifferenceCAM, DiffsalError, capture, explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.target_layers import find_target_layer

PATIENCE = 30  # seconds that a thread waits for another before the test fails


class Gate(nn.Module):
    """Lets one thread stop in the middle of a forward pass, and notes the mode of each run."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: dict[int, Callable[[], None]] = {}
        self.modes: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        stop = self.stops.pop(threading.get_ident(), None)
        if stop is not None:
            stop()
        self.modes.append((threading.get_ident(), self.training))
        return x


def net() -> nn.Sequential:
    """Batch norm and dropout before and behind the layer, and a gate behind it."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)
    layer = nn.Conv2d(4, 4, 3, padding=1)
    head = nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)
    model = nn.Sequential(*stem, layer, Gate(), *head, nn.Linear(4, 2)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def gate(model: nn.Sequential) -> Gate:
    return next(module for module in model if isinstance(module, Gate))


def expected(model: nn.Module, x: Tensor) -> SalienceMaps:
    """Of a copy, by one thread."""
    return explain(copy.deepcopy(model).eval(), x, 1)


def same(maps: SalienceMaps, other: SalienceMaps) -> bool:
    return torch.equal(maps.true, other.true) and torch.equal(maps.false, other.false)


def state(model: nn.Module) -> list[object]:
    """What no explanation may change: flags, hooks, parameters, statistics."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [module.training for module in model.modules()],
        [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        {name: value.tolist() for name, value in model.state_dict().items()},
    ]


@contextmanager
def stopped_in_the_middle(model: nn.Sequential, work: Callable[[], Any]) -> Iterator[list[Any]]:
    """While another thread stands in the middle of a forward pass; its result is in the list."""
    find_target_layer(model)  # else the thread would stop in that run
    there, go_on, results = threading.Event(), threading.Event(), list[Any]()

    def stop() -> None:
        there.set()
        assert go_on.wait(PATIENCE)

    def run() -> None:
        gate(model).stops[threading.get_ident()] = stop
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)
        finally:
            there.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert there.wait(PATIENCE)
    assert not results, results
    try:
        yield results
    finally:
        go_on.set()
        thread.join(PATIENCE)


@pytest.fixture(autouse=True)
def _threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


MODES = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
WAYS: dict[str, Callable[[nn.Module, Tensor], SalienceMaps]] = {
    "explain": lambda model, x: explain(model, x, 1),
    "cam": lambda model, x: DifferenceCAM(model).maps(x, 1),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("way", WAYS)
def test_inference_beside_an_explanation_is_untouched(way: str, grad: bool) -> None:
    model, x = net().eval(), images()
    explain(model, x, 1)
    right, logits, before = expected(model, x), model(x), state(model)
    with (
        stopped_in_the_middle(model, lambda: explain(model, x, 1)) as results,
        torch.set_grad_enabled(grad),
    ):
        found = model(x)
        assert torch.is_grad_enabled() == grad == found.requires_grad
        assert torch.equal(found, logits)
        assert same(WAYS[way](model, x), right)
        assert torch.is_grad_enabled() == grad
    assert same(results[0], right)
    assert state(model) == before


@MODES
@pytest.mark.parametrize("way", WAYS)
def test_explanations_that_overlap_are_right_whichever_ends_first(way: str, training: bool) -> None:
    model, x, y = net().train(training), images(), images(seed=2)
    right, before = [expected(model, one) for one in (x, y)], state(model)
    with stopped_in_the_middle(model, lambda: WAYS[way](model, x)) as results:
        assert same(WAYS[way](model, y), right[1])
    assert same(results[0], right[0])
    assert state(model) == before


def test_the_first_that_ends_leaves_the_second_in_evaluation_mode() -> None:
    model, x = net().train(), images()
    right, before = expected(model, x), state(model)
    beginning = stopped_in_the_middle(model, lambda: explain(model, x, 1))
    first = beginning.__enter__()
    with stopped_in_the_middle(model, lambda: explain(model, x, 1)) as second:
        beginning.__exit__(None, None, None)
    assert same(first[0], right)
    assert same(second[0], right)
    assert state(model) == before


def test_a_training_step_beside_an_explanation_is_in_training_mode() -> None:
    model, x = net().train(), images()
    alone = copy.deepcopy(model)
    me = threading.get_ident()

    def step(one: nn.Sequential) -> tuple[Tensor, list[bool]]:
        torch.manual_seed(3)  # of the dropout
        loss = one(x).square().sum()
        loss.backward()
        return loss, [mode for thread, mode in gate(one).modes if thread == me]

    loss, _ = step(alone)
    gate(model).modes.clear()
    with stopped_in_the_middle(model, lambda: explain(model, x, 1)) as results:
        found, modes = step(model)
    assert modes == [True]
    assert torch.equal(found, loss)
    assert state(model) == state(alone)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert isinstance(results[0], DiffsalError)  # half of it was of the statistics before
    assert "changed meanwhile" in str(results[0])
    assert same(explain(model, x, 1), expected(model, x))


def test_an_explanation_beside_a_training_step_is_in_evaluation_mode() -> None:
    model, x = net().train(), images()
    with stopped_in_the_middle(model, lambda: model(x).requires_grad) as results:
        assert same(explain(model, x, 1), expected(model, x))
    assert results == [True]
    assert all(module.training for module in model.modules())
    assert [module.num_batches_tracked for module in (model[1], model[6])] == [1, 1]


def test_a_training_capture_beside_an_explanation_gives_its_own_maps() -> None:
    model, x, y = net().train(), images(), images(seed=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(model)

    def captured(one: nn.Module) -> SalienceMaps:
        with capture(one, one[4]) as captured:
            return captured.maps(one(x), 1)

    right = captured(alone)
    with stopped_in_the_middle(model, lambda: captured(model)) as results:
        explain(model, y, 1)
        model.eval()(y)
        model.train()
    assert same(results[0], right)
    assert results[0].true.requires_grad


@MODES
def test_many_threads_that_explain_infer_and_ask_for_one_model(training: bool) -> None:
    model, batches = net().train(training), [images(seed=seed) for seed in range(4)]
    right = [expected(model, x) for x in batches]
    logits = [copy.deepcopy(model).eval()(x).detach() for x in batches]
    before, start = state(model), threading.Barrier(8)

    def work(number: int) -> list[str]:
        torch.set_grad_enabled(False)
        start.wait(PATIENCE)
        wrong = []
        for turn in range(25):
            index = (number + turn) % 4
            if training or (number + turn) % 3:
                if not same(explain(model, batches[index], 1), right[index]):
                    wrong.append(f"maps {number} {turn}")
            elif not torch.equal(model(batches[index]), logits[index]):
                wrong.append(f"logits {number} {turn}")
            if torch.is_grad_enabled():
                wrong.append(f"grad mode {number} {turn}")
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8
    assert state(model) == before


def test_looking_for_the_layer_disturbs_nobody() -> None:
    """The first explanations of a model at once, and inference while hooks are everywhere."""
    start = threading.Barrier(4)

    def work(number: int, model: nn.Module, x: Tensor) -> Any:
        start.wait(PATIENCE)
        return explain(model, x, 1) if number % 2 else model(x).detach()

    x = images()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            model = net().eval()
            right, logits = expected(model, x), model(x).detach()
            found = list(pool.map(functools.partial(work, model=model, x=x), range(4)))
            assert torch.equal(found[0], logits)
            assert torch.equal(found[2], logits)
            assert same(found[1], right)
            assert same(found[3], right)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_tasks_of_asyncio_that_wait_between_forward_and_maps(grad: bool) -> None:
    model, batches = net().eval(), [images(seed=seed) for seed in range(4)]
    right, logits = [expected(model, x) for x in batches], [model(x) for x in batches]

    async def captured(number: int) -> SalienceMaps:
        with capture(model) as captured:
            await asyncio.sleep(0)
            output = model(batches[number])
            for _ in range(number + 1):
                await asyncio.sleep(0)
            return captured.maps(output, 1)

    async def inferred(number: int) -> Tensor:
        for _ in range(number):
            await asyncio.sleep(0)
        return model(batches[number])

    async def serve() -> tuple[list[SalienceMaps], list[Tensor]]:
        return (
            await asyncio.gather(*(captured(number) for number in range(4))),
            await asyncio.gather(*(inferred(number) for number in range(4))),
        )

    async def both() -> tuple[list[SalienceMaps], list[Tensor]]:
        asked = [captured(number) for number in range(4)]
        found = await asyncio.gather(*asked, *(inferred(number) for number in range(4)))
        return found[:4], found[4:]

    for work in (serve, both):
        with torch.set_grad_enabled(grad):
            maps, outputs = asyncio.run(work())
            assert torch.is_grad_enabled() == grad
        assert all(map(same, maps, right))
        assert all(map(torch.equal, outputs, logits))


def test_a_task_or_thread_that_is_started_inside_a_capture_is_outside_it() -> None:
    model, x = net().eval(), images()
    right, logits = expected(model, x), model(x)

    async def infer() -> Tensor:
        return model(x)

    async def serve() -> list[Any]:
        with capture(model) as captured:
            child = await asyncio.create_task(infer())
            threaded = await asyncio.to_thread(model, x)
            explained = await asyncio.to_thread(explain, model, x, 1)
            return [child, threaded, explained, captured.maps(model(x), 1)]

    child, threaded, *maps = asyncio.run(serve())
    assert torch.equal(child, logits)
    assert torch.equal(threaded, logits)
    assert all(same(one, right) for one in maps)


def test_sigmoids_of_tasks_that_take_turns_are_each_their_own() -> None:
    def probabilities() -> nn.Module:
        return nn.Sequential(*net()[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid())

    first, second, x = probabilities().eval(), probabilities().eval(), images()
    right = expected(first, x)

    async def captured(model: nn.Module, waits: int) -> SalienceMaps:
        with capture(model) as captured:
            for _ in range(waits):
                await asyncio.sleep(0)
            output = model(x)
            await asyncio.sleep(0)
            return captured.maps(output, 1)

    async def serve() -> list[SalienceMaps]:
        return await asyncio.gather(captured(first, 1), captured(second, 3))

    for maps in asyncio.run(serve()):
        assert maps.squash == "sigmoid"
        assert same(maps, right)


def test_maps_and_ends_elsewhere_are_refused(refused: Callable[[str], Any]) -> None:
    model, x = net().eval(), images()
    with ThreadPoolExecutor(1) as pool:
        with capture(model) as captured:
            logits = model(x)
            with refused("thread and asyncio task that opened"):
                pool.submit(captured.maps, logits).result()
            pool.submit(model, x).result()
            captured.maps(logits)
            pool.submit(model, x).result()
            with refused("did not run since the last maps.*in its thread"):
                captured.maps(logits)
        captured.__enter__()
        with refused("left in another thread"):
            pool.submit(captured.__exit__, None, None, None).result()
        assert pool.submit(torch.is_grad_enabled).result()
    assert not any(hooks for hooks in state(model)[1])  # type: ignore[attr-defined]


def test_the_attention_of_the_process_is_put_back_by_the_last() -> None:
    switches = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    before = [one() for one in switches]
    first, second = capture(net().eval()), capture(net().eval())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [one() for one in switches] == [False, False]
    second.__exit__(None, None, None)
    assert [one() for one in switches] == before


class SwitchesItself(nn.Module):
    """Its forward pass turns training mode on, for all of it or for a part."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.inner, self.whole = net(), whole

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            self.train()
        else:
            self.inner[0].train()
        return self.inner(x)


@MODES
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_turns_training_on_is_put_back(way: str, whole: bool, training: bool) -> None:
    model, x = SwitchesItself(whole).train(training), images()
    for _ in range(3):
        before = [module.training for module in model.modules()]
        maps = WAYS[way](model, x)
        assert [module.training for module in model.modules()] == before
        bias = model.inner[-1].bias
        assert torch.allclose(maps.margin - maps.difference.sum((1, 2)), maps.residual)
        assert torch.isfinite(bias).all()


def test_what_cannot_be_run_beside_itself_is_refused_in_training_mode(
    refused: Callable[[str], Any],
) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.rest = nn.BatchNorm2d(3), net()[2:]
            self.rest[2] = nn.Conv2d(3, 4, 3)
            self.parts = [self.norm, self.rest]  # reached by no name

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    replaced = net()
    replaced[1].forward = functools.partial(nn.BatchNorm2d.forward, replaced[1])
    x = images()
    scripted = net()
    scripted[1] = torch.jit.script(scripted[1])
    for model in (Hidden().double(), replaced, scripted):
        before = state(model)
        with refused("call model.eval\\(\\) first"):
            explain(model.train(), x, 1)
        assert state(model) == before
        model.eval()
        assert same(explain(model, x, 1), explain(model, x, 1))


def test_a_forward_that_was_bound_to_the_model_runs_in_evaluation_mode() -> None:
    model, x = net(), images()
    right = expected(model, x)
    model.forward = model.forward  # type: ignore[method-assign]  # as accelerate leaves it
    before = state(model)
    assert same(explain(model.train(), x, 1), right)
    assert state(model) == before


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_made_during_a_capture_are_outside_it(way: str) -> None:
    model, x = net().eval(), images()
    right, logits = expected(model, x), model(x)
    with torch.no_grad(), capture(model) as captured:
        copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert torch.equal(copied(x), logits)
        assert not torch.is_grad_enabled()
        assert same(captured.maps(model(x), 1), right)
    with torch.no_grad():
        assert torch.equal(copied(x), logits)
        assert not torch.is_grad_enabled()
    assert same(explain(copied, x, 1), right)


def test_a_thousand_explanations_leave_nothing_behind() -> None:
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head), torch.rand(1, 3, 4, 4)
    cam = DifferenceCAM(model)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor | nn.Module) for one in gc.get_objects())

    cam.maps(x)
    before, count = state(model), alive()
    for turn in range(1000):
        model.train(turn % 2 == 0)
        cam.maps(x)
    assert state(model.train()) == before
    assert alive() == count


@MODES
def test_what_a_forward_pass_assigns_to_itself_is_kept(training: bool) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.runs, self.features = net(), 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            self.features = self.inner[:5](x)
            return self.inner[5:](self.features)

    model, x = Counts().train(training), images()
    find_target_layer(model)
    model.runs = 0
    for turn in range(3):
        explain(model, x, 1)
        assert model.runs == turn + 1
        assert model.features.shape == (2, 4, 8, 8)
    assert model.training == training
