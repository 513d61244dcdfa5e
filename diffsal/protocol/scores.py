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

import csv
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from diffsal.errors import DiffsalError

__all__ = [
    "FOOLING",
    "FORMATS",
    "RESERVED",
    "Cell",
    "Estimate",
    "Score",
    "Table",
    "aurocs",
    "holm",
    "make_tables",
    "mean_over_seeds",
    "mean_over_subsets",
    "paired_difference",
    "written",
]

Job: TypeAlias = Mapping[str, Any]
Score: TypeAlias = Literal["margin", "softmax", "logit-1"]
"""What samples are ranked by: the margin of class 1 over class 0, its softmax probability, or the
logit of class 1 alone, which is what the published CYBORG script ranks by."""
Format: TypeAlias = Literal["text", "markdown", "latex", "csv", "json"]
BySeed: TypeAlias = dict[int, float]
Aurocs: TypeAlias = dict[str, dict[str, dict[str, BySeed]]]
"""Task, method, subset and seed to AUROC."""

FOOLING = "fooling"
"""Stands where the method's name does in a job of experiment (a)."""

IN_SET = "in set"
MEAN, _P, _P_HOLM = "mean", "p", "p (Holm)"
RESERVED = (MEAN, _P, _P_HOLM)
"""Columns beside those of the subsets, after which no subset can be called."""

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
class Estimate:
    """A number of a table.

    Attributes:
        value: itself; a mean, where there is a spread.
        std: standard deviation, of the kind that the table's note names.
        low: lower end of its 95 % interval.
        high: upper end.
        count: of seeds or subsets that it comes from.
    """

    value: float
    std: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 1


Cell: TypeAlias = Estimate | None


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


# -------------------------------------------------------------------------------------- statistics


def mean_over_seeds(values: Sequence[float]) -> Cell:
    """Mean and sample standard deviation; none of one value."""
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), std, count=len(values))


def mean_over_subsets(means: Sequence[float]) -> Cell:
    """Unweighted mean of the subsets' means, and their population standard deviation."""
    if not means:
        return None
    return Estimate(float(np.mean(means)), float(np.std(means)), count=len(means))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Cell:
    """Mean of the differences of equal seeds, and Student's 95 % interval for it.

    Of one pair, or of differences that are all the same, there is no interval.
    """
    differences = _differences(values, baseline)
    if len(differences) == 0:
        return None
    low, high = None, None
    if len(differences) > 1 and np.ptp(differences) > 0:
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        low, high = float(interval.low), float(interval.high)
    return Estimate(float(differences.mean()), None, low, high, len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values that all hold together."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = highest
    return [float(value) for value in adjusted]


def _wilcoxon(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test over the seeds that both have."""
    differences = _differences(values, baseline)
    if len(differences) < 2:
        return None
    return float(stats.wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def _differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> NDArray[np.float64]:
    return np.array([values[seed] - baseline[seed] for seed in sorted({*values} & {*baseline})])


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ------------------------------------------------------------------------------------------ scores


def _scores(logits: ArrayLike, score: Score) -> NDArray[np.float64]:
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
        scores = _scores(job["models"][job["method"]]["logits"], score)
        for subset, chosen in _groups(job):
            if len(set(labels[chosen])) < 2:
                raise DiffsalError(
                    f"{job['task']}: AUROC is undefined, the tested samples of {subset} and those "
                    "without a subset are all of one class; correct the index"
                )
            area = roc_auc_score(labels[chosen], scores[chosen])
            found[job["task"]][job["method"]][subset][job["seed"]] = float(area)
    return found


def _groups(job: Job) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Names of what is tested together, and which samples these are."""
    subsets = np.array(job["samples"]["subset"])
    names = sorted(set(subsets) - {""})
    if job["subset"] or not names:
        yield job["subset"] or IN_SET, np.ones(len(subsets), bool)
        return
    for name in names:
        yield name, (subsets == name) | (subsets == "")


def _overall(by_subset: Mapping[str, BySeed], subsets: Sequence[str]) -> BySeed:
    """Unweighted mean over the subsets, of the seeds that have all of them."""
    seeds = [set(by_subset.get(subset, {})) for subset in subsets]
    complete = sorted(set.intersection(*seeds)) if seeds else []
    return {
        seed: float(np.mean([by_subset[subset][seed] for subset in subsets])) for seed in complete
    }


# ------------------------------------------------------------------------------------------ tables


def make_tables(
    protocol: Mapping[str, Any],
    jobs: Sequence[Job],
    score: Score = "margin",
    baseline: str | None = None,
) -> list[Table]:
    """The paper's Tables 2 to 4, and beyond them differences, maps, fooling and single seeds.

    Args:
        protocol: see :class:`diffsal.protocol.Results`, as for ``jobs``.
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
        overall = {name: _overall(areas[task].get(name, {}), subsets) for name in methods}
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
        overall = mean_over_seeds(list(_overall(by_subset, subsets).values()))
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
    base_overall = _overall(base, subsets)
    overall = {name: _overall(by_method.get(name, {}), subsets) for name in others}
    raw = {name: _wilcoxon(overall[name], base_overall) for name in others}
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
        (*subsets, MEAN, _P, _P_HOLM),
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
            for subset, chosen in _groups(job):
                mean = _mean_known(list(itertools.compress(values, chosen)))
                if mean is not None:
                    by_subset[subset][job["seed"]] = mean
    return _overall(by_subset, subsets)


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
    numbers = {"AUROC": float(roc_auc_score(labels, _scores(model["logits"], "margin")))}
    means = {measure: _mean_known(model[measure]) for measure in _FOOLING_MEASURES}
    if model is honest:
        return {**numbers, **means, "told": None, "change": None}
    before, after = (_scores(one["logits"], "softmax") for one in (honest, model))
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


# ----------------------------------------------------------------------------------------- writing


def written(tables: Sequence[Table], form: Format) -> str:
    """The tables as one text, in one of :data:`FORMATS`."""
    return FORMATS[form](tables)


def _cell(cell: Cell, signed: bool) -> str:
    """A number for people: what it is, then how far it spreads."""
    if cell is None:
        return "-"

    def one(value: float) -> str:
        form = ".1e" if 0 < abs(value) < 5e-4 else ".3f"
        return f"{value:{'+' if signed else ''}{form}}"

    if cell.std is not None:
        return f"{one(cell.value)} ± {one(cell.std)}"
    if cell.low is not None and cell.high is not None:
        return f"{one(cell.value)} ({one(cell.low)} to {one(cell.high)})"
    return one(cell.value)


def _grid(table: Table) -> list[list[str]]:
    """Header and rows as text. Differences carry their sign; p-values do not."""
    lines = [["", *table.columns]]
    for name, cells in table.rows:
        texts = [
            _cell(cell, "differences" in table.name and column not in (_P, _P_HOLM))
            for column, cell in zip(table.columns, cells, strict=True)
        ]
        lines.append([name, *texts])
    return lines


def _as_text(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        grid = _grid(table)
        widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
        lines = [
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in grid
        ]
        parts.append("\n".join([table.title, "", *lines, "", table.note]))
    return "\n\n\n".join(parts)


def _as_markdown(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        header, *rows = (
            "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
            for line in _grid(table)
        )
        rule = "|---" * (len(table.columns) + 1) + "|"
        parts.append("\n".join([f"### {table.title}", "", header, rule, *rows, "", table.note]))
    return "\n\n".join(parts)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
}


def _as_latex(tables: Sequence[Table]) -> str:
    """Tables for the package booktabs."""
    parts = []
    for table in tables:
        header, *rows = (
            " & ".join(_latex(text) for text in line) + r" \\" for line in _grid(table)
        )
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_latex(table.title)}. {_latex(table.note)}}}",
                    rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
                    r"\toprule",
                    header,
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _as_csv(tables: Sequence[Table]) -> str:
    """One line a number, with all its digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "task", "row", "column", "value", "std", "low", "high", "count"])
    for table in tables:
        for name, cells in table.rows:
            for column, cell in zip(table.columns, cells, strict=True):
                if cell is not None:
                    numbers = ("" if one is None else one for one in asdict(cell).values())
                    writer.writerow([table.name, table.task, name, column, *numbers])
    return buffer.getvalue().rstrip("\n")


def _as_json(tables: Sequence[Table]) -> str:
    content = [
        {
            "name": table.name,
            "task": table.task,
            "title": table.title,
            "note": table.note,
            "rows": {
                name: {
                    column: cell and asdict(cell)
                    for column, cell in zip(table.columns, cells, strict=True)
                }
                for name, cells in table.rows
            },
        }
        for table in tables
    ]
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


FORMATS = {
    "text": _as_text,
    "markdown": _as_markdown,
    "latex": _as_latex,
    "csv": _as_csv,
    "json": _as_json,
}
"""Name to what writes tables so. Text, Markdown and LaTeX round; CSV and JSON do not."""
