"""What a grid is made of, and what is refused before any work."""

import csv

import pytest
import torch

from diffsal.protocol.configuration import METHODS, Job, read_protocol
from diffsal.training.losses import ContrastSalienceLoss


def test_the_grid_is_task_method_subset_seed_and_early_results_span_it(grid):
    jobs = grid.jobs()
    assert jobs[:4] == [
        Job("tiles", "cross-entropy", "bar", 0),
        Job("tiles", "contrast", "bar", 0),
        Job("tiles", "cross-entropy", "dot", 0),
        Job("tiles", "contrast", "dot", 0),
    ]
    assert [job.seed for job in jobs] == [0] * 4 + [1] * 4
    assert len({job.file for job in jobs}) == 8


def test_the_six_methods_are_the_papers_and_the_reader_s(data, write, toml):
    text = toml.partition("[methods")[0]
    protocol = read_protocol(write(data, text))
    assert list(protocol.methods) == list(METHODS)
    losses = {name: protocol.training(Job("tiles", name, "bar", 3)).criterion() for name in METHODS}
    assert [type(one).__name__ for one in losses.values()] == [
        *("CrossEntropyLoss", "BaselineSalienceLoss", "DifferenceSalienceLoss"),
        *("PerClassSalienceLoss", "ContrastSalienceLoss", "ContrastSalienceLoss"),
    ]
    assert losses["contrast"].weights == ContrastSalienceLoss(0.3, 0.3, 0.3).weights
    assert losses["contrast-alpha-0.5"].weights == ContrastSalienceLoss(0.5, 0.3, 0.3).weights
    assert losses["baseline"].weights["cross_entropy"] == 0.5


def test_methods_by_their_weights(data, write, toml):
    text = toml + '[methods.strong]\nmethod = "per-class"\nbeta = 2.0\npool = "max"\n'
    protocol = read_protocol(write(data, text))
    config = protocol.training(Job("tiles", "strong", "bar", 7))
    assert (config.method, config.beta, config.pool, config.seed) == ("per-class", 2.0, "max", 7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 2", "sedes = 2", "the key 'sedes' is unknown; known: seeds"),
        ("seeds = 2", "seeds = [1, 1]", "a seed is there twice"),
        ("seeds = 2", 'seeds = "2"', "a number of seeds, 1 to 10000, or a list"),
        ("seeds = 2", "seeds = 0", "a number of seeds, 1 to 10000, or a list"),
        ("seeds = 2", "seeds = 1000000000", "a number of seeds, 1 to 10000, or a list"),
        ("seeds = 2", "seeds = [-1]", "a seed is a whole number from 0"),
        ("[methods.contrast]", "[methods.other]\nmethod = ['contrast']", "needs method, one of"),
        ("epochs = 1", "epoch = 1", "the key 'epoch' is unknown; near: epochs"),
        ("epochs = 1", 'epochs = "1"', "epochs must be int"),
        ("epochs = 1", "epochs = 1\nseed = 4", "seed is none of it; methods and seeds are"),
        (
            "[tasks.tiles]",
            "[fooling]\nsize = 32\n[tasks.tiles]",
            r"\[fooling\]: size is none of it",
        ),
        ("[tasks.tiles]", "[fooling]\nlr = -1.0\n[tasks.tiles]", "lr must be"),
        ("seeds = 2", "seeds = 2\nfooling = true", "is a table of training settings, not True"),
        ('index = "index.csv"', 'index = "index.csv"\ntraining = 3', "is a table of training"),
        ('index = "index.csv"', 'index = "index.csv"\nclasses = "normal"', "a list of names"),
        ('index = "index.csv"', 'index = "index.csv"\nmaps = 5', "needs index"),
        ('weights = "none"', "weights = 5", "weights must be str"),
        ("[tasks.tiles]", f"[tasks.{'t' * 200}]", "is too long for a file; shorten the names"),
        ("epochs = 1", 'epochs = 1\nmethod = "contrast"', "method is none of it"),
        ("epochs = 1", 'epochs = 1\nselect = "best-auroc"', "select is none of it"),
        ('"index.csv"', '"nowhere.csv"', "nowhere.csv: No such file"),
        ('index = "index.csv"', "leave_out = true", "needs index"),
        ('index = "index.csv"', 'index = "index.csv"\nlabels = 2', "the key 'labels' is unknown"),
        ('index = "index.csv"', 'index = "index.csv"\nleave_out = 1', "leave_out is true or false"),
        ('index = "index.csv"', 'index = "index.csv"\nfraction = 0.01', "cannot be held out"),
        ('"none"', '"weights.pt"', "there are no weights .*weights.pt; make them first"),
        ("[methods.contrast]", "[methods.mine]", "needs method, one of cross-entropy"),
        ("[methods.contrast]", "[methods.contrast]\nlr = 1", "the key 'lr' is unknown"),
        ("[methods.contrast]", "[methods.fooling]", "choose another name"),
        ("[methods.contrast]", "[methods.contrast]\nmethod = 'baseline'", "name of another loss"),
        (
            "[methods.contrast]",
            "[methods.contrast]\nalpha = 'x'",
            r"methods.contrast\]: alpha must",
        ),
        (
            "[methods.contrast]",
            "[methods.cross-entropy-2]\nmethod='cross-entropy'\nbeta=1.0",
            "beta",
        ),
        ("[tasks.tiles]", "[other.tiles]", "the key 'other' is unknown"),
        ("[tasks.tiles]", "[training.tiles]", "unknown|at least one"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    data, refused, write, toml, old, new, message
):
    assert old in toml
    with refused(message):
        read_protocol(write(data, toml.replace(old, new, 1), "bad.toml"))


def test_two_jobs_do_not_share_a_file(data, refused, write, toml):
    text = toml + '[methods."a b"]\nmethod = "contrast"\n[methods."a:b"]\nmethod = "contrast"\n'
    with refused("two jobs would write tiles--a-b--bar--seed0.json; rename one"):
        read_protocol(write(data, text, "bad.toml"))


def test_maps_are_asked_for_only_where_they_are_learnt_from(data, refused, write, toml):
    rows = list(csv.reader((data / "index.csv").open(encoding="utf-8")))
    without = [[row[0], row[1], *row[3:]] for row in rows]
    with (data / "no-maps.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(without)
    text = toml.replace("index.csv", "no-maps.csv")
    with refused("no training sample has a human map"):
        read_protocol(write(data, text, "bad.toml"))
    read_protocol(write(data, text.replace("[methods.contrast]", ""), "plain.toml"))


def rewritten(data, toml, name, change):
    """An index with every row changed; the file's name."""
    rows = list(csv.DictReader((data / "index.csv").open(encoding="utf-8")))
    changed = [change(number, row) for number, row in enumerate(rows)]
    with (data / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, changed[0])
        writer.writeheader()
        writer.writerows(changed)
    return toml.replace("index.csv", name)


def test_a_method_without_maps_by_another_name_needs_none(data, write, toml):
    text = rewritten(data, toml, "mapless.csv", lambda _, row: {**row, "map": ""})
    text = text.replace("[methods.contrast]", "[methods.plain]\nmethod = 'cross-entropy'")
    assert len(read_protocol(write(data, text, "plain.toml")).jobs()) == 8


def test_what_would_make_no_table_is_refused_before_any_work(data, refused, write, toml):
    in_set = 'leave_out = false\nindex = "'
    text = rewritten(
        data, toml, "n.csv", lambda _, row: {**row, "subset": row["subset"] or "plain"}
    )
    with refused("AUROC is undefined, the tested samples of .* are all of one class"):
        read_protocol(write(data, text.replace('index = "', in_set), "bad.toml"))
    text = rewritten(
        data, toml, "m.csv", lambda _, row: {**row, "subset": row["subset"].replace("bar", "mean")}
    )
    with refused("a subset called 'mean' would look like a column"):
        read_protocol(write(data, text, "bad.toml"))
    splits = ("train", "test")
    text = rewritten(data, toml, "g.csv", lambda n, row: {**row, "split": splits[n % 2]})
    with refused("the group .* is in train and in test; correct the splits"):
        read_protocol(write(data, text.replace('index = "', in_set), "bad.toml"))


def test_the_hash_is_of_what_results_depend_on_and_of_nothing_else(
    data, tmp_path, grid, write, toml
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in data.iterdir():
        if file.suffix in (".png", ".csv"):
            (elsewhere / file.name).write_bytes(file.read_bytes())
    assert read_protocol(write(elsewhere)).hash() == grid.hash()
    for old, new in (
        ("seeds = 2", "seeds = 3"),
        ("lr = 0.01", "lr = 0.02"),
        ("[methods.contrast]", "[methods.contrast]\nbeta = 0.4"),
        ('index = "index.csv"', 'index = "index.csv"\nfraction = 0.25'),
    ):
        assert read_protocol(write(data, toml.replace(old, new), "new.toml")).hash() != grid.hash()
    index = (elsewhere / "index.csv").read_text("utf-8")
    (elsewhere / "index.csv").write_text(index.replace(",bar,bar0", ",bar,bar1"), "utf-8")
    assert read_protocol(write(elsewhere)).hash() != grid.hash()


def test_weights_count_by_their_content(data, write, toml):
    text = toml.replace('"none"', '"start.pt"')
    model = torch.nn.Linear(1, 1)
    hashes = set()
    for _ in range(2):
        torch.nn.init.normal_(model.weight)
        torch.save(model.state_dict(), data / "start.pt")
        hashes.add(read_protocol(write(data, text, "weights.toml")).hash())
    assert len(hashes) == 2
