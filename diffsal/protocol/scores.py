"""From a job's stored logits to AUROC."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from diffsal.errors import DiffsalError
from diffsal.protocol.statistics import BySeed

Job: TypeAlias = Mapping[str, Any]
Score: TypeAlias = Literal["margin", "softmax", "logit-1"]
"""What samples are ranked by: the margin of class 1 over class 0, its softmax probability, or the
logit of class 1 alone, which is what the published CYBORG script ranks by."""
Aurocs: TypeAlias = dict[str, dict[str, dict[str, BySeed]]]
"""Task, method, subset and seed to AUROC."""

FOOLING = "fooling"
"""Stands where the method's name does in a job of experiment (a)."""

IN_SET = "in set"
MEAN, P_VALUE, P_VALUE_HOLM = "mean", "p", "p (Holm)"
RESERVED = (MEAN, P_VALUE, P_VALUE_HOLM)
"""Columns beside those of the subsets, after which no subset can be called."""


def scores_of(logits: ArrayLike, score: Score) -> NDArray[np.float64]:
    """(N,): what AUROC is computed from, of logits (N, K)."""
    values = np.asarray(logits, np.float64)
    if score == "logit-1":
        return values[:, -1]
    margin = values[:, -1] - (values[:, 0] if values.shape[1] > 1 else 0)
    if score == "margin":
        return margin
    softmax: NDArray[np.float64] = expit(margin)
    return softmax


def aurocs(jobs: Sequence[Job], score: Score = "margin") -> Aurocs:
    """AUROC (scikit-learn) of every job that trains a method.

    A job without a left-out subset counts once for each subset among its tested samples, against
    all of them that have none; or once, where none has a subset.

    Raises:
        DiffsalError: a subset that is tested against nothing.
    """
    found: Aurocs = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for job in jobs:
        if job["method"] == FOOLING:
            continue
        labels = np.array(job["samples"]["label"])
        scores = scores_of(job["models"][job["method"]]["logits"], score)
        for subset, chosen in tested_groups(job):
            if len(set(labels[chosen])) < 2:
                raise DiffsalError(
                    f"{job['task']}: AUROC is undefined, the tested samples of {subset} and those "
                    "without a subset are all of one class; correct the index"
                )
            area = roc_auc_score(labels[chosen], scores[chosen])
            found[job["task"]][job["method"]][subset][job["seed"]] = float(area)
    return found


def tested_groups(job: Job) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Names of what is tested together, and which samples these are."""
    subsets = np.array(job["samples"]["subset"])
    names = sorted(set(subsets) - {""})
    if job["subset"] or not names:
        yield job["subset"] or IN_SET, np.ones(len(subsets), bool)
        return
    for name in names:
        yield name, (subsets == name) | (subsets == "")


def mean_of_subsets(by_subset: Mapping[str, BySeed], subsets: Sequence[str]) -> BySeed:
    """Unweighted mean over the subsets, of the seeds that have all of them."""
    seeds = [set(by_subset.get(subset, {})) for subset in subsets]
    complete = sorted(set.intersection(*seeds)) if seeds else []
    return {
        seed: float(np.mean([by_subset[subset][seed] for subset in subsets])) for seed in complete
    }
