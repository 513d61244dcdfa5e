"""An audit's numbers against its rows, its words against the evidence, and what goes wrong."""

import pytest

from diffsal.auditing.findings import _occlusion
from diffsal.auditing.rows import Measured
from diffsal.auditing.summary import compare


def test_only_images_that_both_models_could_be_measured_on_are_compared():
    def measured(**correct):
        return Measured(
            rows=[{"path": k, "predicted": "a", "correct": v} for k, v in correct.items()]
        )

    accuracy = compare(measured(x=1, y=0, z=1), measured(y=1, z=1, w=0))["numbers"][0]
    assert {who: (one["mean"], one["n"]) for who, one in accuracy.items()} == {
        "model": (0.5, 2),
        "reference": (1, 2),
        "difference": (-0.5, 2),
    }


@pytest.mark.parametrize(
    ("low", "high", "words", "other"),
    [
        (0.1, 0.3, "The more the difference map marks a cell, the more", "is the more faithful"),
        (-0.1, 0.3, "No relation was found", "no difference between the two was found"),
        (-0.3, -0.1, "raises the margin, against what it claims", "the class map is the more"),
        (None, None, "No relation was found", "no difference between the two was found"),
    ],
)
def test_words_follow_the_interval(low, high, words, other, monkeypatch):
    number = {"mean": 0.0, "low": low, "high": high, "n": 9}
    monkeypatch.setattr(Measured, "number", lambda *_, **__: number)
    says = _occlusion(Measured(rows=[]))["says"]
    assert words in says
    assert other in says
