"""A user's thresholds: what they say is done, and nothing else."""

from xml.etree import ElementTree

import pytest

from diffsal.auditing.thresholds import failures, junit, parse_threshold

AUDIT = {
    "findings": [
        {
            "numbers": [
                {"name": "skill", "mean": 0.2},
                {"name": "skill", "mean": 0.9, "class": "ill"},
                {"name": "iou_true - iou_difference", "mean": None},
            ]
        }
    ]
}


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("skill < 0.3", True),
        ("skill<0.2", False),
        ("skill <= 0.2", True),
        ("skill > 0.1", True),
        ("skill >= 2e-1", True),
        ("skill > 0.2", False),
        ("iou_true - iou_difference < -1", True),
    ],
)
def test_a_threshold_is_of_the_mean_over_all_images(text, fails):
    threshold = parse_threshold(text)
    failed = failures([threshold], AUDIT)
    assert bool(failed) == fails
    suite = ElementTree.fromstring(junit([threshold], failed))
    assert suite.get("failures") == str(int(fails))
    (case,) = suite
    assert [child.get("message") for child in case] == list(failed.values())
    assert case.get("name") == f"not {threshold}"


@pytest.mark.parametrize(
    "text", ["skill", "skill = 1", "< 1", "skill < much", "a < nan", "a < 1 <"]
)
def test_other_forms_are_refused(text, refused):
    with refused("is no threshold: write one as 'composite_skill < 0.1'"):
        parse_threshold(text)


def test_an_unknown_name_is_told(refused):
    with refused("has no number 'skil'; it has iou_true - iou_difference, skill"):
        failures([parse_threshold("skil < 1")], AUDIT)
