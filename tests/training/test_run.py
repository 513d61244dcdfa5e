"""Runs: resumed, killed, shared by processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.samples import TINY, write_config

from diffsal.data.datasets import ImageDataset
from diffsal.data.index import Index, Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.data.splits import with_validation
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import load_model, save_checkpoint
from diffsal.training.config import Select, TrainingConfig
from diffsal.training.loop import Record, is_best, predict
from diffsal.training.losses import LOSSES, ContrastSalienceLoss
from diffsal.training.run import new_model, train

Refused = Callable[[str], AbstractContextManager[None]]
RUN = """
import sys
import torch
from diffsal.data.index import read_index
from diffsal.training.config import TrainingConfig
from diffsal.training.run import train

torch.set_num_threads(1)
train(read_index("index.csv"), sys.argv[1], TrainingConfig.from_toml(sys.argv[2]))
"""


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
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_that_ended_anywhere_goes_on_bit_for_bit(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tests/hostile/test_kills.py`` kills runs."""
    config = replace(TINY, epochs=5, select="best-auroc")

    def ends_in_the_fourth_epoch(history: Sequence[Record], select: Select) -> bool:
        if len(history) > 3:
            raise KeyboardInterrupt
        return is_best(history, select)

    with monkeypatch.context() as patch:
        patch.setattr("diffsal.training.run.is_best", ends_in_the_fourth_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(index, tmp_path / "ended", config)
    assert len(load(tmp_path / "ended" / "last.pt")["training"]["history"]) == 3
    # While it wrote: half a line, and a checkpoint that never got its name.
    log = tmp_path / "ended" / "log.jsonl"
    log.write_text(log.read_text() + '{"epoch": 9, "lo')
    (tmp_path / "ended" / ".scratch.pt").write_bytes(b"half")
    train(index, tmp_path / "ended", config, resume=True)

    train(index, tmp_path / "whole", config)
    assert not differences(tmp_path / "ended", tmp_path / "whole")
    assert records(tmp_path / "ended") == records(tmp_path / "whole")
    best = [flatten(load(tmp_path / name / "best.pt")) for name in ("ended", "whole")]
    assert all(torch.equal(v, best[1][k]) for k, v in best[0].items() if isinstance(v, Tensor))


@pytest.mark.slow
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
