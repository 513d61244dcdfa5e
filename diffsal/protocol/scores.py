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

JobContent: TypeAlias = Mapping[str, Any]
"""What a job's file holds."""
Score: TypeAlias = Literal["margin", "softmax", "logit-1"]
"""What samples are ranked by: the margin of class 1 over class 0, its softmax probability, or the
logit of class 1 alone, which is what the published CYBORG script ranks by."""
ByMethod: TypeAlias = Mapping[str, Mapping[str, BySeed]]
"""Method, subset and seed to AUROC."""

FOOLING = "fooling"
"""Stands where the method's name does in a job of experiment (a)."""
HONEST, CONTROL = "honest", "fine-tuned"
"""The models of experiment (a) that are not fooled. The control is the honest one, trained on for
as long as the attacks are and without a target, since training changes maps anyway."""
_IN_SET = "in set"


def scores_of(logits: ArrayLike, score: Score) -> NDArray[np.float64]:
    """What samples are ranked by (N,), from their one or two logits (N, 1 or 2).

    Example:
        >>> scores_of([[1.0, 3.0], [2.0, 0.0]], "margin")
        array([ 2., -2.])
    """
    values = np.asarray(logits, np.float64)
    if score == "logit-1":
        return values[:, -1]
    margin = values[:, -1] - (values[:, 0] if values.shape[1] > 1 else 0)
    if score == "margin":
        return margin
    softmax: NDArray[np.float64] = expit(margin)
    return softmax


def aurocs(jobs: Sequence[JobContent], score: Score = "margin") -> Mapping[str, ByMethod]:
    """AUROC (scikit-learn) of every job that trains a method, by task.

    A job without a left-out subset counts once for each subset among its tested samples, against
    all of them that have none; or once, where none has a subset.

    Raises:
        DiffsalError: a subset that is tested against nothing.

    Example:
        >>> job = {"task": "tiles", "method": "contrast", "subset": "crack", "seed": 0}
        >>> samples = {"label": [0, 1, 0, 1], "subset": ["", "crack", "", "crack"]}
        >>> models = {"contrast": {"logits": [[2, 0], [0, 2], [0, 1], [0, 0]]}}
        >>> aurocs([{**job, "samples": samples, "models": models}])["tiles"]["contrast"]["crack"]
        {0: 0.75}
    """
    found: dict[str, dict[str, dict[str, BySeed]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
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


def tested_groups(job: JobContent) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Names of what is tested together, and which samples (N,) these are.

    Example:
        >>> job = {"subset": "", "samples": {"subset": ["", "crack", "fray"]}}
        >>> for name, chosen in tested_groups(job):
        ...     print(name, chosen)
        crack [ True  True False]
        fray [ True False  True]
    """
    subsets = np.array(job["samples"]["subset"])
    names = sorted(set(subsets) - {""})
    if job["subset"] or not names:
        yield job["subset"] or _IN_SET, np.ones(len(subsets), bool)
        return
    for name in names:
        yield name, (subsets == name) | (subsets == "")


def mean_of_subsets(by_subset: Mapping[str, BySeed]) -> BySeed:
    """Unweighted mean over the subsets, of the seeds that have all of them.

    Example:
        >>> mean_of_subsets({"crack": {0: 0.5, 1: 0.6}, "fray": {0: 1.0}})
        {0: 0.75}
    """
    return {
        seed: float(np.mean([by_seed[seed] for by_seed in by_subset.values()]))
        for seed in sorted(set.intersection(*map(set, by_subset.values())))
    }
