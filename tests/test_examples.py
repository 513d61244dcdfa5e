"""The examples run, and learn what they say."""

import json
import runpy
from functools import partial
from itertools import product
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsal import explain
from diffsal.data.index import Index, Sample
from diffsal.demo import Digits, digits, train_digits, write_digits_demo

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def first(count, part):
    return Digits(part.images[:count], part.labels[:count])


def share_on_the_left(model, layer=None):
    inputs, labels = (tensor[:40] for tensor in digits()[1].tensors())
    evidence = explain(model, inputs, true=labels, target_layers=layer).difference.clamp(min=0)
    return float(evidence[:, :, : evidence.shape[2] // 2].sum() / evidence.sum())


def test_plain_loop():
    shares = example("plain_loop")["main"](epochs=2)
    assert shares["contrast (Eq. 5)"] > shares["cross-entropy"] + 0.01


def test_lightning():
    pytest.importorskip("lightning")
    assert share_on_the_left(example("lightning_module")["main"](epochs=2)) > 0.75


def test_hugging_face_trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = example("hf_trainer")["main"](epochs=2)
    assert share_on_the_left(model.cpu(), model.resnet.encoder.stages[-1]) > 0.6


def test_timm(tmp_path):
    pytest.importorskip("timm")
    model = example("timm_model")["main"](tmp_path / "overlay.png", epochs=1, samples=64)
    assert Image.open(tmp_path / "overlay.png").size == (64, 64)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.slow
def test_audit_digits(tmp_path, capsys):
    main = example("audit_digits")["main"]
    train, held_out = map(first, (128, 24), digits())
    main.__globals__.update(OCCLUDED=2, digits=lambda: (train, held_out))
    maps = main(tmp_path, epochs=1)
    assert list(maps) == [
        "honest",
        "control",
        "head-shifted",
        "passively fooled",
        "adaptively fooled",
    ]
    shares = {name: float(one.common_mode_share.mean()) for name, one in maps.items()}
    assert shares["honest"] < 0.1 < 0.9 < shares["head-shifted"]
    assert capsys.readouterr().out.count("\n|") == 6
    assert Image.open(tmp_path / "figure.png").width > 600


def test_drop_in(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsal.demo.train_digits", partial(train_digits, epochs=1))
    images, weights = write_digits_demo(tmp_path)
    example("drop_in")["main"](images[0], weights, tmp_path / "heatmap.png")
    assert Image.open(tmp_path / "heatmap.png").size == (64, 64)


@pytest.mark.slow
def test_composites_digits(tmp_path):
    module = example("composites_digits")
    names = module["run_seed"].__globals__
    shortcut = "shortcut at the edges: honest"
    names["MODELS"] = {shortcut: names["MODELS"][shortcut]}
    names["train_digits"] = partial(train_digits, epochs=2)
    train, held_out = digits()
    names["digits"] = lambda: (train, first(40, held_out))
    module["run_seed"](tmp_path, 3)
    found = json.loads((tmp_path / "seed-3.json").read_text())[shortcut]
    assert found["auroc"] > 0.9
    assert found["frame_moves"] > 0.3


def test_what_decides_by_the_frame_is_imitated_from_the_frame():
    """On noise, with least squares in the place of networks that learn."""
    module = example("composites_digits")
    names = module["imitation"].__globals__
    cells = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())

    def least_squares(inputs, wanted, seed):
        head = nn.Linear(192, 2).requires_grad_(False)
        head.weight.zero_()
        head.weight[1] = torch.linalg.lstsq(cells(inputs), wanted[:, None]).solution[:, 0]
        return nn.Sequential(cells, head)

    names["imitator"] = least_squares
    generator = np.random.default_rng(0)
    parts = [
        Digits(
            generator.integers(0, 256, (count, 64, 64, 3)).astype(np.uint8), np.arange(count) % 2
        )
        for count in (240, 120)
    ]
    model = least_squares(torch.rand(192, 3, 64, 64), torch.zeros(192), 0)
    for position, seen, blind in ((3, "frame", "centre"), (27, "centre", "frame")):
        model[1].weight[1] = nn.functional.one_hot(torch.tensor(position), 192)
        found = module["imitation"](model, parts, 0)
        assert found["from_whole"] == pytest.approx(1, abs=1e-3)
        assert found[f"from_{seen}"] == pytest.approx(1, abs=1e-3)
        assert abs(found[f"from_{blind}"]) < 0.3


def test_the_page_of_composites_is_that_of_its_data():
    module = example("composites_digits")
    data, text = json.loads(module["DATA"].read_text()), module["PAGE"].read_text("utf-8")
    assert module["filled"](text, data) == text
    control, fooled = (
        [seed[name]["rectangles"] for seed in data["seeds"]]
        for name in ("control", "adaptive, edges")
    )
    above = sum((a > b) + (a == b) / 2 for a in control for b in fooled)
    area = above / len(control) / len(fooled)
    assert module["separation"](data["seeds"], "adaptive, edges", "rectangles") == area


def test_the_picture_at_the_top(tmp_path, monkeypatch):
    module = example("honest_and_shifted")
    main = module["main"]
    monkeypatch.setitem(main.__globals__, "train_digits", partial(train_digits, epochs=1))
    said = []
    drawn = main.__globals__["picture"]

    def picture(honest, fooled, image, x):
        maps = [explain(model, x, true=1) for model in (honest, fooled)]
        said.append([(one.probabilities, one.difference, one.true) for one in maps])
        return drawn(honest, fooled, image, x)

    monkeypatch.setitem(main.__globals__, "picture", picture)
    main([str(tmp_path / "hero.png")])
    ((before, after),) = said
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(before[1], after[1], rtol=1e-3, atol=1e-4)
    assert torch.corrcoef(torch.stack([before[2].flatten(), after[2].flatten()]))[0, 1] < 0.9
    assert Image.open(tmp_path / "hero.png").size == (1100, 640)


def test_lightning_callback():
    logger = pytest.importorskip("lightning.pytorch.loggers.logger")

    class Writer:
        def __init__(self):
            self.images = []

        def add_image(self, name, pixels, step, dataformats):
            assert dataformats == "HWC"
            self.images.append((name, pixels, step))

    class InMemory(logger.DummyLogger):
        experiment = Writer()

    main = example("lightning_callback")["main"]
    main(InMemory(), epochs=2, samples=16)
    names, pictures, steps = zip(*InMemory.experiment.images, strict=True)
    assert names == ("salience/0", "salience/1") * 2
    assert steps == (1, 1, 2, 2)
    assert {one.shape[2] for one in pictures} == {3}
    assert (pictures[0] != pictures[2]).any()  # another epoch, another map


@pytest.mark.parametrize("kind", ["log_image of the logger", "log_image of the client"])
def test_lightning_callback_and_other_loggers(kind):
    pytest.importorskip("lightning")
    said = []

    class Logger:
        run_id = "7"
        experiment = object()

    class Client:
        def log_image(self, run_id, pixels, key, step):
            said.append((run_id, pixels.shape, key, step))

    if kind == "log_image of the logger":
        Logger.log_image = lambda self, key, images, step: said.append(
            ("7", images[0].shape, key.replace("/", "-"), step)
        )
    else:
        Logger.experiment = Client()
    example("lightning_callback")["_log"](
        Logger(), "salience/0", torch.zeros(2, 3, 3).numpy(), step=5
    )
    assert said == [("7", (2, 3, 3), "salience-0", 5)]


def test_learning_rates_are_chosen_on_samples_that_are_not_tested():
    script = example("learning_rates_digits")
    splits = ["train"] * 30 + ["test"] * 10 + ["val"] * 5
    samples = (Sample(Path(str(n)), n % 2, split=name) for n, name in enumerate(splits))
    index = Index(Path("index.csv"), ("other", "eight"), tuple(samples))
    found = script["validation"](index, seed=0)
    assert {sample.path for sample in found.samples} == {Path(str(n)) for n in range(30)}
    assert [sum(one.label == label for one in found.split("test")) for label in (0, 1)] == [5, 5]


def test_each_method_is_tested_at_the_rate_that_validates_best():
    script = example("learning_rates_digits")
    rates, given = script["RATES"], script["GIVEN"]
    best = {"cross-entropy": given, "baseline": rates[-1], "contrast": rates[0]}
    found = {}
    for method, rate in best.items():
        for subset in ("3", "9"):
            for one in rates:
                found[f"validation/{method}/{subset}/0/{one}"] = 0.9 if one == rate else 0.5
            for seed, one in product((0, 1, 2), {given, rate}):
                area = 0.5 + 0.1 * (subset == "9") + 0.01 * seed + 0.1 * (method == "contrast")
                found[f"test/{method}/{subset}/{seed}/{one}"] = area - 0.2 * (one != rate)
    validation, tested = script["tables"](found)
    assert validation["rows"]["contrast"][str(rates[0])]["value"] == pytest.approx(0.9)
    row = tested["rows"]["contrast"]
    assert (row["learning rate"]["value"], row["AUROC"]["count"]) == (rates[0], 3)
    assert row["AUROC"]["value"] == pytest.approx(0.66)
    assert row[f"AUROC with {given}"]["value"] == pytest.approx(0.46)
    assert row["less the baseline's"]["value"] == pytest.approx(0.1)
    assert tested["rows"]["baseline"]["less the baseline's"] is None
    head = {"format": "diffsal-results", "format_version": 1, "command": "x"}
    schema = json.loads((EXAMPLES.parent / "docs/results/schema.json").read_text("utf-8"))
    jsonschema.validate(head | {"tables": [validation, tested]}, schema)


def test_space(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsal.demo.train_digits", partial(train_digits, epochs=1))
    main, served = example("space/app")["main"], []
    monkeypatch.setitem(
        main.__globals__, "serve", lambda *given, **how: served.append((given, how))
    )
    main(tmp_path)
    main(tmp_path)  # what was made at the first start is there
    for (loaded,), how in served:
        assert loaded.classes == ("3", "8")
        assert [path.name for path in how["examples"]] == sorted(
            ["image.png", *(f"digit-{number}.png" for number in range(5))]
        )
    front = (EXAMPLES / "space" / "README.md").read_text("utf-8").split("---")[1]
    assert f"app_port: {how['port']}\n" in front
    assert how["host"] == "0.0.0.0"
