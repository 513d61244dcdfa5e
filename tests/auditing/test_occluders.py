"""Whether a finding depends on the occluder, in words."""

import pytest

from diffsal.auditing.occluders import occluders_in_words
from diffsal.auditing.rows import Measured


@pytest.mark.parametrize(
    ("mean", "transplant", "words"),
    [
        (0.5, -0.5, "What is found depends on the occluder: mean colour against pixels"),
        (0.5, 0.0, "What is found depends on the occluder"),
        (0.2, 0.6, "How much is found depends on the occluder: pixels of another class against"),
        (0.5, 0.5, "That it depends on the occluder was not found"),
    ],
)
def test_words_follow_the_intervals(mean, transplant, words):
    rows = [
        {
            "occlusion_difference": mean + step / 100,
            "transplant_difference": transplant - step / 100,
        }
        for step in range(-4, 5)
    ]
    says, numbers = occluders_in_words(Measured(rows=rows))
    assert words in says
    assert numbers[-1]["n"] == 9


def test_one_occluder_says_nothing():
    rows = [{"occlusion_difference": step / 100} for step in range(9)]
    assert occluders_in_words(Measured(rows=rows)) == ("", [])
