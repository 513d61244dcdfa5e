"""Outputs that are probabilities are never read as logits."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffsal.errors import DiffsalError
from diffsal.maps.difference_cam import DifferenceCAM
from diffsal.maps.outputs import output_logits, recording_squashes, scores_of_output
from diffsal.maps.salience import capture, explain


class Net(nn.Module):
    """Logits of (B, outputs), and what ``end`` makes of them."""

    def __init__(self, outputs: int, end=None, bias: float = 0.0) -> None:
        super().__init__()
        self.features, self.fc = nn.Conv2d(3, 4, 3, 2), nn.Linear(4, outputs)
        nn.init.constant_(self.fc.bias, bias)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.features(x).mean((2, 3)))
        return logits if self.end is None else self.end(logits)


def pair(outputs: int, end, bias: float = 0.0) -> tuple[Net, Net]:
    """The same weights with and without the end."""
    torch.manual_seed(0)
    bare = Net(outputs, bias=bias).double().eval()
    ended = Net(outputs, end).double().eval()
    ended.load_state_dict(bare.state_dict(), strict=False)
    return bare, ended


IMAGES = torch.rand(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RECORDED = {
    "sigmoid, module": (1, nn.Sigmoid()),
    "sigmoid, function": (1, torch.sigmoid),
    "sigmoid, method": (1, lambda z: z.sigmoid()),
    "sigmoid, squeezed": (1, lambda z: torch.sigmoid(z).squeeze(1)),
    "softmax, module": (2, nn.Softmax(dim=1)),
    "softmax, function": (3, lambda z: F.softmax(z, dim=1)),
    "log-softmax": (2, nn.LogSoftmax(dim=1)),
    "independent sigmoids": (3, nn.Sigmoid()),
}


@pytest.mark.parametrize("case", RECORDED)
@pytest.mark.parametrize("bias", [0.0, -4.0, 30.0])
def test_maps_are_those_of_the_logits_before(case: str, bias: float) -> None:
    outputs, end = RECORDED[case]
    bare, ended = pair(outputs, end, bias if outputs == 1 else 0.0)
    expected, maps = explain(bare, IMAGES), explain(ended, IMAGES)
    for name in ("true", "false", "logits", "margin", "residual"):
        torch.testing.assert_close(getattr(maps, name), getattr(expected, name))
    assert torch.equal(maps.true_class, expected.true_class)
    assert maps.squash == case.partition(",")[0].removeprefix("independent ").removesuffix("s")
    assert expected.squash is None


@pytest.mark.parametrize("case", RECORDED)
def test_the_second_run_is_read_like_the_first(case: str) -> None:
    """What is remembered of a model spares work, and changes nothing."""
    outputs, end = RECORDED[case]
    _, ended = pair(outputs, end)
    with DifferenceCAM(ended, example=IMAGES) as cam:
        first, second = cam.maps(IMAGES), cam.maps(IMAGES)
    assert first.squash == second.squash
    assert torch.equal(first.difference, second.difference)


def test_a_confident_no_is_a_no() -> None:
    """p = 0.018: class 0, with the evidence against class 1 on the map."""
    bare, ended = pair(1, nn.Sigmoid(), bias=-4.0)
    maps = explain(ended, IMAGES)
    assert maps.true_class.tolist() == [0] * 5
    torch.testing.assert_close(maps.probabilities[:, 1], ended(IMAGES)[:, 0].detach())
    torch.testing.assert_close(maps.difference, -explain(bare, IMAGES, true=1).difference)


def test_independent_outputs_keep_their_own_probabilities() -> None:
    _, ended = pair(3, nn.Sigmoid())
    torch.testing.assert_close(explain(ended, IMAGES).probabilities, ended(IMAGES).detach())


UNRECORDED = {
    "written out": (2, lambda z: z.exp() / z.exp().sum(1, keepdim=True), "softmax"),
    "both classes of one": (1, lambda z: torch.cat([1 - z.sigmoid(), z.sigmoid()], 1), "softmax"),
    "mean of two softmaxes": (2, lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2, "softmax"),
    "clamped": (1, lambda z: z.sigmoid().clamp(0.001, 0.999), "sigmoid"),
    "half a tanh": (1, lambda z: (1 + torch.tanh(z / 2)) / 2, "sigmoid"),
}


@pytest.mark.parametrize("case", UNRECORDED)
def test_probabilities_made_otherwise_are_known_from_graph_and_values(case: str) -> None:
    outputs, end, squash = UNRECORDED[case]
    _, ended = pair(outputs, end)
    maps = explain(ended, IMAGES)
    assert maps.squash == squash
    shares = ended(IMAGES).detach()
    expected = shares if shares.shape[1] > 1 else torch.cat([1 - shares, shares], 1)
    torch.testing.assert_close(maps.probabilities, expected)
    log_odds = (expected[:, 1] / expected[:, 0]).log()
    torch.testing.assert_close(explain(ended, IMAGES, true=1).margin, log_odds)


LOGITS = {
    "a linear layer": lambda z: z,
    "within 0 and 1 by chance": lambda z: z * 1e-3 + 0.4,
    "scaled sigmoid": lambda z: 10 * z.sigmoid(),
    "gated features": lambda z: z * z.sigmoid(),
    "clamped logits": lambda z: z.abs().clamp(0, 1),
}


@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_logits_stay_logits(case: str, outputs: int) -> None:
    _, ended = pair(outputs, LOGITS[case])
    maps = explain(ended, IMAGES)
    assert maps.squash is None
    torch.testing.assert_close(maps.logits, ended(IMAGES).detach())


def test_a_model_that_squashes_in_evaluation_alone() -> None:
    class Switching(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits if self.training else logits.softmax(1)

    torch.manual_seed(0)
    model = Switching(2).double()
    with capture(model.train(), example=IMAGES) as captured:
        assert captured.maps(model(IMAGES)).squash is None
    assert explain(model, IMAGES).squash == "softmax"
    with capture(model.train(), example=IMAGES) as captured:
        assert captured.maps(model(IMAGES)).squash is None


def test_the_user_s_word_goes_before() -> None:
    _, ended = pair(2, nn.Softmax(dim=1))
    assert explain(ended, IMAGES, outputs="logits").squash is None
    bare, _ = pair(2, None)
    with pytest.raises(DiffsalError, match="not all within 0 and 1"):
        explain(bare, IMAGES * 100, outputs="probabilities")
    with pytest.raises(DiffsalError, match="'percent' is unknown"):
        explain(bare, IMAGES, outputs="percent")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-60, 60), min_size=2, max_size=5), st.sampled_from(["float32", "float64"])
)
def test_whatever_the_logits_they_come_back(values: list[float], dtype: str) -> None:
    logits = torch.tensor([values], dtype=getattr(torch, dtype), requires_grad=True)
    with recording_squashes() as squashes:
        found = [scores_of_output(F.softmax(logits, 1), squashes)]
        found.append(scores_of_output(torch.sigmoid(logits), squashes))
    assert all(torch.equal(one.logits, logits) for one in found)


Result = namedtuple("Result", "logits aux")


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 3, 1, 1),
        Result(torch.zeros(2, 3), torch.zeros(2, 3)),
        SimpleNamespace(logits=torch.zeros(2, 3)),
        {"logits": torch.zeros(2, 3), "embedding": torch.zeros(2, 8)},
        {"out": torch.zeros(2, 3), "features": torch.zeros(2, 8, 4, 4)},
        (torch.zeros(2, 3), torch.zeros(2, 8, 4, 4)),
        [torch.zeros(2, 3)],
    ],
)
def test_logits_are_found_in_what_a_model_returns(output: object) -> None:
    assert output_logits(output).shape == (2, 3)


@pytest.mark.parametrize(
    "output",
    [
        (torch.zeros(2, 512), torch.zeros(2, 3)),
        {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)},
        (torch.zeros(2, 8, 4, 4),),
    ],
)
def test_what_could_be_several_things_is_refused(output: object) -> None:
    with pytest.raises(DiffsalError, match="wrap it in a module"):
        output_logits(output)
