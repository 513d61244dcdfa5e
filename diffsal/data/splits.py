"""What is learnt and what is tested: reproducible, stratified, groups whole."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from diffsal.data.index import Index, Sample, Split
from diffsal.errors import DiffsalError

# A share is held out as some of at most this many folds.
_MAX_FOLDS = 20


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """Choose a share of samples: reproducible, stratified by label, groups whole.

    Args:
        samples: in an order that is the same each time.
        fraction: of the samples, from 0.05 to 0.95; met as well as twentieths and whole groups
            allow.
        seed: of the choice.

    Returns:
        Those chosen, in the order of ``samples``.

    Raises:
        DiffsalError: another fraction, or too few samples or groups.

    Example:
        >>> from pathlib import Path
        >>> samples = [Sample(Path(f"{number}.png"), number % 2) for number in range(20)]
        >>> [sample.label for sample in hold_out(samples, 0.2, seed=0)].count(1)
        2
    """
    if not 1 / _MAX_FOLDS <= fraction <= 1 - 1 / _MAX_FOLDS:
        raise DiffsalError(f"a fraction of {fraction} cannot be held out; choose 0.05 to 0.95")
    share = Fraction(fraction).limit_denominator(_MAX_FOLDS)
    labels = [sample.label for sample in samples]
    groups = None
    if any(sample.group for sample in samples):
        groups = [sample.group or f"\0{position}" for position, sample in enumerate(samples)]
    least = min([*Counter(labels).values(), len(set(groups or range(len(samples))))])
    if least < share.denominator:
        raise DiffsalError(
            f"to hold out {fraction} of the samples takes {share.denominator} of each class and as "
            f"many groups, and there are {least}; add samples, or name what is held out"
        )
    # Without groups both would do, but the one that knows them takes time squared.
    folds = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        share.denominator, shuffle=True, random_state=seed
    )
    parts = [part for _, part in folds.split(labels, labels, groups)]
    return [samples[position] for position in np.sort(np.concatenate(parts[: share.numerator]))]


def with_validation(index: Index, fraction: float = 0.2, seed: int = 0) -> Index:
    """Name the split of every sample; the index's own word goes before.

    Where samples are marked ``val``, nothing changes. Else a ``fraction`` of the training samples
    (all samples, where the index names no splits) is marked ``val``.

    Raises:
        DiffsalError: see :func:`hold_out`; the index names splits, but no ``train``.

    Example:
        >>> from pathlib import Path
        >>> samples = tuple(Sample(Path(f"{number}.png"), number % 2) for number in range(20))
        >>> index = Index(Path("index.csv"), ("intact", "worn"), samples)
        >>> len(with_validation(index).split("val"))
        4
    """
    if index.split("val"):
        return index
    candidates = index.split("train") or index.split("")
    if not candidates:
        raise DiffsalError(f"{index.source}: no sample has the split train; mark some")
    return _marked(index, "val", hold_out(candidates, fraction, seed))


def with_test(index: Index, fraction: float = 0.2, seed: int = 0) -> Index:
    """Mark a ``fraction`` of the samples ``test``, the others ``train``; an index's own word goes
    before.

    Raises:
        DiffsalError: the index names splits, but no ``test``; see :func:`hold_out`.

    Example:
        >>> from pathlib import Path
        >>> samples = tuple(Sample(Path(f"{number}.png"), number % 2) for number in range(20))
        >>> index = Index(Path("index.csv"), ("intact", "worn"), samples)
        >>> len(with_test(index, 0.5).split("test"))
        10
    """
    if index.split("test"):
        return index
    if len(index.split("")) < len(index.samples):
        raise DiffsalError(f"{index.source}: no sample has the split test; mark some")
    return _marked(index, "test", hold_out(index.samples, fraction, seed))


def leave_out(index: Index, subset: str, fraction: float = 0.2, seed: int = 0) -> Index:
    """Train without one subset, and test on it against the normals.

    The normals are the samples without a subset. A ``fraction`` of them, chosen by ``seed`` and
    the normals alone and therefore the same for every subset, is tested with the subset. Where the
    index names splits, the normals of its ``test`` are, and of the subset those marked ``test``, if
    there are any. What remains is for training, unless it is of the subset, shares a group with a
    tested sample, or is marked ``test`` itself.

    Returns:
        An index whose samples have the splits ``train`` (or the index's own ``val``) and ``test``.

    Raises:
        DiffsalError: there is no such subset, or there are no normals; see :func:`hold_out`.

    Example:
        >>> from pathlib import Path
        >>> intact = [Sample(Path(f"{number}.png"), 0) for number in range(10)]
        >>> worn = [Sample(Path(f"{one}.png"), 1, subset=one[0]) for one in ("x1", "x2", "y1")]
        >>> index = Index(Path("index.csv"), ("intact", "worn"), (*intact, *worn))
        >>> left = leave_out(index, "x")
        >>> sorted({sample.subset for sample in left.split("train")}), len(left.split("test"))
        (['', 'y'], 4)
    """
    known = sorted({sample.subset for sample in index.samples} - {""})
    if subset not in known:
        raise DiffsalError(
            f"{index.source}: there is no subset {subset!r}; there are: {', '.join(known) or '-'}"
        )
    normals = [sample for sample in index.samples if not sample.subset]
    held = [sample for sample in normals if sample.split == "test"]
    if normals and not any(sample.split for sample in normals):
        held = hold_out(normals, fraction, seed)
    if not held:
        raise DiffsalError(
            f"{index.source}: no samples without a subset to test {subset!r} against; leave the "
            "subset of normals empty, and mark some as test where splits are named"
        )
    left_out = [sample for sample in index.samples if sample.subset == subset]
    marked = [sample for sample in left_out if sample.split == "test"]
    tested = [*held, *(marked or left_out)]
    paths = {sample.path for sample in tested}
    groups = {sample.group for sample in index.samples if sample.path in paths} - {""}
    remaining = [
        sample
        for sample in index.samples
        if sample.path in paths
        or (sample.subset != subset and sample.split != "test" and sample.group not in groups)
    ]
    return _marked(replace(index, samples=tuple(remaining)), "test", tested)


def _marked(index: Index, split: Split, chosen: Sequence[Sample]) -> Index:
    """The chosen samples marked, and ``train`` the others that are not marked yet."""
    paths = {sample.path for sample in chosen}
    samples = [
        replace(sample, split=split if sample.path in paths else sample.split or "train")
        for sample in index.samples
    ]
    return replace(index, samples=tuple(samples))
