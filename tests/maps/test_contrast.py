"""The two scores of every kind of output, against the table and the equations of the design."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsal.maps.contrast import NO_CLASS, class_count, contrast, predicted_class, probabilities

Refused = Callable[[str], AbstractContextManager[None]]

TWO = torch.tensor([[1.0, 3.0], [0.5, -2.0], [4.0, 4.5]], dtype=torch.float64)
ONE = torch.tensor([[2.0], [-3.0], [0.5]], dtype=torch.float64)
FOUR = torch.tensor(
    [[1.0, 3.0, -1.0, 2.0], [0.5, -2.0, 0.0, 0.25], [4.0, 4.5, 4.25, -9.0]], dtype=torch.float64
)


def second(row: Tensor) -> Tensor:
    return row[1]


def doubled_first(row: Tensor) -> Tensor:
    return 2 * row[0]


def picked(logits: Tensor, classes: Sequence[int]) -> list[float]:
    return [row[index].item() for row, index in zip(logits, classes, strict=True)]


# --- the table --------------------------------------------------------------------------------


def test_two_logits() -> None:
    scores = contrast(TWO, torch.tensor([0, 1, 1]))
    assert scores.true_score.tolist() == [1.0, -2.0, 4.5]
    assert scores.false_score.tolist() == [3.0, 0.5, 4.0]
    assert scores.true_class.tolist() == [0, 1, 1]
    assert scores.false_class.tolist() == [1, 0, 0]
    assert scores.true_class.dtype == scores.false_class.dtype == torch.int64
    assert scores.true_from == "label"


@pytest.mark.parametrize("logits", [ONE, ONE[:, 0]])
def test_one_logit(logits: Tensor) -> None:
    scores = contrast(logits, torch.tensor([1, 1, 0]))
    assert scores.true_score.tolist() == [1.0, -1.5, -0.25]
    assert scores.false_score.tolist() == [-1.0, 1.5, 0.25]
    assert scores.false_class.tolist() == [0, 0, 1]
    log_odds = torch.logit(probabilities(ONE)[range(3), [1, 1, 0]])
    torch.testing.assert_close(scores.true_score - scores.false_score, log_odds)


@pytest.mark.parametrize(
    ("true", "false", "expected"),
    [
        ([1, 0, 3], [0, 3, 2], [0, 3, 2]),
        ([1, 0, 3], 2, [2, 2, 2]),
        ([1, 0, 3], "runner-up", [3, 3, 1]),
        ([0, 1, 2], "runner-up", [1, 0, 1]),
        ([0, 1, 2], None, [1, 0, 1]),
        (3, None, [1, 0, 1]),
    ],
)
def test_many_logits_against_a_class(
    true: int | list[int], false: int | str | list[int] | None, expected: list[int]
) -> None:
    scores = contrast(FOUR, true, false)
    labels = [true] * 3 if isinstance(true, int) else true
    assert scores.true_class.tolist() == labels
    assert scores.false_class.tolist() == expected
    assert scores.true_score.tolist() == picked(FOUR, labels)
    assert scores.false_score.tolist() == picked(FOUR, expected)


@pytest.mark.parametrize(
    ("logits", "expected"), [(ONE, [1, 0, 1]), (TWO, [1, 0, 1]), (FOUR, [1, 0, 1])]
)
def test_without_a_label_the_prediction_is_true(logits: Tensor, expected: list[int]) -> None:
    scores = contrast(logits)
    assert scores.true_class.tolist() == predicted_class(logits).tolist() == expected
    assert (scores.true_score >= scores.false_score).all()
    assert scores.true_from == "prediction"


def test_one_logit_of_zero_is_the_negative_class() -> None:
    """As many thresholds have it: p > 0.5."""
    assert predicted_class(torch.zeros(1, 1)).tolist() == [0]


# --- the rest ---------------------------------------------------------------------------------


def test_the_rest_is_the_mean_of_the_others_weighted_by_their_softmax() -> None:
    labels = [1, 3, 0]
    scores = contrast(FOUR, labels, "rest")
    for row, label, score in zip(FOUR.numpy(), labels, scores.false_score, strict=True):
        others = np.delete(row, label)
        weights = np.exp(others) / np.exp(others).sum()
        assert score.item() == pytest.approx(weights @ others, rel=1e-14)
    assert scores.false_class.tolist() == [NO_CLASS] * 3


def test_the_gradient_against_the_rest_is_that_of_the_log_odds() -> None:
    labels = [1, 3, 0]
    logits = FOUR.clone().requires_grad_()
    scores = contrast(logits, labels, "rest")
    (actual,) = torch.autograd.grad((scores.true_score - scores.false_score).sum(), logits)

    p = logits.softmax(1)[range(3), labels]
    (expected,) = torch.autograd.grad(torch.logit(p).sum(), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    def log_odds(values: np.ndarray) -> float:
        odds = np.exp(values)
        return float(np.log(odds[1] / (odds.sum() - odds[1])))

    step = 1e-6 * np.eye(4)
    row = FOUR[0].numpy()
    numeric = [(log_odds(row + one) - log_odds(row - one)) / 2e-6 for one in step]
    np.testing.assert_allclose(actual[0], numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("logits", [ONE, TWO])
@pytest.mark.parametrize("false", ["rest", "runner-up"])
def test_of_two_classes_the_rest_is_the_other(logits: Tensor, false: str) -> None:
    logits = logits.clone().requires_grad_()
    labels = torch.tensor([0, 1, 1])
    one, other = contrast(logits, labels, false), contrast(logits, labels)
    assert torch.equal(one.false_score, other.false_score)
    assert torch.equal(one.true_score, other.true_score)
    gradients = [torch.autograd.grad(s.false_score.sum(), logits)[0] for s in (one, other)]
    assert torch.equal(*gradients)


def test_the_rest_of_a_callable_is_the_mean_of_all() -> None:
    scores = contrast(FOUR, second, "rest")
    torch.testing.assert_close(scores.false_score, (FOUR.softmax(1) * FOUR).sum(1))


def test_the_rest_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[9e4, -9e4, 5e4], [-1e30, 1e30, 0.0]])
    assert contrast(logits, 0, "rest").false_score.tolist() == [5e4, pytest.approx(1e30)]


# --- callables --------------------------------------------------------------------------------


def test_callables_get_one_samples_logits() -> None:
    scores = contrast(FOUR, second, [doubled_first, second, second])
    assert scores.true_score.tolist() == FOUR[:, 1].tolist()
    assert scores.false_score.tolist() == [2.0, -2.0, 4.5]
    assert scores.true_class.tolist() == scores.false_class.tolist() == [NO_CLASS] * 3
    assert scores.true_from == "score"


@pytest.mark.parametrize("logits", [ONE, ONE[:, 0]])
def test_callables_on_one_logit(logits: Tensor) -> None:
    scores = contrast(logits, doubled_first, lambda row: -row)
    assert scores.true_score.tolist() == [4.0, -6.0, 1.0]
    assert scores.false_score.tolist() == [-2.0, 3.0, -0.5]


def test_a_label_against_a_callable() -> None:
    scores = contrast(FOUR, [1, 0, 2], doubled_first)
    assert scores.true_class.tolist() == [1, 0, 2]
    assert scores.false_class.tolist() == [NO_CLASS] * 3
    assert scores.false_score.tolist() == [2.0, 1.0, 8.0]
    assert scores.true_from == "label"


def test_a_callable_against_a_class() -> None:
    scores = contrast(FOUR, second, 3)
    assert scores.false_class.tolist() == [3, 3, 3]
    assert scores.false_score.tolist() == FOUR[:, 3].tolist()


def test_scores_stay_in_the_graph() -> None:
    logits = FOUR.clone().requires_grad_()
    for true, false in ((1, 0), (None, None), (1, "rest"), (second, doubled_first)):
        scores = contrast(logits, true, false)
        assert scores.true_score.requires_grad
        assert scores.false_score.requires_grad


# --- what labels may be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0, 2],
        (1, 0, 2),
        np.array([1, 0, 2]),
        np.array([1, 0, 2], dtype=np.uint8),
        torch.tensor([1, 0, 2]),
        torch.tensor([1, 0, 2], dtype=torch.int32),
        [torch.tensor(1), torch.tensor(0), torch.tensor(2)],
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_labels_in_any_integer_form(labels: object) -> None:
    assert contrast(FOUR, labels).true_class.tolist() == [1, 0, 2]
    assert contrast(FOUR, 3, labels).false_class.tolist() == [1, 0, 2]


@pytest.mark.parametrize("label", [1, np.int64(1), torch.tensor(1)])
def test_one_label_for_all(label: object) -> None:
    assert contrast(FOUR, label).true_class.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_keep_the_precision_of_the_logits(dtype: torch.dtype) -> None:
    for false in (None, "rest"):
        scores = contrast(FOUR.to(dtype), 1, false)
        assert scores.true_score.dtype == scores.false_score.dtype == dtype


@pytest.mark.parametrize("false", [None, "runner-up", "rest", 2])
def test_a_batch_of_none(false: str | int | None) -> None:
    assert contrast(FOUR[:0], torch.zeros(0, dtype=torch.int64), false).true_score.shape == (0,)
    assert contrast(FOUR[:0], None, "rest").false_score.shape == (0,)


# --- probabilities ----------------------------------------------------------------------------


def test_probabilities() -> None:
    np.testing.assert_allclose(probabilities(ONE)[:, 1], 1 / (1 + np.exp(-ONE[:, 0].numpy())))
    odds = np.exp(FOUR.numpy())
    np.testing.assert_allclose(probabilities(FOUR), odds / odds.sum(1, keepdims=True))
    for logits in (ONE, TWO, FOUR):
        result = probabilities(logits)
        assert result.shape == (3, class_count(logits))
        torch.testing.assert_close(result.sum(1), torch.ones(3, dtype=torch.float64))
        if logits is not FOUR:
            assert torch.equal(result.argmax(1), predicted_class(logits))


def test_one_logit_has_the_probabilities_of_the_two_logits_that_it_stands_for() -> None:
    pair = torch.cat([-ONE / 2, ONE / 2], dim=1)
    torch.testing.assert_close(probabilities(ONE), probabilities(pair))


def test_probabilities_of_far_logits_keep_their_precision() -> None:
    far = probabilities(torch.tensor([[50.0], [-50.0]]))
    small = torch.tensor(np.exp(-50), dtype=torch.float32)
    torch.testing.assert_close(
        torch.stack([far[0, 0], far[1, 1]]), small.expand(2), atol=0, rtol=1e-5
    )


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ((FOUR,), "is a tuple, not a tensor of logits"),
        ({"logits": FOUR}, "is a dict, not a tensor"),
        (FOUR[:, :, None, None], r"shape \(3, 4, 1, 1\)"),
        (FOUR[:, :0], r"shape \(3, 0\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.zeros(3, 2, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 2, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=["tuple", "dict", "maps", "no class", "scalar", "integers", "complex"],
)
def test_outputs_that_cannot_be_contrasted(refused: Refused, logits: object, message: str) -> None:
    with refused(message):
        contrast(logits)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (4, "names class 4, but the model tells 4 classes apart: pass 0 to 3"),
        (-1, "names class -1"),
        ([0, 1, 9], "names class 9"),
        ([0, 1], r"shape \(2,\) for a batch of 3"),
        ([[0], [1], [2]], r"shape \(3, 1\)"),
        (True, "torch.bool"),
        ([0.0, 1.0, 2.0], "torch.float32: pass class indices as integers"),
        (2**70, "not a class"),
        ([0, None, 1], "not a class"),
        (object(), "not a class"),
        (np.array(["melanoma", "nevus"] * 20), "not a class"),
        ([second], "1 .* for a batch of 3"),
        ([second] * 4, "4 .* for a batch of 3"),
        ([second, 0, 1], "one callable for all, or one for each sample"),
        (lambda row: row, "does not return a single number"),
        (lambda row: row[0].item(), "does not return a single number"),
    ],
)
@pytest.mark.parametrize("side", ["true", "false"])
def test_choices_that_name_no_score(
    refused: Refused, side: str, choice: object, message: str
) -> None:
    arguments = {"true": 1, "false": 0} | {side: choice}
    with refused(f"{side}.*{message}"):
        contrast(FOUR, **arguments)


@pytest.mark.parametrize("logits", [ONE, TWO])
def test_of_two_classes_there_is_no_third(refused: Refused, logits: Tensor) -> None:
    with refused("names class 2, but the model tells 2 classes apart: pass 0 to 1"):
        contrast(logits, 2)


def test_words_that_are_no_choice(refused: Refused) -> None:
    with refused("false='others' is unknown: pass a class, 'runner-up' or 'rest'"):
        contrast(FOUR, 0, "others")
    for word in ("rest", "nevus"):
        with refused(f"true= .*'{word}'.* not a class"):
            contrast(FOUR, word)


@pytest.mark.parametrize("false", [None, "runner-up"])
def test_a_callable_has_no_opposite(refused: Refused, false: str | None) -> None:
    with refused("a callable target has no opposite: name false="):
        contrast(FOUR, second, false)


@pytest.mark.parametrize(("true", "false"), [(1, 1), ([0, 1, 2], [1, 1, 0]), (None, 1)])
def test_the_false_class_must_be_another(refused: Refused, true: object, false: object) -> None:
    with refused("the false class is the true class"):
        contrast(FOUR, true, false)
