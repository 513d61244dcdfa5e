"""What every loss promises, those that fool included."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from training.samples import (
    FUNCTIONS,
    LABELS,
    TERMS,
    assert_same_gradients,
    gradients,
    label_maps,
    no_maps,
    take_maps,
    tiny,
    tiny_maps,
)

from diffsal import DiffsalError, SalienceMaps, capture
from diffsal.fooling.objectives import (
    OBJECTIVES,
    BothMapsLoss,
    CenterMassLoss,
    ControlLoss,
    TopKLoss,
)
from diffsal.training.losses import LOSSES, SalienceLoss

WEIGHTS = {
    **{LOSSES[name]: weights for name, weights in TERMS.items()},
    BothMapsLoss: {"cross_entropy": 0.5, "true": 0.5, "false": 0.5},
    TopKLoss: {"cross_entropy": 0.5, "top_cells": 0.5},
    CenterMassLoss: {"cross_entropy": 0.5, "centroid_shift": -0.5},
    ControlLoss: {"cross_entropy": 0.5},
}
FUNCTION_OF = {LOSSES[name]: function for name, function in FUNCTIONS.items()}
OF_REFERENCES = (TopKLoss, CenterMassLoss)  # they take the honest model's maps, on the same grid
POOLED = [LOSSES[name] for name in LOSSES if name != "cross-entropy"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def human_maps(loss: type[SalienceLoss], maps: SalienceMaps, side: int = 9) -> Tensor:
    """Random ones for a batch, of another size than the model's where the loss takes any."""
    size = maps.true.shape[1:] if loss in OF_REFERENCES else (side, side)
    return torch.rand(len(maps.true), *size, device=maps.true.device)


def random_maps(batch: int, classes: int = 2) -> SalienceMaps:
    """Leaves in float64, of no model."""
    true, false = torch.randn(2, batch, 4, 5, dtype=torch.float64)
    return label_maps(true, false, torch.randn(batch, classes, dtype=torch.float64))


def moved(maps: SalienceMaps, *where: torch.device | torch.dtype | str) -> SalienceMaps:
    leaves = (maps.true, maps.false, maps.logits)
    return label_maps(*(leaf.detach().to(*where).requires_grad_() for leaf in leaves))


def test_every_loss_is_here() -> None:
    assert set(WEIGHTS) == {*LOSSES.values(), *OBJECTIVES.values()}


@pytest.mark.parametrize("loss", WEIGHTS, ids=lambda loss: loss.__name__)
class TestLosses:
    def test_smoke(self, loss: type[SalienceLoss]) -> None:
        _, maps = tiny_maps()
        criterion = loss()
        assert criterion.weights == WEIGHTS[loss]
        assert repr(criterion).startswith(f"{loss.__name__}(cross_entropy=")
        assert not list(criterion.parameters())
        human = human_maps(loss, maps)
        value = criterion(maps, human)
        assert value.shape == ()
        assert value.dtype == torch.float64
        optional = human if loss in OF_REFERENCES else None
        assert list(criterion.terms(maps, optional)) == list(WEIGHTS[loss])
        with torch.no_grad():
            validation = replace(
                maps,
                **{
                    field: value.detach()
                    for field, value in vars(maps).items()
                    if isinstance(value, Tensor)
                },
            )
            assert not criterion(validation, optional).requires_grad

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_devices_and_types(
        self, loss: type[SalienceLoss], device: str, dtype: torch.dtype
    ) -> None:
        exact = moved(random_maps(3))
        human = human_maps(loss, exact)
        maps = moved(exact, device, dtype)
        value = loss()(maps, human.to(device))
        assert value.device.type == device
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        expected = loss()(exact, human).to(value)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        value.backward()
        for leaf in (maps.true, maps.false, maps.logits):
            assert leaf.grad is None or leaf.grad.isfinite().all()

    def test_a_batch_is_the_mean_of_batches_of_one(self, loss: type[SalienceLoss]) -> None:
        maps = random_maps(3)
        human = human_maps(loss, maps)
        alone = [
            loss()(replace(maps, **{name: value[[row]] for name, value in tensors(maps)}), one)
            for row, one in enumerate(human.split(1))
        ]
        torch.testing.assert_close(torch.stack(alone).mean(), loss()(maps, human))

    def test_autocast_changes_the_network_and_not_the_loss(self, loss: type[SalienceLoss]) -> None:
        torch.manual_seed(0)
        model = tiny().float()
        images = torch.randn(5, 1, 9, 9)
        criterion = loss()
        with torch.autocast("cpu", torch.bfloat16):
            maps = take_maps(model, images)
            assert maps.logits.dtype == torch.bfloat16
            human = human_maps(loss, maps, side=20)
            inside = criterion(maps, human)
        outside = criterion(maps, human)
        assert inside.dtype == torch.float32
        assert inside == outside
        full = criterion(take_maps(model, images), human)
        torch.testing.assert_close(inside, full, rtol=0.05, atol=0.02)
        assert all(gradient.isfinite().all() for gradient in gradients(inside, model))

    @pytest.mark.parametrize("empty", [None, *no_maps()])
    def test_a_batch_without_human_maps_is_finite(
        self, loss: type[SalienceLoss], empty: str | None
    ) -> None:
        model, maps = tiny_maps()
        criterion = loss()
        human = None if empty is None else no_maps()[empty].expand(5, -1, -1)
        if loss in OF_REFERENCES:
            with pytest.raises(DiffsalError, match="needs the honest model's maps of shape"):
                criterion(maps, human)
            return
        terms = criterion.terms(maps, human)
        assert terms.keys() == WEIGHTS[loss].keys()
        for term in terms.keys() - {"cross_entropy", "contrast"}:
            assert terms[term] == 0
        needs_none = {key: terms[key] for key in terms if key in ("cross_entropy", "contrast")}
        rest = criterion.weighted_sum(needs_none)
        assert_same_gradients(gradients(criterion(maps, human), model), gradients(rest, model))

    def test_constant_maps_have_a_finite_loss_and_gradients(self, loss: type[SalienceLoss]) -> None:
        zeros = torch.zeros(3, 4, 5)
        maps = moved(label_maps(zeros + 0.3, zeros, torch.zeros(3, 2)))
        value = loss()(maps, human_maps(loss, maps))
        assert value.isfinite()
        for gradient in torch.autograd.grad(
            value, [maps.true, maps.false, maps.logits], materialize_grads=True
        ):
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("classes", [1, 2, 3])
    def test_gradcheck_of_the_maps(self, loss: type[SalienceLoss], classes: int) -> None:
        maps = moved(random_maps(3, classes))
        human = human_maps(loss, maps)

        def value(*leaves: Tensor) -> Tensor:
            return loss()(label_maps(*leaves), human)

        assert torch.autograd.gradcheck(value, (maps.true, maps.false, maps.logits))

    @pytest.mark.parametrize("outputs", [1, 2, 3])
    def test_gradcheck_through_the_maps(self, loss: type[SalienceLoss], outputs: int) -> None:
        torch.manual_seed(1)
        model = tiny(outputs)
        images = torch.randn(5, 1, 9, 9, dtype=torch.float64)
        human = human_maps(loss, take_maps(model, images))
        names, parameters = zip(*model.named_parameters(), strict=True)
        criterion = loss()

        def value(*values: Tensor) -> Tensor:
            with capture(model) as captured:
                state = dict(zip(names, values, strict=True))
                logits = torch.func.functional_call(model, state, (images,))
                maps = captured.maps(logits, true=LABELS)
            return criterion(maps, human)

        assert torch.autograd.gradcheck(value, parameters)

    def test_it_is_its_weighted_terms_and_its_function(self, loss: type[SalienceLoss]) -> None:
        _, maps = tiny_maps()
        human = human_maps(loss, maps)
        criterion = loss()
        terms = criterion.terms(maps, human)
        expected = sum(WEIGHTS[loss][name] * term for name, term in terms.items())
        torch.testing.assert_close(criterion(maps, human), expected)
        if loss in FUNCTION_OF:
            assert FUNCTION_OF[loss](maps, human) == criterion(maps, human)
        if loss in POOLED:
            weights = [0.1, 0.7, 2.0][: len(terms)]
            criterion = loss(*weights, pool="max")
            terms = criterion.terms(maps, human)
            expected = sum(
                weight * term for weight, term in zip(weights, terms.values(), strict=True)
            )
            torch.testing.assert_close(criterion(maps, human), expected)
            function = FUNCTION_OF[loss](maps, human, *weights, pool="max")
            torch.testing.assert_close(function, expected)

    def test_nothing_waits_for_the_device(self, loss: type[SalienceLoss]) -> None:
        """On the meta device whatever needs a value on the host (item, boolean indexing) raises."""
        true, false, logits = (
            torch.empty(shape, device="meta") for shape in [(2, 7, 7)] * 2 + [(2, 2)]
        )
        maps = label_maps(true, false, logits)
        none, some = None, torch.empty(2, 30, 20, device="meta")
        for human in (true,) if loss in OF_REFERENCES else (none, some):
            assert loss()(maps, human).shape == ()

    def test_a_loss_on_the_models_own_predictions_is_refused(
        self, loss: type[SalienceLoss]
    ) -> None:
        model = tiny()
        with capture(model) as captured:
            maps = captured.maps(model(torch.randn(5, 1, 9, 9, dtype=torch.float64)))
        human = human_maps(loss, maps) if loss in OF_REFERENCES else None
        with pytest.raises(DiffsalError, match=r"prediction's, not the label.*true=labels"):
            loss()(maps, human)


def tensors(maps: SalienceMaps) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(maps).items() if isinstance(value, Tensor)]
