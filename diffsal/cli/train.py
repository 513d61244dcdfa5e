"""``diffsal train``: with human salience maps, or with cross-entropy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffsal.cli import options


@click.command()
@options.index
@click.option(
    "--method",
    metavar="NAME",
    help="cross-entropy, baseline, difference, per-class or contrast.  [default: contrast]",
)
@click.option("--out", required=True, type=options.FOLDER, help="Folder of the run.")
@click.option(
    "--maps",
    type=options.FILE,
    help="Folder of human maps of the same names, where the index names none.",
)
@options.classes("Class names, in order.")
@click.option(
    "--arch", "architecture", metavar="NAME", help="As for explain.  [default: densenet121]"
)
@click.option(
    "--weights", metavar="DEFAULT|none|FILE", help="What to begin with.  [default: DEFAULT]"
)
@click.option("--epochs", type=int, help="[default: 50]")
@click.option("--batch-size", type=int, help="[default: 20]")
@click.option("--lr", type=float, help="[default: 0.002]")
@click.option("--momentum", type=float, help="[default: 0.9]")
@click.option("--weight-decay", type=float, help="[default: 1e-6]")
@click.option("--schedule", type=click.Choice(["none", "step", "cosine"]), help="[default: step]")
@click.option("--size", type=int, metavar="PIXELS", help="[default: 224]")
@click.option("--alpha", type=float, help="Weight of the cross-entropy.  [default: the paper's]")
@click.option("--beta", type=float, help="Weight of the human map.  [default: the paper's]")
@click.option("--gamma", type=float, help="Weight of the third term.  [default: the paper's]")
@click.option("--pool", type=click.Choice(["area", "max"]), help="Of human maps.  [default: area]")
@click.option(
    "--validation", type=float, help="Share held out, if the index has none.  [default: 0.2]"
)
@click.option(
    "--select",
    type=click.Choice(["last", "best-auroc", "best-accuracy"]),
    help="Epoch that best.pt holds.  [default: last]",
)
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--amp", type=click.Choice(["none", "bf16", "fp16"]), help="[default: none]")
@click.option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="[default: auto]")
@click.option("--workers", type=int, help="Processes that read images.  [default: 0]")
@click.option("--tensorboard", is_flag=True, default=None, help="Write a log for TensorBoard too.")
@click.option("--config", type=options.FILE, help="TOML; the command line wins.")
@click.option("--resume", is_flag=True, help="Go on after the last finished epoch.")
@options.as_json("Print the epochs' records as JSON.")
@options.debug
def train(
    index: Path,
    out: Path,
    maps: Path | None,
    classes: tuple[str, ...] | None,
    config: Path | None,
    resume: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a classifier with human salience maps, or with cross-entropy alone.

    INDEX is a CSV (path,label[,map][,subset][,group][,split]) or a folder of class folders. Under
    torchrun, several processes train one model. Defaults are the paper's; a TOML file's keys are
    the attributes of diffsal.training.config.TrainingConfig.
    """
    from diffsal.data.index import read_index
    from diffsal.system.files import check_writable
    from diffsal.system.processes import process_rank
    from diffsal.training.config import TrainingConfig
    from diffsal.training.run import LOG
    from diffsal.training.run import train as run

    check_writable(out)
    given = options.named(**settings)
    if config is None:
        chosen = TrainingConfig.from_dict(given, "command line")
    else:
        chosen = TrainingConfig.from_toml(config, **given)
    read = read_index(index, **options.named(maps=maps, classes=classes))
    best = run(options.with_notes(read), out, chosen, resume=resume)
    if process_rank()[0] == 0:
        epochs = [json.loads(line) for line in (out / LOG).read_text("utf-8").splitlines()]
        _report_training(best, epochs, as_json)


def _report_training(best: Path, epochs: list[dict[str, float]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"model": str(best), "epochs": epochs}, indent=2))
        return
    for record in epochs:
        numbers = (f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
        click.echo(f"epoch {record['epoch']}: {', '.join(numbers)}")
    click.echo(best)
