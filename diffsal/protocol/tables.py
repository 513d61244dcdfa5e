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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffsal.errors import DiffsalError
from diffsal.protocol.fooling_tables import fooling_tables
from diffsal.protocol.scores import (
    FOOLING,
    ByMethod,
    JobContent,
    Score,
    aurocs,
    mean_of_subsets,
    tested_groups,
)
from diffsal.protocol.statistics import (
    BySeed,
    Cell,
    Estimate,
    Table,
    holm,
    mean_known,
    mean_over_seeds,
    mean_over_subsets,
    paired_difference,
    wilcoxon,
)

MEAN, P_VALUE, P_VALUE_HOLM = "mean", "p", "p (Holm)"
RESERVED = (MEAN, P_VALUE, P_VALUE_HOLM)
"""Columns beside those of the subsets, after which no subset can be called."""
_MAP_MEASURES = {
    "pointing_true": "pointing game, true",
    "pointing_difference": "pointing game, difference",
    "energy_true": "energy inside, true",
    "energy_difference": "energy inside, difference",
    "marked_share": "chance",
    "common_mode_share": "common-mode share",
}


def make_tables(
    protocol: Mapping[str, Any],
    jobs: Sequence[JobContent],
    score: Score = "margin",
    baseline: str | None = None,
) -> list[Table]:
    """The paper's Tables 2 to 4, and beyond them differences, maps, fooling and single seeds.

    Args:
        protocol: see :class:`diffsal.protocol.results.Results`, as for ``jobs``.
        jobs: content of the jobs' files.
        score: see :data:`diffsal.protocol.scores.Score`.
        baseline: the method that others are compared to; ``None``: the one called ``baseline``, or
            else the first.

    Raises:
        DiffsalError: the protocol has no such method; see :func:`diffsal.protocol.scores.aurocs`.

    Example:
        >>> job = {"task": "tiles", "method": "contrast", "subset": "crack", "seed": 0}
        >>> job["samples"] = {"label": [0, 1], "subset": ["", "crack"]}
        >>> measured = dict.fromkeys(_MAP_MEASURES, [None, 0.5])
        >>> job["models"] = {"contrast": {"logits": [[1, 0], [0, 1]], **measured}}
        >>> tasks = {"tiles": {"subsets": ["crack"]}}
        >>> plan = {"methods": {"contrast": {}}, "tasks": tasks, "seeds": [0]}
        >>> tables = {table.name: table for table in make_tables(plan, [job])}
        >>> list(tables)
        ['overall', 'subsets', 'differences', 'maps', 'map-differences', 'seeds']
        >>> tables["seeds"].rows[0][0], tables["seeds"].rows[0][1][0].value
        ('contrast, crack', 1.0)
    """
    methods = list(protocol["methods"])
    if baseline is None:
        baseline = "baseline" if "baseline" in methods else methods[0]
    if baseline not in methods:
        raise DiffsalError(
            f"the protocol has no method {baseline!r} to compare to; pass --baseline, one of "
            f"{', '.join(methods)}"
        )
    found = aurocs(jobs, score)
    areas = {
        task: _completed(found[task], methods, plan["subsets"])
        for task, plan in protocol["tasks"].items()
        if task in found
    }
    tables = [_overall_table(areas, methods, score)] if areas else []
    for task in protocol["tasks"]:
        of_task = [job for job in jobs if job["task"] == task]
        fooled = [job for job in of_task if job["method"] == FOOLING]
        if task in areas:
            tables.append(_subsets_table(task, areas[task], score))
            tables.append(_differences_table(task, areas[task], baseline))
            tables += _maps_tables(task, areas[task], of_task, baseline)
        if fooled:
            tables += fooling_tables(task, fooled)
        if task in areas:
            tables.append(_seeds_table(task, areas[task], protocol["seeds"]))
    return tables


def _completed(found: ByMethod, methods: Sequence[str], planned: Sequence[str]) -> ByMethod:
    """Every method and subset in the order of the tables; no seeds where nothing is done yet.

    Subsets are those left out in turn; else what was tested, which every job has in full.
    """
    tested = sorted({name for by_subset in found.values() for name in by_subset})
    subsets = [subset for subset in planned if subset] or tested
    return {
        method: {subset: found.get(method, {}).get(subset, {}) for subset in subsets}
        for method in methods
    }


def _subsets(areas: ByMethod) -> list[str]:
    """All methods have the same."""
    return list(next(iter(areas.values())))


def _over_seeds(by_seed: BySeed) -> Cell:
    return mean_over_seeds(list(by_seed.values()))


def _overall_table(areas: Mapping[str, ByMethod], methods: Sequence[str], score: Score) -> Table:
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for task, by_method in areas.items():
        overall = {name: mean_of_subsets(by_subset) for name, by_subset in by_method.items()}
        rows.append((f"{task}, ± over seeds", tuple(map(_over_seeds, overall.values()))))
        if len(_subsets(by_method)) > 1:
            over_subsets = []
            for name, seeds in overall.items():
                values = ([one[seed] for seed in seeds] for one in by_method[name].values())
                means = [float(np.mean(of_subset)) for of_subset in values if of_subset]
                over_subsets.append(mean_over_subsets(means))
            rows.append((f"{task}, ± over subsets", tuple(over_subsets)))
    return Table(
        "overall",
        "",
        f"AUROC by task (the paper's Table 2), ranked by {score}",
        "Unweighted mean over subsets. ± over seeds: sample standard deviation of that mean; "
        "± over subsets: population standard deviation of the subsets' means.",
        tuple(methods),
        tuple(rows),
    )


def _subsets_table(task: str, areas: ByMethod, score: Score) -> Table:
    rows = []
    for name, by_subset in areas.items():
        means = (*by_subset.values(), mean_of_subsets(by_subset))
        rows.append((name, tuple(map(_over_seeds, means))))
    return Table(
        "subsets",
        task,
        f"{task}: AUROC by subset (the paper's Tables 3 and 4), ranked by {score}",
        "Mean ± sample standard deviation over seeds.",
        (*_subsets(areas), MEAN),
        tuple(rows),
    )


def _differences_table(task: str, areas: ByMethod, baseline: str) -> Table:
    by_column = {
        name: {**by_subset, MEAN: mean_of_subsets(by_subset)} for name, by_subset in areas.items()
    }
    base = by_column.pop(baseline)
    raw = {name: wilcoxon(one[MEAN], base[MEAN]) for name, one in by_column.items()}
    known = {name: p for name, p in raw.items() if p is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    rows = []
    for name, one in by_column.items():
        cells = (paired_difference(one[column], base[column]) for column in base)
        rows.append((name, (*cells, _number(raw[name]), _number(adjusted.get(name)))))
    return Table(
        "differences",
        task,
        f"{task}: AUROC less that of {baseline}, paired by seed",
        "Mean and Student's 95 % interval over seeds, on the same test images; intervals of "
        "single subsets are not corrected for their number. p: Wilcoxon's signed-rank test of the "
        "mean over subsets, and the same after Holm's correction for the number of methods.",
        (*base, P_VALUE, P_VALUE_HOLM),
        tuple(rows),
    )


def _maps_tables(
    task: str, areas: ByMethod, jobs: Sequence[JobContent], baseline: str
) -> list[Table]:
    columns, subsets = tuple(_MAP_MEASURES.values()), _subsets(areas)
    found = {
        name: [_map_measure(jobs, name, measure, subsets) for measure in _MAP_MEASURES]
        for name in areas
    }
    means = [(name, tuple(map(_over_seeds, by_measure))) for name, by_measure in found.items()]
    differences = [
        (name, tuple(map(paired_difference, found[name], found[baseline])))
        for name in areas
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


def _map_measure(
    jobs: Sequence[JobContent], method: str, measure: str, subsets: Sequence[str]
) -> BySeed:
    """Mean over the samples, then over the subsets, of each seed."""
    by_subset: dict[str, BySeed] = {subset: {} for subset in subsets}
    for job in jobs:
        if job["method"] == method:
            values = job["models"][method][measure]
            for subset, chosen in tested_groups(job):
                mean = mean_known(list(itertools.compress(values, chosen)))
                if mean is not None:
                    by_subset[subset][job["seed"]] = mean
    return mean_of_subsets(by_subset)


def _seeds_table(task: str, areas: ByMethod, seeds: Sequence[int]) -> Table:
    rows = [
        (f"{name}, {subset}", tuple(_number(by_seed.get(seed)) for seed in seeds))
        for name, by_subset in areas.items()
        for subset, by_seed in by_subset.items()
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
