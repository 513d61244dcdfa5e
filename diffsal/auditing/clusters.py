"""Which kinds of evidence a model uses: images whose difference maps look alike, and how they fare.

After SpRAy (Lapuschkin et al. 2019, "Unmasking Clever Hans predictors and assessing what machines
really learn"): the maps of all images are clustered, so that somebody can look at a few kinds
instead of at every map. A kind of few images, in an odd place, may be a shortcut.

Clustering finds clusters in anything. Kinds are called distinct where the clusters hold together
better than those found in draws that have the maps' mean and covariance and no kinds at all: a
fixed bound on the silhouette would not do, as a single cloud of maps that vary in few directions,
which smooth maps do, is cut into clusters of 0.3, and one in two dimensions into 0.6."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from diffsal.auditing.rows import Measured, Number, described, plain
from diffsal.errors import DiffsalError
from diffsal.faithfulness.statistics import Interval, interval
from diffsal.maps.salience_maps import SalienceMaps

Array = NDArray[np.float64]

FEWEST = 10  # images: kinds of fewer would be single images
_COUNTS = range(2, 7)
_CLUSTERED = 1000  # images at most; to the others the nearest centre is given
_STARTS = 4  # of k-means, of which the tightest counts
_DRAWS = 19  # of each sort without kinds: that all hold together less has a chance of 1 in 20
_LEAST = 0.1  # below, a map is hardly nearer to its own kind's than to the next kind's
_EXAMPLES = 3


@dataclass(frozen=True)
class Clusters:
    """Kinds of maps.

    Attributes:
        cluster: (N,) int64, 0 the largest; -1: the map is zero, and of no kind.
        silhouette: mean over maps, in [-1, 1]: by how much a map is nearer to those of its own
            cluster than to those of the next, as a share of the larger distance (Rousseeuw 1987).
        chance: the largest silhouette in draws that have no kinds.
        means: (clusters, h, w) of the maps, each of length 1.
        nearest: positions of the maps nearest to each mean, the nearest first.

    Example:
        >>> found = Clusters(np.array([0, 0, 1]), 0.5, 0.3, np.zeros((2, 4, 4)), [[0, 1], [2]])
        >>> found.distinct
        True
    """

    cluster: NDArray[np.int64]
    silhouette: float
    chance: float
    means: Array
    nearest: list[list[int]]

    @property
    def distinct(self) -> bool:
        """Whether the clusters are more than what would be found in maps of one kind."""
        return self.silhouette >= _LEAST and self.silhouette > self.chance


def cluster_maps(maps: NDArray[np.floating[Any]], seed: int = 0) -> Clusters:
    """Cluster maps by where their evidence lies, whatever its size.

    k-means of the maps as vectors of length 1, so that distance is that of the cosine; of 2 to 6
    clusters, as many as give the largest silhouette. The same is done to draws from normal
    distributions, in which there are no kinds (the idea of SigClust, Liu et al. 2008), brought to
    length 1: 19 with the mean and covariance of the maps, since noise about zero points into
    opposite directions when only length is taken from it, and 19 with those of the maps of length
    1, since a few large maps would else make up the covariance.

    Args:
        maps: (N, h, w), signed, of any unit.
        seed: of the clusters' starts and of the draws.

    Raises:
        DiffsalError: fewer than ten maps that are not zero, or all of them alike.

    Example:
        >>> maps = np.random.default_rng(0).normal(0, 0.1, (30, 3, 3))
        >>> maps[:20, :, 0] += 1  # the left of most images
        >>> maps[20:, :, 2] += 1
        >>> found = cluster_maps(maps)
        >>> found.distinct, np.bincount(found.cluster).tolist()
        (True, [20, 10])
    """
    flat = np.asarray(maps, np.float64).reshape(len(maps), -1)
    length = np.linalg.norm(flat, axis=1)
    known = np.flatnonzero((length > 0) & np.isfinite(length))
    if len(known) < FEWEST:
        raise DiffsalError(
            f"{len(known)} images have a map that is not zero, and kinds need {FEWEST}"
        )
    units = (flat[known] / length[known, None]).round(6)  # up to rounding, equal maps are equal
    chosen = np.linspace(0, len(units) - 1, min(_CLUSTERED, len(units))).round().astype(int)
    fitted = units[chosen]
    if len(np.unique(fitted, axis=0)) < 2:
        raise DiffsalError("the maps of all images are alike")
    silhouette, model = _best(fitted, seed)
    generator = np.random.default_rng(seed)
    chance = max(
        _best(_without_kinds(alike, generator), seed)[0]
        for alike in (fitted, flat[known][chosen])
        for _ in range(_DRAWS)
    )
    labels = _by_size(model.predict(units))
    means = np.stack([units[labels == one].mean(0) for one in range(labels.max() + 1)])
    nearest = [_nearest(units, labels, one, mean) for one, mean in enumerate(means)]
    cluster = np.full(len(flat), -1)
    cluster[known] = labels
    return Clusters(
        cluster,
        silhouette,
        chance,
        means.reshape(len(means), *maps.shape[1:]),
        [known[one].tolist() for one in nearest],
    )


def _best(units: Array, seed: int) -> tuple[float, KMeans]:
    """The clusters that hold together best, and their silhouette."""
    different = len(np.unique(units, axis=0))
    found = []
    for count in _COUNTS:
        if count <= different:
            model = KMeans(count, n_init=_STARTS, random_state=seed).fit(units)
            found.append((float(silhouette_score(units, model.labels_)), model))
    return max(found, key=lambda pair: pair[0])


def _without_kinds(units: Array, generator: np.random.Generator) -> Array:
    """As many draws from one normal distribution of the same mean and covariance."""
    mean = units.mean(0)
    _, spread, axes = np.linalg.svd(units - mean, full_matrices=False)
    normal = generator.standard_normal((len(units), len(spread)))
    drawn = mean + (normal * spread / np.sqrt(len(units))) @ axes
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def _by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels numbered anew: the largest cluster first, of equal ones that of the first image."""
    _, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    rank = np.empty(labels.max() + 1, np.int64)
    rank[labels[first[np.lexsort((first, -sizes))]]] = np.arange(len(sizes))
    return rank[labels]


def _nearest(units: Array, labels: NDArray[np.int64], one: int, mean: Array) -> NDArray[np.int64]:
    own = np.flatnonzero(labels == one)
    distance = np.linalg.norm(units[own] - mean, axis=1).round(6)
    return own[np.argsort(distance, kind="stable")[:_EXAMPLES]]


@dataclass(frozen=True)
class Kinds:
    """The kinds of evidence among the images of an audit.

    Attributes:
        clusters: of the maps; positions are those of the rows.
        measured: the rows, and what they are of.
    """

    clusters: Clusters
    measured: Measured

    @property
    def silhouette(self) -> Number:
        """How distinct the kinds are, with what chance would give."""
        found, count = self.clusters, int((self.clusters.cluster >= 0).sum())
        whole = Interval(found.silhouette, np.nan, np.nan, count)
        label = "Distinctness of kinds (silhouette)"
        return described("silhouette", label, "silhouette", whole, chance=found.chance)

    @cached_property
    def each(self) -> list[dict[str, Any]]:
        """Each kind: images, by class, error rate, mean map, examples; none that is not distinct.

        Examples are positions among the rows.
        """
        if not self.clusters.distinct:
            return []
        measured, found = self.measured, self.clusters
        labels = np.array([row["label"] for row in measured.rows])
        wrong = 1 - measured.column("correct")
        kinds = []
        for one, mean in enumerate(found.means):
            own = found.cluster == one
            error = interval(wrong[own], measured.seed)
            kinds.append(
                {
                    "images": int(own.sum()),
                    "classes": {name: int((labels[own] == name).sum()) for name in measured.names},
                    "error": described("error", f"Error rate, kind {one + 1}", "share", error),
                    "map": mean.tolist(),
                    "examples": found.nearest[one],
                }
            )
        return kinds

    def facts(self) -> dict[str, Any]:
        """What ``audit.json`` keeps: examples are paths."""
        found = self.clusters
        silhouette, chance = plain([found.silhouette, found.chance])
        return {
            "silhouette": silhouette,
            "chance": chance,
            "distinct": found.distinct,
            "kinds": [
                one | {"examples": [self.measured.rows[image]["path"] for image in one["examples"]]}
                for one in self.each
            ],
        }


def decision_maps(maps: SalienceMaps, grid: list[int]) -> Tensor:
    """(B, h, w) float32 on the CPU: what speaks for the decision, whichever class it is for.

    The difference map of the class that was predicted against the label or, where that is the
    prediction, against the class set against it. So the same place that speaks now for one class,
    now for the other is one kind of evidence.

    Args:
        maps: of labels, not volumes.
        grid: (h, w) at most the maps' own; the cells of each block are averaged.

    Example:
        >>> map_, none = torch.tensor([[[1.0, -3.0]]]), torch.zeros(1, 1, 2)
        >>> label = torch.zeros(1, dtype=torch.long)
        >>> scores = torch.tensor([[-2.0, 0.0]])  # the label loses
        >>> decision_maps(SalienceMaps(map_, none, scores, scores[:, 0], scores[:, 1], label,
        ...     1 - label, "label"), [1, 2])
        tensor([[[-1.,  3.]]])
    """
    towards = maps.difference * maps.margin.sign()[:, None, None]
    return F.adaptive_avg_pool2d(towards.float(), (grid[0], grid[1])).cpu()


def evidence_kinds(measured: Measured) -> Kinds | str:
    """Cluster the images' maps, a column ``cluster`` from 1; or why there are no kinds to tell."""
    maps = torch.stack(measured.evidence).numpy()
    try:
        found = cluster_maps(maps, measured.seed)
    except DiffsalError as error:
        return str(error)
    if found.distinct:
        number = torch.from_numpy(found.cluster + 1).double()
        column = number.where(number > 0, torch.nan)
        measured.add_columns(measured.samples, {"cluster": column})
    return Kinds(found, measured)
