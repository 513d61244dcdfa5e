"""The numbers of experiment (a), computed again from the samples' own."""

import itertools

import numpy as np
import pytest
from scipy import stats

from diffsal.protocol.fooling_tables import fooling_tables

COLUMNS = {
    "edges_true": "true → edges",
    "edges_difference": "difference → edges",
    "common_mode_share": "common-mode share",
    "occlusion_true": "faithfulness, true",
    "occlusion_difference": "faithfulness, difference",
    "smoothgrad_difference": "SmoothGrad agreement",
    "rectangles": "composite skill, rectangles",
    "marked": "composite skill, marked",
}
COUNTERPARTS = {
    "fine-tuned (control)": "honest",
    "passively fooled": "fine-tuned",
    "head-shifted": "honest",
    "adaptively fooled": "fine-tuned",
    "knows composites": "fine-tuned",
}


def cells(*tables):
    return {
        (name, column): cell
        for table in tables
        for name, row in table.rows
        for column, cell in zip(table.columns, row, strict=True)
    }


def of_seed(job, name, measure):
    """A model's number, by another road than the tables'; NaN where there is none."""
    model = job["models"][name]
    if measure in ("rectangles", "marked"):
        return np.array(model["composite_skill"][measure], float)
    if measure == "AUROC":
        scores = margins(job, name)
        return area(*(scores[np.array(job["samples"]["label"]) == label] for label in (1, 0)))
    return np.nanmean(np.array(model[measure], float))


def margins(job, name):
    return np.diff(np.array(job["models"][name]["logits"]))[:, 0]


def area(above, below):
    """The share of pairs in which the first is higher; of equals, half."""
    above, below = np.array(above)[:, None], np.array(below)
    return ((above > below) + (above == below) / 2).mean()


@pytest.fixture(scope="module")
def fooled(jobs):
    return [one for one in jobs if one["method"] == "fooling"]


def test_means_over_seeds(tables, fooled):
    found = cells(tables["fooling"], tables["fooling-tests"])
    names = {"honest": "honest"} | {name.removesuffix(" (control)"): name for name in COUNTERPARTS}
    assert {name for name, _ in found} == {*names.values()}
    measures = {"AUROC": "AUROC", **COLUMNS}.items()
    for (name, row), (measure, column) in itertools.product(names.items(), measures):
        values = np.array([of_seed(job, name, measure) for job in fooled])
        cell = found[row, column]
        assert cell.value == pytest.approx(np.nanmean(values), rel=1e-12)
        assert cell.std == pytest.approx(np.nanstd(values, ddof=1), rel=1e-9)


def test_told_and_changed_are_against_the_honest_model(tables, fooled):
    found = cells(tables["fooling"])
    assert found["honest", "told by share"] is found["honest", "change"] is None
    told, changes = [], []
    for job in fooled:
        shares = [
            job["models"][name]["common_mode_share"] for name in ("knows composites", "honest")
        ]
        told.append(area(*([one for one in each if one is not None] for each in shares)))
        before, after = (
            1 / (1 + np.exp(-margins(job, name))) for name in ("honest", "knows composites")
        )
        changes.append(np.abs(after - before).max())
    for column, values in (("told by share", told), ("change", changes)):
        assert found["knows composites", column].value == pytest.approx(np.mean(values))
        assert found["knows composites", column].std == pytest.approx(np.std(values, ddof=1))


def test_an_attack_is_compared_with_what_was_trained_as_long(tables, fooled):
    found = cells(tables["fooling-differences"], tables["fooling-test-differences"])
    assert {name for name, _ in found} == {
        f"{name} less {other}" for name, other in COUNTERPARTS.items()
    }
    measures = {"AUROC": "AUROC", **COLUMNS}.items()
    for (row, other), (measure, column) in itertools.product(COUNTERPARTS.items(), measures):
        name = row.removesuffix(" (control)")
        pairs = [[of_seed(job, one, measure) for one in (name, other)] for job in fooled]
        differences = np.array([one - two for one, two in pairs if not np.isnan(one - two)])
        cell = found[f"{row} less {other}", column]
        assert cell.value == pytest.approx(differences.mean(), abs=1e-12)
        assert cell.count == len(differences)
        if np.ptp(differences):
            half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
            assert cell.high - cell.low == pytest.approx(2 * half, rel=1e-9)


def test_what_is_below_the_control_is_told(tables, fooled):
    found = cells(tables["fooling-told"])
    names = [name for name in ("honest", *COUNTERPARTS) if name != "fine-tuned (control)"]
    assert list(dict(tables["fooling-told"].rows)) == names
    for name, measure in itertools.product(names, list(COLUMNS)[3:]):
        values, control = (
            [float(of_seed(job, one, measure)) for job in fooled] for one in (name, "fine-tuned")
        )
        cell = found[name, COLUMNS[measure]]
        if (name, measure) == ("head-shifted", "marked"):  # two seeds have it
            assert cell is None
            continue
        assert cell.value == pytest.approx(area(control, values), abs=1e-12)


def test_of_two_seeds_nothing_is_told(fooled):
    assert fooling_tables("t", fooled[:3])[-1].name == "fooling-told"
    assert "fooling-told" not in {table.name for table in fooling_tables("t", fooled[:2])}
