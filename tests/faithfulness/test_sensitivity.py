"""Max-Sensitivity against a plain loop in float64, where it is zero, and where it is undefined."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffsal.faithfulness.sensitivity import max_sensitivity

RADIUS = (0.2, 0.1, 0.3)


class BagOfFeatures(nn.Module):
    """Linear: a cell of the difference map is a weighted sum of its own pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 4, 4, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def images(count=3):
    return torch.rand(count, 3, 12, 8, generator=torch.Generator().manual_seed(1))


def by_hand(model, inputs, draws, steady, seed):
    """Map and margin from the weights alone, one image and one change at a time."""
    row = (model.fc.weight[1] - model.fc.weight[0]).detach().double()
    kernel = torch.einsum("c,cijk->ijk", row, model.features.weight.detach().double())[None]
    offset = row @ model.features.bias.detach().double()
    bias = (model.fc.bias[1] - model.fc.bias[0]).item()

    def look(image):
        cells = F.conv2d(image[None], kernel, stride=4) + offset
        map_ = cells / cells.numel()
        return map_, map_.sum().item() + bias

    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand((draws, *inputs.shape[1:]), generator=generator, dtype=torch.float64)
    largest, counted = [], []
    for image in inputs.double():
        map_, margin = look(image)
        ratios = []
        for one in unit:
            delta = torch.stack([(2 * one[c] - 1) * RADIUS[c] for c in range(3)])
            changed, score = look(image + delta)
            if abs(score - margin) <= steady * abs(margin):
                ratios.append(((changed - map_).norm() / map_.norm()).item())
        largest.append(max(ratios, default=float("nan")))
        counted.append(len(ratios) / draws)
    return largest, counted


@pytest.mark.parametrize("steady", [0.004, 0.02, 1.0])
def test_a_plain_loop_gives_the_same(steady):
    model, inputs = BagOfFeatures(), images()
    found = max_sensitivity(
        model, inputs, 1, radius=RADIUS, draws=7, steady=steady, batch_size=5, seed=3
    )
    largest, counted = by_hand(model, inputs, draws=7, steady=steady, seed=3)
    assert found.counted.tolist() == pytest.approx(counted)
    assert found.largest.tolist() == pytest.approx(largest, rel=1e-4, nan_ok=True)
    if steady == 0.02:
        assert 0 < found.counted.mean() < 1


def test_features_that_see_nothing_are_not_sensitive():
    model = BagOfFeatures()
    nn.init.zeros_(model.features.weight)
    found = max_sensitivity(model, images(), radius=0.5)
    assert found.largest.tolist() == [0, 0, 0]
    assert found.counted.tolist() == [1, 1, 1]


def test_a_map_of_zeros_has_no_sensitivity():
    model = BagOfFeatures()
    nn.init.zeros_(model.fc.weight)
    assert max_sensitivity(model, images(), radius=0.5).largest.isnan().all()


def test_a_margin_that_never_stays_leaves_nothing():
    found = max_sensitivity(BagOfFeatures(), images(), radius=0.5, steady=0)
    assert found.largest.isnan().all()
    assert found.counted.tolist() == [0, 0, 0]


def test_a_larger_ball_is_worse_and_linear_models_change_in_proportion():
    model = BagOfFeatures()
    small, large = (
        max_sensitivity(model, images(), radius=radius, steady=1e9).largest for radius in (0.1, 0.3)
    )
    torch.testing.assert_close(large, 3 * small, rtol=1e-4, atol=0)


def test_classes_are_settled_on_the_untouched_image():
    class Turning(BagOfFeatures):
        """Decides for 1 where an image is as it was, for 0 where it is brighter."""

        def forward(self, images):
            bright = (images.mean((1, 2, 3)) > 0.55)[:, None]
            logits = super().forward(images)
            return torch.where(bright, logits + torch.tensor([9.0, 0.0]), logits)

    model, inputs = Turning(), torch.full((1, 3, 12, 8), 0.549)
    chosen = model(inputs).argmax(1)
    options = {"radius": 0.2, "steady": 1e9, "draws": 6}
    open_, named = (
        max_sensitivity(model, inputs, true, **options).largest for true in (None, chosen)
    )
    torch.testing.assert_close(open_, named)


@pytest.mark.parametrize("options", [{"draws": 0}, {"steady": -1}, {"radius": -1}])
def test_what_changes_nothing_is_refused(options, refused):
    with refused("pass one draw or more"):
        max_sensitivity(BagOfFeatures(), images(), **{"radius": 0.1} | options)


def test_integers_are_refused(refused):
    with refused("pass floating-point images"):
        max_sensitivity(BagOfFeatures(), images().byte(), radius=1)
