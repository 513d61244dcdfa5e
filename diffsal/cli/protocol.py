"""``diffsal protocol run`` and ``diffsal protocol table``: training methods compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffsal.cli import options
from diffsal.errors import DiffsalError


@options.parsed
def _shard(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r} is not I/N, as 1/4")
    return int(parts[0]), int(parts[1])


@click.group()
def protocol() -> None:
    """Compare training methods over tasks, held-out subsets and seeds, as the paper does."""


@protocol.command("run")
@click.argument("config", type=options.FILE)
@click.option("--out", required=True, type=options.FOLDER, help="Folder of the results.")
@click.option("--jobs", type=options.COUNT, default=1, show_default=True, help="Jobs done at once.")
@click.option(
    "--shard",
    callback=_shard,
    metavar="I/N",
    help="Do every N-th job, from the I-th on; by itself under torchrun.",
)
@options.device
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Processes that prepare the images of each job.",
)
@options.as_json("Print what became of each job as JSON.")
@options.debug
def run_protocol(config: Path, out: Path, as_json: bool, **settings: Any) -> None:
    """Train and test what a TOML file says, or what is still missing of it.

    CONFIG is described in docs/protocol.md; examples are in examples/protocol. Each job leaves one
    file in the folder, so a run that was interrupted goes on when it is started again, and several
    machines can share a folder.
    """
    from diffsal.protocol.configuration import read_protocol
    from diffsal.protocol.jobs import run

    protocol = read_protocol(config)
    for task in protocol.tasks:
        options.with_notes(task.index)
    outcome = run(protocol, out, **settings)
    if as_json:
        found = {
            "done": list(map(str, outcome.done)),
            "there": list(map(str, outcome.there)),
            "failed": {str(job): error for job, error in outcome.failed},
        }
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo(
            f"{out}: {len(outcome.done)} jobs done, {len(outcome.there)} there before, "
            f"{len(outcome.failed)} failed"
        )
    for job, error in outcome.failed:
        click.echo(f"Error: {job}: {error}", err=True)
    if outcome.failed:
        raise SystemExit(options.SOME_FAILED if outcome.done or outcome.there else 1)


@protocol.command("table")
@click.argument("folder", type=options.FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "latex", "csv", "json"]),
    default="text",
    show_default=True,
)
@click.option(
    "--score",
    type=click.Choice(["margin", "softmax", "logit-1"]),
    default="margin",
    show_default=True,
    help="What samples are ranked by; logit-1 is the CYBORG script's.",
)
@click.option(
    "--baseline", metavar="METHOD", help="What other methods are compared to.  [default: baseline]"
)
@options.debug
def table_protocol(folder: Path, form: Any, score: Any, baseline: str | None) -> None:
    """Print the tables of a protocol's results, finished or not, and draw its plots.

    FOLDER is what `protocol run` wrote to; plots go to its folder plots.
    """
    from diffsal.protocol.formats import written
    from diffsal.protocol.results import draw, read_results
    from diffsal.protocol.tables import make_tables

    results = read_results(folder)
    click.echo(written(make_tables(results.protocol, results.jobs, score, baseline), form))
    if results.missing:
        click.echo(
            f"Note: {results.missing} jobs are missing; numbers are of those that are there",
            err=True,
        )
    try:
        for path in draw(results, folder, score):
            click.echo(path, err=True)
    except DiffsalError as error:  # the tables are printed, and may be all that is wanted
        click.echo(f"Note: no plots: {error}", err=True)
