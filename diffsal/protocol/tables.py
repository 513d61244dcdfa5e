"""From the files of a protocol's jobs to the paper's tables, with intervals instead of adjectives.

Everything is computed from the logits and measures of single samples, here and nowhere else. Three
kinds of spread are told apart, and named in every table:

* **over seeds**: the sample standard deviation of the same number for models trained from other
  seeds.
* **over subsets**: the population standard deviation of the subsets' means, which is what the
  paper's Table 2 gives for the iris task. It says how much harder one subset is than another, not
  how sure a mean is.
* **95 % intervals** of paired differences: Student's, of the differences between two methods with
  the same seed. They speak of training again and testing on the same images, not of other images.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from diffsal.errors import DiffsalError
from diffsal.protocol.scores import (
    FOOLING,
    MEAN,
    P_VALUE,
    P_VALUE_HOLM,
    Aurocs,
    Job,
    Score,
    aurocs,
    mean_of_subsets,
    scores_of,
    tested_groups,
)
from diffsal.protocol.statistics import (
    BySeed,
    Cell,
    Estimate,
    holm,
    mean_known,
    mean_over_seeds,
    mean_over_subsets,
    paired_difference,
    wilcoxon,
)

_MAP_MEASURES = {
    "pointing_true": "pointing game, true",
    "pointing_difference": "pointing game, difference",
    "energy_true": "energy inside, true",
    "energy_difference": "energy inside, difference",
    "marked_share": "chance",
    "common_mode_share": "common-mode share",
}
_FOOLING_MEASURES = {
    "edges_true": "true → edges",
    "edges_difference": "difference → edges",
    "common_mode_share": "common-mode share",
    "occlusion_true": "faithfulness, true",
    "occlusion_difference": "faithfulness, difference",
}


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        name: what it holds: ``overall``, ``subsets``, ``differences``, ``maps``,
            ``map-differences``, ``fooling``, ``fooling-differences`` or ``seeds``.
        task: whose; ``""``: of all.
        title: for people.
        note: what the numbers and their spreads are.
        columns: names.
        rows: name and cells; ``None``: there is no such number.
    """

    name: str
    task: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def make_tables(
    protocol: Mapping[str, Any],
    jobs: Sequence[Job],
    score: Score = "margin",
    baseline: str | None = None,
) -> list[Table]:
    """The paper's Tables 2 to 4, and beyond them differences, maps, fooling and single seeds.

    Args:
        protocol: see :class:`diffsal.protocol.results.Results`, as for ``jobs``.
        jobs: content of the jobs' files.
        score: see :data:`Score`.
        baseline: the method that others are compared to; ``None``: the one called ``baseline``, or
            else the first.

    Raises:
        DiffsalError: the protocol has no such method; see :func:`aurocs`.
    """
    if baseline is None:
        baseline = (
            "baseline" if "baseline" in protocol["methods"] else next(iter(protocol["methods"]))
        )
    if baseline not in protocol["methods"]:
        raise DiffsalError(
            f"the protocol has no method {baseline!r} to compare to; pass --baseline, one of "
            f"{', '.join(protocol['methods'])}"
        )
    areas = aurocs(jobs, score)
    methods = list(protocol["methods"])
    tables = [_overall_table(protocol, areas, methods, score)] if areas else []
    for task in protocol["tasks"]:
        of_task = [job for job in jobs if job["task"] == task]
        by_method = areas.get(task, {})
        subsets = _subsets(protocol, task, by_method)
        if by_method:
            tables.append(_subsets_table(task, by_method, methods, subsets, score))
            tables.append(_differences_table(task, by_method, methods, subsets, baseline))
            tables += _maps_tables(task, of_task, methods, subsets, baseline)
        fooled = [job for job in of_task if job["method"] == FOOLING]
        if fooled:
            tables += _fooling_tables(task, fooled)
        if by_method:
            tables.append(_seeds_table(task, by_method, methods, subsets, protocol["seeds"]))
    return tables


def _subsets(
    protocol: Mapping[str, Any], task: str, by_method: Mapping[str, Mapping[str, BySeed]]
) -> list[str]:
    """What is left out in turn, done or not; else what was tested, which every job has in full."""
    planned = [subset for subset in protocol["tasks"][task]["subsets"] if subset]
    return planned or sorted({name for by_subset in by_method.values() for name in by_subset})


def _overall_table(
    protocol: Mapping[str, Any], areas: Aurocs, methods: Sequence[str], score: Score
) -> Table:
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for task in protocol["tasks"]:
        if task not in areas:
            continue
        subsets = _subsets(protocol, task, areas[task])
        overall = {name: mean_of_subsets(areas[task].get(name, {}), subsets) for name in methods}
        over_seeds = tuple(mean_over_seeds(list(overall[name].values())) for name in methods)
        rows.append((f"{task}, ± over seeds", over_seeds))
        if len(subsets) > 1:
            means = {
                name: [
                    float(np.mean([areas[task][name][subset][seed] for seed in overall[name]]))
                    for subset in subsets
                    if overall[name]
                ]
                for name in methods
            }
            over_subsets = tuple(mean_over_subsets(means[name]) for name in methods)
            rows.append((f"{task}, ± over subsets", over_subsets))
    return Table(
        "overall",
        "",
        f"AUROC by task (the paper's Table 2), ranked by {score}",
        "Unweighted mean over subsets. ± over seeds: sample standard deviation of that mean; "
        "± over subsets: population standard deviation of the subsets' means.",
        tuple(methods),
        tuple(rows),
    )


def _subsets_table(
    task: str,
    by_method: Mapping[str, Mapping[str, BySeed]],
    methods: Sequence[str],
    subsets: Sequence[str],
    score: Score,
) -> Table:
    rows = []
    for name in methods:
        by_subset = by_method.get(name, {})
        cells = [mean_over_seeds(list(by_subset.get(one, {}).values())) for one in subsets]
        overall = mean_over_seeds(list(mean_of_subsets(by_subset, subsets).values()))
        rows.append((name, (*cells, overall)))
    return Table(
        "subsets",
        task,
        f"{task}: AUROC by subset (the paper's Tables 3 and 4), ranked by {score}",
        "Mean ± sample standard deviation over seeds.",
        (*subsets, MEAN),
        tuple(rows),
    )


def _differences_table(
    task: str,
    by_method: Mapping[str, Mapping[str, BySeed]],
    methods: Sequence[str],
    subsets: Sequence[str],
    baseline: str,
) -> Table:
    others = [name for name in methods if name != baseline]
    base = by_method.get(baseline, {})
    base_overall = mean_of_subsets(base, subsets)
    overall = {name: mean_of_subsets(by_method.get(name, {}), subsets) for name in others}
    raw = {name: wilcoxon(overall[name], base_overall) for name in others}
    known = [(name, p) for name, p in raw.items() if p is not None]
    adjusted = dict(zip((name for name, _ in known), holm([p for _, p in known]), strict=True))
    rows = []
    for name in others:
        by_subset = by_method.get(name, {})
        cells = [paired_difference(by_subset.get(one, {}), base.get(one, {})) for one in subsets]
        tests = (_number(raw[name]), _number(adjusted.get(name)))
        rows.append((name, (*cells, paired_difference(overall[name], base_overall), *tests)))
    return Table(
        "differences",
        task,
        f"{task}: AUROC less that of {baseline}, paired by seed",
        "Mean and Student's 95 % interval over seeds, on the same test images; intervals of "
        "single subsets are not corrected for their number. p: Wilcoxon's signed-rank test of the "
        "mean over subsets, and the same after Holm's correction for the number of methods.",
        (*subsets, MEAN, P_VALUE, P_VALUE_HOLM),
        tuple(rows),
    )


def _maps_tables(
    task: str, jobs: Sequence[Job], methods: Sequence[str], subsets: Sequence[str], baseline: str
) -> list[Table]:
    columns = tuple(_MAP_MEASURES.values())
    found = {
        name: [_map_measure(jobs, name, measure, subsets) for measure in _MAP_MEASURES]
        for name in methods
    }
    means = [
        (name, tuple(mean_over_seeds(list(by_seed.values())) for by_seed in found[name]))
        for name in methods
    ]
    differences = [
        (name, tuple(map(paired_difference, found[name], found[baseline])))
        for name in methods
        if name != baseline
    ]
    return [
        Table(
            "maps",
            task,
            f"{task}: maps on the tested samples",
            "Means over the samples that have the number, then over subsets; ± sample standard "
            "deviation over seeds. Pointing game and energy inside: of the true-class and of the "
            "difference map, in the human map; chance: the share of the image that is marked.",
            columns,
            tuple(means),
        ),
        Table(
            "map-differences",
            task,
            f"{task}: the same less {baseline}, paired by seed",
            "Mean and Student's 95 % interval over seeds, on the same test images; not corrected "
            "for the number of comparisons.",
            columns,
            tuple(differences),
        ),
    ]


def _map_measure(jobs: Sequence[Job], method: str, measure: str, subsets: Sequence[str]) -> BySeed:
    """Mean over the samples, then over the subsets, of each seed."""
    by_subset: dict[str, BySeed] = defaultdict(dict)
    for job in jobs:
        if job["method"] == method:
            values = job["models"][method][measure]
            for subset, chosen in tested_groups(job):
                mean = mean_known(list(itertools.compress(values, chosen)))
                if mean is not None:
                    by_subset[subset][job["seed"]] = mean
    return mean_of_subsets(by_subset, subsets)


def _fooling_tables(task: str, jobs: Sequence[Job]) -> list[Table]:
    found: dict[str, dict[str, BySeed]] = {}
    for name in jobs[0]["models"]:
        found[name] = defaultdict(dict)
        for job in jobs:
            for measure, value in _fooled(job, name).items():
                if value is not None:
                    found[name][measure][job["seed"]] = value
    compared = {"AUROC": "AUROC", **_FOOLING_MEASURES}
    columns = {**compared, "told": "told by share", "change": "change"}
    means = [
        (name, tuple(mean_over_seeds(list(by[measure].values())) for measure in columns))
        for name, by in found.items()
    ]
    differences = [
        (name, tuple(paired_difference(by[one], found["honest"][one]) for one in compared))
        for name, by in found.items()
        if name != "honest"
    ]
    return [
        Table(
            "fooling",
            task,
            f"{task}: honest and fooled models (experiment (a))",
            "Mean ± sample standard deviation over seeds. → edges: mean squared distance of the "
            "normalised map to a frame along the edges. Faithfulness: rank correlation of a map "
            "with the margin's drop when each cell is occluded. Told by share: AUROC, over images, "
            "of the common-mode share for telling the model from the honest one. Change: largest "
            "of any tested sample's probability.",
            tuple(columns.values()),
            tuple(means),
        ),
        Table(
            "fooling-differences",
            task,
            f"{task}: fooled models less the honest one, paired by seed",
            "Mean and Student's 95 % interval over seeds, on the same test images; not corrected "
            "for the number of comparisons.",
            tuple(compared.values()),
            tuple(differences),
        ),
    ]


def _fooled(job: Job, name: str) -> dict[str, float | None]:
    """A model's numbers in one job."""
    labels, model, honest = job["samples"]["label"], job["models"][name], job["models"]["honest"]
    numbers = {"AUROC": float(roc_auc_score(labels, scores_of(model["logits"], "margin")))}
    means = {measure: mean_known(model[measure]) for measure in _FOOLING_MEASURES}
    if model is honest:
        return {**numbers, **means, "told": None, "change": None}
    before, after = (scores_of(one["logits"], "softmax") for one in (honest, model))
    shares = [
        [value for value in one["common_mode_share"] if value is not None]
        for one in (honest, model)
    ]
    told = None
    if all(shares):
        is_fooled = [0] * len(shares[0]) + [1] * len(shares[1])
        told = float(roc_auc_score(is_fooled, [*shares[0], *shares[1]]))
    return {**numbers, **means, "told": told, "change": float(np.abs(after - before).max())}


def _seeds_table(
    task: str,
    by_method: Mapping[str, Mapping[str, BySeed]],
    methods: Sequence[str],
    subsets: Sequence[str],
    seeds: Sequence[int],
) -> Table:
    rows = [
        (
            f"{name}, {subset}",
            tuple(_number(by_method.get(name, {}).get(subset, {}).get(seed)) for seed in seeds),
        )
        for name in methods
        for subset in subsets
    ]
    return Table(
        "seeds",
        task,
        f"{task}: AUROC of every seed",
        "One model each.",
        tuple(f"seed {seed}" for seed in seeds),
        tuple(rows),
    )


def _number(value: float | None) -> Cell:
    return None if value is None else Estimate(value)
