"""AUROC of each score, against a count of pairs."""

import numpy as np
import pytest
from scipy import stats

from diffsal.protocol.scores import aurocs


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
def test_scores(score, logits, make_job):
    one = make_job("baseline", "a", 0, logits=logits)
    values = np.array(one["models"]["baseline"]["logits"])
    ranked = {
        "margin": values[:, -1] - (values[:, 0] if logits == 2 else 0),
        "softmax": 1 / (1 + np.exp(-(values[:, -1] - (values[:, 0] if logits == 2 else 0)))),
        "logit-1": 1 / (1 + np.exp(-values[:, -1])),  # the CYBORG script's sigmoid
    }
    found = aurocs([one], score)["t"]["baseline"]["a"][0]
    assert found == pytest.approx(area(one["samples"]["label"], ranked[score]))


def test_noise_common_to_both_logits_ruins_logit_1_and_not_the_margin(make_job):
    one = make_job("baseline", "a", 0, count=400)
    logits = np.array(one["models"]["baseline"]["logits"])
    noise = np.random.default_rng(0).normal(scale=50, size=(len(logits), 1))
    noisy = {**one, "models": {"baseline": {"logits": (logits + noise).tolist()}}}
    clean, ruined = (aurocs([each], "margin")["t"]["baseline"]["a"][0] for each in (one, noisy))
    assert clean == ruined
    assert aurocs([noisy], "logit-1")["t"]["baseline"]["a"][0] < clean - 0.1


def test_in_set_jobs_test_each_subset_against_the_same_normals(make_job):
    one = make_job("baseline", "a", 0)
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


def test_a_subset_that_is_tested_against_nothing_is_refused(refused, make_job):
    one = make_job("baseline", "a", 0)
    samples = {**one["samples"], "subset": ["b" if y else "a" for y in one["samples"]["label"]]}
    with refused("all of one class"):
        aurocs([{**one, "subset": "", "samples": samples}])
