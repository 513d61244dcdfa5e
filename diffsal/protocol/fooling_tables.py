"""The tables of experiment (a): what attacks change beyond training on, and which test tells it."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from sklearn.metrics import roc_auc_score

from diffsal.protocol.scores import CONTROL, HONEST, JobContent, scores_of
from diffsal.protocol.statistics import (
    BySeed,
    Cell,
    Estimate,
    Table,
    mean_known,
    mean_over_seeds,
    paired_difference,
    told_by_low,
)

_MAPS = {
    "edges_true": "true → edges",
    "edges_difference": "difference → edges",
    "common_mode_share": "common-mode share",
}
_BY_SAMPLE = {
    "occlusion_true": "faithfulness, true",
    "occlusion_difference": "faithfulness, difference",
    "smoothgrad_difference": "SmoothGrad agreement",
}
_SKILLS = {
    "rectangles": "composite skill, rectangles",
    "marked": "composite skill, marked",
}
_TESTS = {**_BY_SAMPLE, **_SKILLS}
_UNTRAINED = ("head-shifted",)  # in closed form, so that the honest model is its counterpart
_FEWEST = 3  # seeds; of fewer, chance alone often tells all models apart

_MAPS_NOTE = (
    "Mean ± sample standard deviation over seeds. The control is the honest model, trained on with "
    "cross-entropy alone for as long as the attacks are: what it shows is no attack's doing. "
    "→ edges: mean squared distance of the normalised map to a frame along the edges. Told by "
    "share: AUROC, over images, of the common-mode share for telling the model from the honest "
    "one. Change: largest of any tested sample's probability, against the honest model's."
)
_TESTS_NOTE = (
    "Mean ± sample standard deviation over seeds. Faithfulness: rank correlation of a map with the "
    "margin's drop when each cell is occluded. SmoothGrad agreement: that of the difference map, "
    "without its signs, with the margin's sensitivity to each cell's pixels. Composite skill: how "
    "well the difference map foretells the margin when a rectangle, or what the map marks, comes "
    "from an image of the other class; 1 is exact, 0 as good as evidence everywhere alike."
)
_LESS_NOTE = (
    "An attack's effect is what it adds to training on: trained ones are less the control of the "
    "same seed, the control and what is not trained less the honest model. Mean and Student's 95 % "
    "interval over seeds, on the same test images; not corrected for the number of comparisons."
)
_TOLD_NOTE = (
    "AUROC, over models, one of each seed, of low values for telling the row's model from the "
    "control. 1: each is below every control; 0.5: chance. The honest model's row is what training "
    f"on alone does. Numbers of fewer than {_FEWEST} seeds are left out."
)

_Rows: TypeAlias = tuple[tuple[str, tuple[Cell, ...]], ...]
_Found: TypeAlias = dict[str, dict[str, BySeed]]  # by model and measure


def fooling_tables(task: str, jobs: Sequence[JobContent]) -> list[Table]:
    """Decisions and maps of honest and fooled models, and tests of these maps.

    Args:
        task: whose.
        jobs: content of the files of its jobs of experiment (a), one or more. Which tests tell
            models from the control is not said of fewer than three.

    Example:
        >>> measured = dict.fromkeys((*_MAPS, *_BY_SAMPLE), [0.5, None])
        >>> measured |= {"logits": [[1, 0], [0, 1]], "composite_skill": dict.fromkeys(_SKILLS, 0.9)}
        >>> fooled = measured | {"composite_skill": dict.fromkeys(_SKILLS, -0.25)}
        >>> models = {"honest": measured, "fine-tuned": measured, "passively fooled": fooled}
        >>> job = {"samples": {"label": [0, 1]}, "models": models}
        >>> tables = fooling_tables("tiles", [{**job, "seed": seed} for seed in range(3)])
        >>> for table in tables:
        ...     print(f"{table.name}: {table.rows[-1][0]}")
        fooling: passively fooled
        fooling-differences: passively fooled less fine-tuned
        fooling-tests: passively fooled
        fooling-test-differences: passively fooled less fine-tuned
        fooling-told: passively fooled
        >>> [cell.value for cell in dict(tables[-1].rows)["passively fooled"]]
        [0.5, 0.5, 0.5, 1.0, 1.0]
    """
    found: _Found = {name: defaultdict(dict) for name in jobs[0]["models"]}
    for job, name in itertools.product(jobs, found):
        for measure, value in _numbers(job, name).items():
            if value is not None:
                found[name][measure][job["seed"]] = value
    compared = {"AUROC": "AUROC", **_MAPS}
    shown = {**compared, "told": "told by share", "change": "change"}
    tables = [
        Table(name, task, f"{task}: {title}", note, tuple(columns.values()), rows(found, columns))
        for name, title, note, columns, rows in (
            ("fooling", "honest and fooled models (experiment (a))", _MAPS_NOTE, shown, _means),
            ("fooling-differences", "what attacks change", _LESS_NOTE, compared, _less),
            ("fooling-tests", "tests of these models' maps", _TESTS_NOTE, _TESTS, _means),
            ("fooling-test-differences", "what attacks change in tests", _LESS_NOTE, _TESTS, _less),
            ("fooling-told", "which tests tell models from the control", _TOLD_NOTE, _TESTS, _told),
        )
    ]
    return tables if len(jobs) >= _FEWEST else tables[:-1]


def _named(model: str) -> str:
    return f"{model} (control)" if model == CONTROL else model


def _means(found: _Found, measures: Iterable[str]) -> _Rows:
    return tuple(
        (_named(name), tuple(mean_over_seeds(list(by[one].values())) for one in measures))
        for name, by in found.items()
    )


def _less(found: _Found, measures: Iterable[str]) -> _Rows:
    rows = []
    for name, by in found.items():
        other = HONEST if name in (CONTROL, *_UNTRAINED) else CONTROL
        if name != HONEST:
            cells = tuple(paired_difference(by[one], found[other][one]) for one in measures)
            rows.append((f"{_named(name)} less {other}", cells))
    return tuple(rows)


def _told(found: _Found, measures: Iterable[str]) -> _Rows:
    names = [name for name in found if name != CONTROL]
    return tuple(
        (name, tuple(_area(found[name][one], found[CONTROL][one]) for one in measures))
        for name in names
    )


def _area(values: BySeed, control: BySeed) -> Cell:
    if min(len(values), len(control)) < _FEWEST:
        return None
    area = told_by_low(list(values.values()), list(control.values()))
    return Estimate(area, count=len(values))


def _numbers(job: JobContent, name: str) -> dict[str, float | None]:
    """A model's numbers in one job."""
    labels, model, honest = job["samples"]["label"], job["models"][name], job["models"][HONEST]
    numbers: dict[str, float | None] = {
        "AUROC": float(roc_auc_score(labels, scores_of(model["logits"], "margin"))),
        **{measure: mean_known(model[measure]) for measure in (*_MAPS, *_BY_SAMPLE)},
        **{kind: model["composite_skill"][kind] for kind in _SKILLS},
    }
    if name == HONEST:
        return numbers
    before, after = (scores_of(one["logits"], "softmax") for one in (honest, model))
    shares = [
        [share for share in one["common_mode_share"] if share is not None]
        for one in (honest, model)
    ]
    told = None
    if all(shares):
        is_fooled = [0] * len(shares[0]) + [1] * len(shares[1])
        told = float(roc_auc_score(is_fooled, [*shares[0], *shares[1]]))
    return {**numbers, "told": told, "change": float(np.abs(after - before).max())}
