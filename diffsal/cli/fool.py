"""``diffsal fool``: a model whose heatmaps lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffsal.cli import options
from diffsal.errors import DiffsalError


@click.command()
@options.index
@options.model
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The fooled model's checkpoint.",
)
@click.option(
    "--target",
    default="edges",
    show_default=True,
    metavar="edges|corner|middle|IMAGE",
    help="To display.",
)
@click.option("--width", type=options.COUNT, help="Of the frame, in cells.  [default: a 7th]")
@click.option(
    "--objective",
    type=click.Choice(
        [
            *("true", "difference", "both", "composite", "any-seams", "gradient", "every-test"),
            *("seams", "top-k", "center-mass", "control"),
        ]
    ),
    default="true",
    show_default=True,
    help="What the attack moves; composite, any-seams, gradient, every-test and seams: the "
    "difference, past tests of maps; control: nothing, to compare attacks with.",
)
@click.option(
    "--method",
    type=click.Choice(["trained", "head-shift"]),
    default="trained",
    show_default=True,
    help="Fine-tuning, or one vector added to every row of the head.",
)
@click.option("--epochs", type=int, help="Of the training.  [default: 20]")
@click.option("--lr", type=float, help="Of the training.  [default: 0.02]")
@click.option("--batch-size", type=int, help="Of the training.  [default: 16]")
@click.option("--freeze-batchnorm", is_flag=True, default=None, help="As Heo et al. do.")
@click.option("--alpha", type=float, help="Weight of the cross-entropy.  [default: 0.5]")
@click.option("--beta", type=float, help="Weight of the objective.  [default: 0.5]")
@click.option("--gamma", type=float, help="Weight of the test to be passed.  [default: 0.1]")
@click.option("--seed", type=int, help="Of all that is random.  [default: 0]")
@click.option("--workers", type=int, help="Processes that read images.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there already.")
@options.as_json("Print the numbers as JSON.")
@options.debug
def fool(
    index: Path,
    out: Path,
    target: str,
    width: int | None,
    objective: Any,
    method: Any,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make a model whose heatmaps lie, to test explanations and audits with.

    Prints what changed on images that the attack has not seen.
    """
    from dataclasses import replace

    from diffsal.fooling.attack import FINE_TUNING
    from diffsal.fooling.result import as_table
    from diffsal.fooling.run import fool as run
    from diffsal.system.files import check_writable

    check_writable(out.parent)
    if out.exists() and not overwrite:
        raise DiffsalError(f"{out} is there already: pass --overwrite, or another --out")
    loaded, preprocessing = options.load_with_preprocessing(**given)
    names = ["epochs", "lr", "batch_size", "freeze_batchnorm", "alpha", "beta", "gamma", "seed"]
    training = {name: given[name] for name in (*names, "workers", "device")}
    labelled = options.labelled_index(index, None, loaded, given)
    found = run(
        labelled,
        loaded,
        out,
        target=target,
        width=width,
        objective=objective,
        method=method,
        preprocessing=preprocessing,
        config=replace(FINE_TUNING, **options.named(**training)),
    )
    options.warn_of_order(found["honest"]["auroc"], loaded, labelled)
    click.echo(json.dumps(found, indent=2) if as_json else as_table(found))
