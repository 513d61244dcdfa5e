"""Every number of the tables, computed again by other means from the samples' own scores."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import auc, roc_curve

from diffsal.protocol.tables import make_tables

METHODS = ("cross-entropy", "baseline", "contrast", "contrast-alpha-0.5")
SUBSETS = ("a", "b", "c")
SEEDS = (0, 1, 2, 3, 5)
MEASURES = (
    *("pointing_true", "pointing_difference", "energy_true", "energy_difference"),
    *("marked_share", "common_mode_share"),
)


def cells(table):
    return {
        (name, column): cell
        for name, row in table.rows
        for column, cell in zip(table.columns, row, strict=True)
    }


def area(labels, scores):
    """AUROC by another road: the probability that a positive ranks above a negative."""
    labels, scores = np.array(labels), np.array(scores, np.float64)
    statistic = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    return statistic / (labels.sum() * (1 - labels).sum())


def margin_of(one, name=None):
    logits = np.array(one["models"][name or one["method"]]["logits"])
    return logits[:, 1] - logits[:, 0]


def by_seed(jobs, method, subset):
    """AUROC of each seed, from the samples."""
    return {
        one["seed"]: area(one["samples"]["label"], margin_of(one))
        for one in jobs
        if (one["method"], one["subset"]) == (method, subset)
    }


def overall(jobs, method):
    areas = [by_seed(jobs, method, subset) for subset in SUBSETS]
    return [float(np.mean([area[seed] for area in areas])) for seed in SEEDS]


def close(cell, value, std=None):
    assert math.isclose(cell.value, value, rel_tol=1e-12, abs_tol=1e-12)
    if std is not None:
        assert math.isclose(cell.std, std, rel_tol=1e-9, abs_tol=1e-12)


def test_all_tables_are_there_once(tables):
    assert list(tables) == [
        *("overall", "subsets", "differences", "maps", "map-differences"),
        *("fooling", "fooling-differences", "fooling-tests", "fooling-test-differences"),
        *("fooling-told", "seeds"),
    ]


def test_single_seeds_are_the_areas_under_the_curve(tables, jobs):
    found = cells(tables["seeds"])
    assert len(found) == len(METHODS) * len(SUBSETS) * len(SEEDS)
    for one in jobs:
        if one["method"] in METHODS:
            rates = roc_curve(one["samples"]["label"], margin_of(one))
            cell = found[f"{one['method']}, {one['subset']}", f"seed {one['seed']}"]
            close(cell, auc(*rates[:2]))


def test_subsets(tables, jobs):
    found = cells(tables["subsets"])
    for method, subset in itertools.product(METHODS, SUBSETS):
        areas = list(by_seed(jobs, method, subset).values())
        close(found[method, subset], sum(areas) / len(areas), stats.tstd(areas))
        assert found[method, subset].count == len(SEEDS)
        means = overall(jobs, method)
        close(found[method, "mean"], sum(means) / len(means), stats.tstd(means))


def test_overall_has_both_spreads(tables, jobs):
    found = cells(tables["overall"])
    for method in METHODS:
        means = overall(jobs, method)
        of_subsets = [np.mean(list(by_seed(jobs, method, one).values())) for one in SUBSETS]
        close(found["t, ± over seeds", method], np.mean(means), stats.tstd(means))
        spread = math.sqrt(sum((one - np.mean(of_subsets)) ** 2 for one in of_subsets) / 3)
        close(found["t, ± over subsets", method], np.mean(of_subsets), spread)


def test_differences_are_paired_by_seed(tables, jobs):
    found = cells(tables["differences"])
    assert {name for name, _ in found} == set(METHODS) - {"baseline"}
    p_values = {}
    for method in sorted(set(METHODS) - {"baseline"}):
        rows = {
            "mean": np.subtract(overall(jobs, method), overall(jobs, "baseline")),
            **{
                subset: np.subtract(
                    [by_seed(jobs, method, subset)[seed] for seed in SEEDS],
                    [by_seed(jobs, "baseline", subset)[seed] for seed in SEEDS],
                )
                for subset in SUBSETS
            },
        }
        for column, differences in rows.items():
            cell = found[method, column]
            close(cell, differences.mean())
            half = stats.t.ppf(0.975, len(SEEDS) - 1) * stats.sem(differences)
            assert math.isclose(cell.low, differences.mean() - half, abs_tol=1e-12)
            assert math.isclose(cell.high, differences.mean() + half, abs_tol=1e-12)
        p_values[method] = signed_rank(rows["mean"])
        close(found[method, "p"], p_values[method])
    for method, p in p_values.items():
        # Holm by its definition: the largest of the multiplied p-values up to one's own rank.
        smaller = [one for one in p_values.values() if one <= p]
        multiplied = [one * sum(other >= one for other in p_values.values()) for one in smaller]
        close(found[method, "p (Holm)"], min(1, max(multiplied)))


def signed_rank(differences):
    """Two-sided exact p-value, by going through all signs."""
    ranks = stats.rankdata(np.abs(differences))
    observed = ranks[differences > 0].sum()
    all_signs = itertools.product((0, 1), repeat=len(ranks))
    sums = np.array([np.dot(signs, ranks) for signs in all_signs])
    return min(1.0, 2 * min((sums <= observed).mean(), (sums >= observed).mean()))


def test_maps(tables, jobs):
    table, of_cross_entropy = tables["maps"], {}
    assert len(table.columns) == len(MEASURES)
    found = cells(table)
    for method, (measure, column) in itertools.product(
        METHODS, zip(MEASURES, table.columns, strict=True)
    ):
        means = []
        for seed in SEEDS:
            of_seed = [one for one in jobs if (one["method"], one["seed"]) == (method, seed)]
            values = [np.array(one["models"][method][measure], float) for one in of_seed]
            means.append(np.mean([np.nanmean(one) for one in values]))
        close(found[method, column], np.mean(means), np.std(means, ddof=1))
        if method == "baseline":  # of METHODS the second, so what it is compared to comes first
            first = cells(tables["map-differences"])["cross-entropy", column]
            differences = np.subtract(of_cross_entropy[measure], means)
            close(first, differences.mean())
            half = stats.t.ppf(0.975, len(SEEDS) - 1) * stats.sem(differences)
            assert math.isclose(first.high - first.low, 2 * half, rel_tol=1e-9)
        elif method == "cross-entropy":
            of_cross_entropy[measure] = means


def test_an_unfinished_method_is_not_compared_by_other_subsets(protocol, jobs):
    """Of chance, which does not depend on the method, no difference may come out."""
    some = [
        {**one, "models": {one["method"]: {**one["models"][one["method"]], "marked_share": share}}}
        for one in jobs
        if one["method"] in METHODS and (one["method"], one["subset"]) != ("contrast", "a")
        for share in [[SUBSETS.index(one["subset"]) / 10] * 24]
    ]
    tables = {table.name: table for table in make_tables(protocol, some)}
    found = cells(tables["map-differences"])
    assert found["contrast", "chance"] is None
    assert found["cross-entropy", "chance"].value == 0
    assert cells(tables["maps"])["baseline", "chance"].value == pytest.approx(0.1)
    assert cells(tables["subsets"])["contrast", "mean"] is None


def test_maps_of_in_set_jobs_are_means_over_subsets_too(protocol, make_job):
    one = make_job("baseline", "a", 0)
    subsets = ["", "a", "", "a", "", "b"] * 4
    values = [0.0, 0.6, 0.0, 0.6, 0.0, 0.9] * 4
    models = {"baseline": {**one["models"]["baseline"], "energy_true": values}}
    samples = {**one["samples"], "subset": subsets}
    plan = {**protocol, "methods": {"baseline": {}}, "tasks": {"t": {"subsets": [""]}}}
    tables = make_tables(plan, [{**one, "subset": "", "samples": samples, "models": models}])
    found = cells(next(table for table in tables if table.name == "maps"))
    # Each subset with the same twelve normals: 8 x 0.6 of 20, and 4 x 0.9 of 16.
    expected = (8 * 0.6 / 20 + 4 * 0.9 / 16) / 2
    assert found["baseline", "energy inside, true"].value == pytest.approx(expected)


def test_the_papers_numbers_go_through_the_whole_table(protocol, paper, table_2):
    """Samples whose AUROC is the paper's mean, to a thousandth, aggregate to its Table 2."""
    names = list(paper["iris"])
    made = []
    for method, values in paper["iris"].items():
        for number, value in enumerate(values):
            # 1,000 negatives between 0 and 1, and positives of which a share is above them all.
            scores = [*np.linspace(0.1, 0.9, 1000), *([1.0] * round(1000 * value))]
            scores += [0.0] * (1000 - round(1000 * value))
            made.append(
                {
                    "task": "iris",
                    "method": method,
                    "subset": f"{number}",
                    "seed": 0,
                    "samples": {"label": [0] * 1000 + [1] * 1000, "subset": [""] * 2000},
                    "models": {
                        method: {
                            "logits": [[0.0, score] for score in scores],
                            **{name: [None] for name in MEASURES},
                        }
                    },
                }
            )
    plan = {
        "methods": {name: {} for name in names},
        "tasks": {"iris": {"subsets": list("0123456")}},
        "seeds": [0],
    }
    found = cells(make_tables(plan, made)[0])
    for method in names:
        cell = found["iris, ± over subsets", method]
        assert abs(cell.value - table_2["iris"][method][0]) <= 0.001
        assert abs(cell.std - table_2["iris"][method][1]) <= 0.001


def test_equal_methods_have_p_1(protocol, jobs):
    twins = [one for one in jobs if one["method"] == "baseline"]
    twins += [
        {**one, "method": "contrast", "models": {"contrast": one["models"]["baseline"]}}
        for one in twins
    ]
    plan = {**protocol, "methods": {"baseline": {}, "contrast": {}}}
    found = cells(next(t for t in make_tables(plan, twins) if t.name == "differences"))
    assert found["contrast", "mean"].value == 0
    assert found["contrast", "p"].value == found["contrast", "p (Holm)"].value == 1


def test_seeds_without_all_subsets_count_for_those_they_have(protocol, jobs):
    some = [one for one in jobs if (one["subset"], one["seed"]) != ("c", 5)]
    tables = {table.name: table for table in make_tables(protocol, some)}
    found = cells(tables["subsets"])
    assert found["baseline", "a"].count == 5
    assert found["baseline", "c"].count == found["baseline", "mean"].count == 4
    assert cells(tables["seeds"])["baseline, c", "seed 5"] is None


def test_a_subset_that_nobody_has_done_yet_is_not_left_out_of_the_mean(protocol, jobs):
    some = [one for one in jobs if one["subset"] != "c"]
    table = next(table for table in make_tables(protocol, some) if table.name == "subsets")
    assert table.columns == (*SUBSETS, "mean")
    found = cells(table)
    assert found["baseline", "b"] is not None
    assert found["baseline", "c"] is found["baseline", "mean"] is None


def test_another_baseline(protocol, jobs, refused):
    tables = {t.name: t for t in make_tables(protocol, jobs, baseline="cross-entropy")}
    assert "baseline" in dict(tables["differences"].rows)
    with refused("no method 'x'"):
        make_tables(protocol, jobs, baseline="x")
