"""The loop, runs and their resumption, on tiny networks and images written by the tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from diffsal.data import ImageDataset, Index, Sample, read_index, with_validation
from diffsal.images import Preprocessing
from diffsal.losses import LOSSES, ContrastSalienceLoss, CrossEntropyLoss
from diffsal.models import build_model, load_model, save_checkpoint
from diffsal.train import (
    EpochSampler,
    TrainingConfig,
    auroc,
    fit,
    is_best,
    new_model,
    predict,
    train,
)

Refused = Callable[[str], AbstractContextManager[None]]

TINY = TrainingConfig(
    architecture="torchvision:DenseNet",
    arguments={"growth_rate": 4, "block_config": [1, 1], "num_init_features": 8, "drop_rate": 0.2},
    weights="none",
    size=32,
    augment=("horizontal-flip",),
    epochs=4,
    batch_size=7,
    lr=0.05,
    schedule="cosine",
    device="cpu",
)
# No batch normalisation, whose statistics are of each process's share; no dropout, whose random
# numbers are each process's own.
PLAIN_NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""
RUN = """
import sys
import torch
from diffsal.data import read_index
from diffsal.train import TrainingConfig, train

torch.set_num_threads(1)
train(read_index("index.csv"), sys.argv[1], TrainingConfig.from_toml(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are then in one order, in this process and in those that the tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 noisy images, bright at the top or at the bottom; every other one with a human map."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = ["path,label,map"]
    for number in range(48):
        pixels = generator.integers(0, 160, (32, 32), np.uint8)
        half = np.zeros((32, 32), np.uint8)
        half[:16] = 255
        label = "bottom" if number % 3 else "top"
        bright = half[::-1] if number % 3 else half
        Image.fromarray(pixels + bright // 4).save(folder / f"{number}.png")
        Image.fromarray(bright).save(folder / f"map{number}.png")
        lines.append(f"{number}.png,{label},{f'map{number}.png' if number % 2 else ''}")
    (folder / "index.csv").write_text("\n".join(lines))
    (folder / "plain.py").write_text(PLAIN_NET)
    return folder


@pytest.fixture
def index(folder: Path) -> Index:
    return read_index(folder / "index.csv")


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def records(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in pairs for k, v in flatten(one, f"{name}.{key}").items()}
    return {name: value}


def differences(first: Path, second: Path) -> list[str]:
    """Names of what is not the same, bit for bit, in the last checkpoints of two runs."""
    one, other = (flatten(load(run / "last.pt")) for run in (first, second))
    assert one.keys() == other.keys()
    assert sum(isinstance(value, Tensor) for value in one.values()) > 10
    return [
        name
        for name, value in one.items()
        if not name.endswith(".seconds")
        and not (
            torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        )
    ]


def write_config(path: Path, config: TrainingConfig) -> None:
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    table = given.pop("arguments")
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
    lines += ["[arguments]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    path.write_text("\n".join(lines))


# ----------------------------------------------------------------------------------------- config


def test_a_configuration_goes_through_toml_and_the_overrides_win(tmp_path: Path) -> None:
    config = replace(TINY, alpha=0.4, mean=(0.5, 0.5, 0.5), amp="bf16")
    write_config(tmp_path / "config.toml", config)
    assert TrainingConfig.from_toml(tmp_path / "config.toml") == config
    changed = TrainingConfig.from_toml(tmp_path / "config.toml", epochs=9, augment=())
    assert changed == replace(config, epochs=9, augment=())
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "config.toml: the key 'epoch' is unknown; near: epochs"),
        ("epochs = '3'", "epochs must be int, not '3'"),
        ("epochs = true", "epochs must be int, not True"),
        ("epochs = 0", "epochs must be from 1"),
        ("lr = nan", "lr must be from 0"),
        ("alpha = -0.1", "alpha must be from 0"),
        ("schedule = 'linear'", "schedule must be one of none, step, cosine, not 'linear'"),
        ("method = 'contrst'", "must be one of cross-entropy, baseline.*, not 'contrst'"),
        ("augment = ['flip']", "must be one of horizontal-flip.*, not 'flip'"),
        ("augment = 'flip'", "augment must be"),
        ("mean = [0.5, 0.5]", "mean must be"),
        ("std = [0.5, 0.5, 0.0]", "std must be three positive"),
        ("method = 'difference'\ngamma = 0.3", "difference has no gamma"),
        ("method = 'cross-entropy'\nalpha = 0.3", "cross-entropy has no alpha"),
        ("epochs: 3", "config.toml: is no TOML"),
    ],
)
def test_bad_configurations(tmp_path: Path, refused: Refused, text: str, words: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with refused(words):
        TrainingConfig.from_toml(tmp_path / "config.toml")


def test_weights_and_pooling_reach_the_loss() -> None:
    criterion = TrainingConfig(alpha=0.5, pool="max").criterion()
    assert isinstance(criterion, ContrastSalienceLoss)
    assert criterion.weights == {"cross_entropy": 0.5, "true": 0.3, "contrast": 0.3}
    assert criterion.pool == "max"


# ------------------------------------------------------------------------------------------- loop


@pytest.mark.parametrize(("samples", "batch_size", "world"), [(23, 7, 1), (23, 7, 2), (8, 20, 3)])
def test_every_sample_is_drawn_once_by_one_process(
    samples: int, batch_size: int, world: int
) -> None:
    samplers = [EpochSampler(samples, batch_size, 5, rank, world) for rank in range(world)]
    single = EpochSampler(samples, batch_size, 5)
    orders = []
    for epoch in (1, 2):
        for sampler in (single, *samplers):
            sampler.epoch = epoch
        assert list(single) == list(single)
        joined = [list(chain(*parts)) for parts in zip(*samplers, strict=True)]
        assert joined == list(single)
        sizes = [len(batch) for batch in joined]
        assert sizes == single.sizes
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        orders.append(list(chain(*joined)))
        assert sorted(position for position, _ in orders[-1]) == list(range(samples))
    assert orders[0] != orders[1]
    assert dict(orders[0]) != dict(orders[1])  # the seeds
    for step in range(len(single)):
        assert sum(sampler.shares[step] for sampler in samplers) == pytest.approx(1)


def plain_model(folder: Path) -> nn.Module:
    torch.manual_seed(3)
    namespace: dict[str, Any] = {}
    exec((folder / "plain.py").read_text(), namespace)
    model: nn.Module = namespace["net"]()
    return model


def dataset_of(index: Index, samples: slice = slice(None)) -> ImageDataset:
    return ImageDataset(index.samples[samples], Preprocessing(size=(32, 32)))


def test_fit_is_sgd_on_the_loss(index: Index, folder: Path) -> None:
    """Against a loop written here, with cross-entropy and no capture."""
    config = replace(TINY, schedule="step", epochs=14, weight_decay=0.01, batch_size=20)
    dataset = dataset_of(index, slice(23))
    model, other = plain_model(folder), plain_model(folder)
    history = list(fit(model, CrossEntropyLoss(), dataset, None, config))

    velocity = [torch.zeros_like(parameter) for parameter in other.parameters()]
    sampler = EpochSampler(23, 20, config.seed)
    for epoch in range(1, 15):
        sampler.epoch = epoch
        total = 0.0
        for batch in sampler:
            images = torch.stack([dataset[position][0] for position, _ in batch])
            labels = torch.tensor([dataset[position][1] for position, _ in batch])
            loss = F.cross_entropy(other(images), labels)
            total += loss.item() * len(batch) / 23
            gradients = torch.autograd.grad(loss, list(other.parameters()))
            with torch.no_grad():
                for parameter, gradient, speed in zip(
                    other.parameters(), gradients, velocity, strict=True
                ):
                    speed.mul_(0.9).add_(gradient + 0.01 * parameter)
                    parameter -= (0.05 if epoch <= 12 else 0.005) * speed
        assert history[epoch - 1]["loss"] == pytest.approx(total, rel=1e-5)
        assert history[epoch - 1]["lr"] == pytest.approx(0.05 if epoch <= 12 else 0.005)
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", list(LOSSES))
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_every_method_logs_its_terms_and_learns(index: Index, method: str, amp: str) -> None:
    config = TrainingConfig.from_dict(
        {**TINY.to_dict(), "method": method, "amp": amp, "epochs": 5, "lr": 0.1, "arguments": {}}
    )
    torch.manual_seed(1)
    model = build_model("torchvision:DenseNet", {**TINY.arguments, "num_classes": 2})
    criterion, dataset = config.criterion(), dataset_of(index)
    history = list(fit(model, criterion, dataset, dataset, config))
    for number, record in enumerate(history, start=1):
        assert record["epoch"] == number
        weighted = sum(weight * record[name] for name, weight in criterion.weights.items())
        assert record["loss"] == pytest.approx(weighted, rel=1e-5)
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    assert history[-1]["auroc"] > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_frozen_batch_normalisation_keeps_its_statistics(index: Index) -> None:
    model = build_model("torchvision:DenseNet", {**TINY.arguments, "num_classes": 2})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for freezes in (True, False):
        config = replace(TINY, freeze_batchnorm=freezes, epochs=1)
        list(fit(model, CrossEntropyLoss(), dataset_of(index), None, config))
        same = [torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()]
        assert all(same) is freezes


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_predictions_and_their_auroc(index: Index, outputs: int) -> None:
    model = build_model("torchvision:DenseNet", {**TINY.arguments, "num_classes": outputs}).train()
    dataset = dataset_of(index)
    logits = predict(model, dataset, replace(TINY, workers=1))
    assert model.training
    with torch.no_grad():
        expected = model.eval()(torch.stack([dataset[n][0] for n in range(len(dataset))]))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)

    labels = np.arange(48) % max(outputs, 2)
    if outputs == 3:
        parts = [roc_auc_score(labels == k, logits.softmax(1)[:, k]) for k in range(3)]
        assert auroc(logits, labels.tolist()) == pytest.approx(np.mean(parts))
    else:
        scores = logits.sigmoid()[:, 0] if outputs == 1 else logits.softmax(1)[:, 1]
        assert auroc(logits, labels.tolist()) == pytest.approx(roc_auc_score(labels, scores))


def test_auroc_needs_every_class(refused: Refused) -> None:
    with refused("AUROC is undefined"):
        auroc(torch.randn(4, 2), [1, 1, 1, 1])


def test_the_first_of_the_best_epochs_is_selected() -> None:
    values = [0.5, 0.7, 0.6, 0.7, 0.8]
    history = [{"auroc": value, "accuracy": 1 - value} for value in values]
    prefixes = [history[: stop + 1] for stop in range(5)]
    for select, expected in (("last", 4), ("best-auroc", 4), ("best-accuracy", 0)):
        assert max(n for n in range(5) if is_best(prefixes[n], select)) == expected  # type: ignore[arg-type]
    assert [is_best(prefix, "best-auroc") for prefix in prefixes] == [
        True,
        True,
        False,
        False,
        True,
    ]


class Breaking(ContrastSalienceLoss):
    """Becomes NaN at one step."""

    steps_left = 10**9

    def terms(self, *arguments: Any) -> dict[str, Tensor]:
        Breaking.steps_left -= 1
        terms = super().terms(*arguments)
        terms["true"] = terms["true"] * (torch.nan if Breaking.steps_left == 0 else 1)
        return terms


def test_a_loss_that_is_not_finite_names_its_step_and_loses_no_finished_epoch(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    steps = 6  # 38 training samples
    with monkeypatch.context() as patch:
        patch.setitem(LOSSES, "contrast", Breaking)
        patch.setattr(Breaking, "steps_left", 2 * steps + 3)
        with refused("epoch 3, step 3: the loss is not finite"):
            train(index, tmp_path / "broken", TINY)
    assert [record["epoch"] for record in records(tmp_path / "broken")] == [1, 2]
    train(index, tmp_path / "broken", TINY, resume=True)
    train(index, tmp_path / "whole", TINY)
    assert not differences(tmp_path / "broken", tmp_path / "whole")


# ------------------------------------------------------------------------------------------- runs


def test_the_same_seed_gives_the_same_bits(index: Index, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"workers": 2}), ("c", {"seed": 1})):
        torch.manual_seed(hash(name))
        train(index, tmp_path / name, replace(TINY, **changes))
    assert not differences(tmp_path / "a", tmp_path / "b")
    assert any("state_dict" in name for name in differences(tmp_path / "a", tmp_path / "c"))
    assert records(tmp_path / "a") == records(tmp_path / "b")


def start(folder: Path, run: Path, config: TrainingConfig, *launcher: str) -> subprocess.Popen[str]:
    """Train in another process; a forked one could not use autograd where there is a GPU."""
    (folder / "run.py").write_text(RUN)
    write_config(folder / "config.toml", config)
    return subprocess.Popen(
        [sys.executable, *launcher, "run.py", run, "config.toml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_bit_for_bit(index: Index, folder: Path, tmp_path: Path) -> None:
    config = replace(TINY, epochs=20, select="best-auroc")
    log = tmp_path / "killed" / "log.jsonl"
    with start(folder, tmp_path / "killed", config) as process:
        while not log.exists() or log.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()  # SIGKILL
    finished = len(load(tmp_path / "killed" / "last.pt")["training"]["history"])
    assert 2 <= finished < 20
    # Killed while it wrote: half a line, and a checkpoint that never got its name.
    log.write_text(log.read_text() + '{"epoch": 9, "lo')
    (tmp_path / "killed" / ".scratch.pt").write_bytes(b"half")
    train(index, tmp_path / "killed", config, resume=True)

    train(index, tmp_path / "whole", config)
    assert not differences(tmp_path / "killed", tmp_path / "whole")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    best = [flatten(load(tmp_path / name / "best.pt")) for name in ("killed", "whole")]
    assert all(torch.equal(v, best[1][k]) for k, v in best[0].items() if isinstance(v, Tensor))


def test_two_processes_have_the_gradient_of_one(
    index: Index, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD's momentum buffers sum up the gradients of all steps, whose shares are 4 and 4, or 3."""
    monkeypatch.syspath_prepend(folder)
    config = replace(TINY, architecture="plain:net", arguments={}, epochs=3, batch_size=8)
    train(index, tmp_path / "one", config)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with start(folder, tmp_path / "two", config, *torchrun) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors

    one, two = (flatten(load(tmp_path / run / "last.pt")) for run in ("one", "two"))
    assert one.keys() == two.keys()
    tensors = [key for key, value in one.items() if isinstance(value, Tensor)]
    for key in tensors:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-6)
    assert any("momentum_buffer" in key and one[key].abs().max() > 1e-2 for key in tensors)
    for first, second in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert second == pytest.approx(first, abs=1e-6)


def test_a_run_is_read_without_options_and_is_the_selected_epoch(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TINY, select="best-accuracy", mean=(0.5, 0.5, 0.5), tensorboard=True)
    assert train(index, tmp_path, config) == tmp_path / "best.pt"
    loaded = load_model(tmp_path / "best.pt")
    assert loaded.classes == ("bottom", "top")
    assert loaded.preprocessing == Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5))
    assert loaded.target_layer.name == "features"
    assert load(tmp_path / "best.pt")["config"] == config.to_dict()
    assert list((tmp_path / "tensorboard").iterdir())

    log = records(tmp_path)
    assert capsys.readouterr().err.endswith(
        "epoch 4/4: loss {loss:.4f}, auroc {auroc:.4f}, accuracy {accuracy:.4f}\n".format(**log[-1])
    )
    assert [record["epoch"] for record in log] == [1, 2, 3, 4]
    assert log[0].keys() == {
        "epoch", "lr", "loss", "cross_entropy", "true", "contrast", "auroc", "accuracy"
    }  # fmt: skip
    validation = with_validation(index, config.validation, config.seed).split("val")
    logits = predict(loaded.model, ImageDataset(validation, loaded.preprocessing), config)
    right = logits.argmax(1) == torch.tensor([sample.label for sample in validation])
    assert float(right.double().mean()) == max(record["accuracy"] for record in log)


def test_resuming_a_finished_run_changes_nothing(
    index: Index, tmp_path: Path, refused: Refused
) -> None:
    config = replace(TINY, epochs=1)
    train(index, tmp_path, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(index, tmp_path, replace(config, workers=1), resume=True)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with refused("holds a run; --resume it"):
        train(index, tmp_path, config)
    with refused(r"last\.pt: its run has lr 0\.05, not 0\.1"):
        train(index, tmp_path, replace(config, lr=0.1), resume=True)
    with refused("its run has samples"):
        train(replace(index, samples=index.samples[:-1]), tmp_path, config, resume=True)


def test_a_fresh_last_layer_begins_small_whatever_the_architecture(
    index: Index, tmp_path: Path
) -> None:
    """This one draws two rows as wide as 0.7, whose logits would be about 10."""
    name, file = "timm:tf_efficientnet_lite0", tmp_path / "7.pt"
    arguments = {"num_classes": 7}
    save_checkpoint(file, build_model(name, arguments), architecture=name, arguments=arguments)
    config = replace(TINY, architecture=None, arguments={}, weights=str(file))
    model, _ = new_model(index, config)
    assert model.classifier.weight.shape == (2, 1280)
    assert model.classifier.weight.abs().max() <= 1280**-0.5


def test_weights_of_a_file_are_kept_but_for_another_last_layer(
    index: Index, tmp_path: Path, refused: Refused
) -> None:
    """At a learning rate of zero the run's model is the one that it began with."""
    still = replace(TINY, lr=0.0, epochs=1, architecture=None, arguments={}, freeze_batchnorm=True)
    for outputs, expected in ((1, 1), (2, 2), (7, 2)):
        arguments = {**TINY.arguments, "num_classes": outputs}
        model = build_model("torchvision:DenseNet", arguments)
        file = tmp_path / f"{outputs}.pt"
        save_checkpoint(
            file,
            model,
            architecture="torchvision:DenseNet",
            arguments=arguments,
            preprocessing=Preprocessing(size=(64, 64), std=(0.3, 0.3, 0.3)),
            classes=("top", "bottom") if outputs == 2 else None,
        )
        kept = replace(index, classes=("top", "bottom"))
        best = train(kept, tmp_path / str(outputs), replace(still, weights=str(file)))
        loaded = load_model(best)
        assert loaded.preprocessing == Preprocessing(size=(32, 32), std=(0.3, 0.3, 0.3))
        state = loaded.model.state_dict()
        assert len(state["classifier.weight"]) == expected
        for name, value in model.state_dict().items():
            same = outputs != 7 or not name.startswith("classifier")
            assert torch.equal(state[name], value) if same else state[name].shape != value.shape
    with refused("read it with --classes top,bottom"):
        train(index, tmp_path / "order", replace(still, weights=str(tmp_path / "2.pt")))


def test_bad_input_is_one_line(index: Index, tmp_path: Path, refused: Refused) -> None:
    def with_samples(change: Callable[[int, Sample], dict[str, Any]]) -> Index:
        samples = (replace(one, **change(n, one)) for n, one in enumerate(index.samples))
        return replace(index, samples=tuple(samples))

    one_class = with_samples(
        lambda n, sample: {"split": "val" if n % 5 == 0 and sample.label else "train"}
    )
    with refused(r"index\.csv: no sample of class 'bottom' is in the split val.*AUROC undefined"):
        train(one_class, tmp_path, TINY)
    with refused("no training sample has a human map.*contrast"):
        train(with_samples(lambda *_: {"map": None}), tmp_path, TINY)
    with refused("the model tells 7 classes apart, .*index.csv has 2; set num_classes"):
        train(index, tmp_path, replace(TINY, arguments={**TINY.arguments, "num_classes": 7}))
    with refused(r"missing\.pt: "):
        train(index, tmp_path, replace(TINY, weights=str(tmp_path / "missing.pt")))
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = with_samples(lambda n, one: {"path": tmp_path / "broken.png" if n == 9 else one.path})
    for workers in (0, 1):
        with refused(r"^[^ ]*broken\.png: "):
            train(broken, tmp_path / "run", replace(TINY, workers=workers))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_cross_entropy_reads_no_human_map(index: Index, tmp_path: Path) -> None:
    lost = [replace(one, map=tmp_path / "nowhere.png") for one in index.samples]
    train(
        replace(index, samples=tuple(lost)),
        tmp_path,
        replace(TINY, method="cross-entropy", epochs=1),
    )
    assert records(tmp_path)[0].keys() >= {"loss", "cross_entropy", "auroc"}
