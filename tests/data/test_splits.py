"""What is learnt and what is tested, on files written by the tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffsal.data.index import Index, Sample, Split
from diffsal.data.splits import hold_out, leave_out, with_test, with_validation
from diffsal.errors import DiffsalError


def grouped_samples() -> list[Sample]:
    """300 samples in groups of one to four: two thirds normal, the rest of three kinds."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(150), generator.integers(1, 5, 150))[:300]
    kinds = generator.permutation(["", "", "", "", "", "", "crack", "fray", "break"] * 34)[:300]
    return [
        Sample(Path(f"{number}.png"), int(kind != ""), None, str(kind), str(group))
        for number, (kind, group) in enumerate(zip(kinds, groups, strict=True))
    ]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3, 0.5, 0.75])
def test_hold_out_is_stratified_and_keeps_groups_whole(fraction: float, grouped: bool) -> None:
    samples = grouped_samples()
    if not grouped:
        samples = [Sample(sample.path, sample.label) for sample in samples]
    held = hold_out(samples, fraction, seed=3)
    assert held == hold_out(samples, fraction, seed=3)
    assert held != hold_out(samples, fraction, seed=4)
    assert held == [sample for sample in samples if sample in held]
    for label in (0, 1):
        total = sum(sample.label == label for sample in samples)
        share = sum(sample.label == label for sample in held) / total
        assert abs(share - fraction) <= (4 if grouped else 1) / total
    if grouped:
        assert not {s.group for s in samples if s not in held} & {s.group for s in held}


def test_hold_out_says_what_is_too_few() -> None:
    samples = grouped_samples()
    for fraction in (0, 0.01, 1, -1):
        with pytest.raises(DiffsalError, match=r"0\.05 to 0\.95"):
            hold_out(samples, fraction, 0)
    few = [Sample(Path(str(number)), int(number < 3)) for number in range(50)]
    with pytest.raises(DiffsalError, match=r"takes 5 of each class .* there are 3"):
        hold_out(few, 0.2, 0)


def test_validation_is_split_off_unless_it_is_named() -> None:
    samples = grouped_samples()
    index = with_validation(Index(Path("i.csv"), ("n", "d"), tuple(samples)), 0.2, seed=1)
    assert [sample.path for sample in index.samples] == [sample.path for sample in samples]
    assert len(index.split("train")) + len(index.split("val")) == 300
    assert 55 <= len(index.split("val")) <= 65
    assert with_validation(index, 0.5, seed=2) is index

    marked = [
        Sample(sample.path, sample.label, split="test" if number < 100 else "train")
        for number, sample in enumerate(samples)
    ]
    index = with_validation(Index(Path("i.csv"), ("n", "d"), tuple(marked)), 0.25, seed=1)
    assert index.split("test") == tuple(marked[:100])
    assert len(index.split("val")) == pytest.approx(50, abs=1)
    untrained = Index(Path("i.csv"), ("n", "d"), tuple(marked[:100]))
    with pytest.raises(DiffsalError, match=r"i\.csv: no sample has the split train"):
        with_validation(untrained)


def test_leaving_out_subsets_tests_them_against_the_same_normals() -> None:
    samples = grouped_samples()
    index = Index(Path("i.csv"), ("n", "d"), tuple(samples))
    normals = []
    for subset in ("crack", "fray", "break"):
        split = leave_out(index, subset, 0.3, seed=5)
        test, train = split.split("test"), split.split("train")
        normals.append([sample.path for sample in test if not sample.subset])
        assert {s.path for s in test if s.subset} == {s.path for s in samples if s.subset == subset}
        assert {s.subset for s in train} == {"", "crack", "fray", "break"} - {subset}
        assert not {s.group for s in test} & {s.group for s in train}
        # Nothing is lost but what shares a group with a tested sample.
        tested = {s.group for s in test}
        assert len(train) == sum(s.group not in tested for s in samples)
    assert normals[0] == normals[1] == normals[2]
    assert len(normals[0]) == pytest.approx(0.3 * 200, abs=10)


def test_leaving_out_follows_the_splits_of_the_index() -> None:
    def sample(name: str, subset: str, split: Split) -> Sample:
        return Sample(Path(name), int(subset != ""), None, subset, "", split)

    samples = (
        sample("n1", "", "train"),
        sample("n2", "", "test"),
        sample("n3", "", "val"),
        sample("a1", "a", "train"),
        sample("a2", "a", "test"),
        sample("b1", "b", "train"),
        sample("b2", "b", "test"),
    )
    index = leave_out(Index(Path("i.csv"), ("n", "d"), samples), "a")
    names = {split: [s.path.name for s in index.split(split)] for split in ("train", "val", "test")}
    assert names == {"train": ["n1", "b1"], "val": ["n3"], "test": ["n2", "a2"]}
    unmarked = tuple(one for one in samples if one.path.name != "a2")
    index = leave_out(Index(Path("i.csv"), ("n", "d"), unmarked), "a")
    assert [s.path.name for s in index.split("test")] == ["n2", "a1"]
    with pytest.raises(DiffsalError, match=r"no subset 'c'; there are: a, b"):
        leave_out(index, "c")
    with pytest.raises(DiffsalError, match="no samples without a subset"):
        leave_out(Index(Path("i.csv"), ("n", "d"), samples[3:]), "a")


def test_a_test_split_is_held_out_unless_the_index_names_one() -> None:
    samples = tuple(grouped_samples())
    index = with_test(Index(Path("i.csv"), ("n", "d"), samples), 0.3, seed=1)
    tested, trained = index.split("test"), index.split("train")
    assert len(tested) + len(trained) == len(samples)
    assert len(tested) == pytest.approx(0.3 * len(samples), abs=15)
    assert {s.label for s in tested} == {0, 1}
    assert not {s.group for s in tested} & {s.group for s in trained}
    assert with_test(index) == index
    trained_only = replace(index, samples=trained)
    with pytest.raises(DiffsalError, match=r"i\.csv: no sample has the split test"):
        with_test(trained_only)
