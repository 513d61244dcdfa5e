"""AUROC from stored logits."""

import numpy as np
import pytest
from scipy import stats

from diffsal.protocol.scores import aurocs

METHODS = ("cross-entropy", "baseline", "contrast", "contrast-alpha-0.5")
SUBSETS = ("a", "b", "c")
MEASURES = (
    *("pointing_true", "pointing_difference", "energy_true", "energy_difference"),
    *("marked_share", "common_mode_share"),
)


def columns(generator, count, names):
    return {
        name: [
            None if generator.random() < 0.2 else float(generator.random()) for _ in range(count)
        ]
        for name in names
    }


def job(method, subset, seed, count=24, logits=2):
    generator = np.random.default_rng([METHODS.index(method), SUBSETS.index(subset), seed])
    labels = [position % 2 for position in range(count)]
    scores = (
        generator.normal(size=(count, logits)) + np.array(labels)[:, None] * [-0.3, 0.8][-logits:]
    )
    return {
        "task": "t",
        "method": method,
        "subset": subset,
        "seed": seed,
        "samples": {
            "path": [f"{position}.png" for position in range(count)],
            "label": labels,
            "subset": [subset if label else "" for label in labels],
        },
        "models": {method: {"logits": scores.tolist(), **columns(generator, count, MEASURES)}},
    }


def area(labels, scores):
    """AUROC by another road: the probability that a positive ranks above a negative."""
    labels, scores = np.array(labels), np.array(scores, np.float64)
    statistic = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    return statistic / (labels.sum() * (1 - labels).sum())


def margin_of(one, name=None):
    logits = np.array(one["models"][name or one["method"]]["logits"])
    return logits[:, 1] - logits[:, 0]


@pytest.mark.parametrize("score", ["margin", "softmax", "logit-1"])
@pytest.mark.parametrize("logits", [1, 2])
def test_scores(score, logits):
    one = job("baseline", "a", 0, logits=logits)
    values = np.array(one["models"]["baseline"]["logits"])
    ranked = {
        "margin": values[:, -1] - (values[:, 0] if logits == 2 else 0),
        "softmax": 1 / (1 + np.exp(-(values[:, -1] - (values[:, 0] if logits == 2 else 0)))),
        "logit-1": 1 / (1 + np.exp(-values[:, -1])),  # the CYBORG script's sigmoid
    }
    found = aurocs([one], score)["t"]["baseline"]["a"][0]
    assert found == pytest.approx(area(one["samples"]["label"], ranked[score]))


def test_noise_common_to_both_logits_ruins_logit_1_and_not_the_margin():
    one = job("baseline", "a", 0, count=400)
    logits = np.array(one["models"]["baseline"]["logits"])
    noise = np.random.default_rng(0).normal(scale=50, size=(len(logits), 1))
    noisy = {**one, "models": {"baseline": {"logits": (logits + noise).tolist()}}}
    clean, ruined = (aurocs([each], "margin")["t"]["baseline"]["a"][0] for each in (one, noisy))
    assert clean == ruined
    assert aurocs([noisy], "logit-1")["t"]["baseline"]["a"][0] < clean - 0.1


def test_in_set_jobs_test_each_subset_against_the_same_normals():
    one = job("baseline", "a", 0)
    labels = np.array(one["samples"]["label"])
    subsets = ["" if not y else "ab"[position % 4 // 2] for position, y in enumerate(labels)]
    one = {**one, "subset": "", "samples": {**one["samples"], "subset": subsets}}
    found = aurocs([one])["t"]["baseline"]
    for name in "ab":
        chosen = [subset in ("", name) for subset in subsets]
        expected = area(labels[chosen], margin_of(one)[chosen])
        assert found[name][0] == pytest.approx(expected)
    without = {**one, "samples": {**one["samples"], "subset": [""] * len(labels)}}
    assert list(aurocs([without])["t"]["baseline"]) == ["in set"]


def test_a_subset_that_is_tested_against_nothing_is_refused(refused):
    one = job("baseline", "a", 0)
    samples = {**one["samples"], "subset": ["b" if y else "a" for y in one["samples"]["label"]]}
    with refused("all of one class"):
        aurocs([{**one, "subset": "", "samples": samples}])
