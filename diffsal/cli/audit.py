"""``diffsal audit``: can a model's heatmaps be believed?"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsal.cli import options

if TYPE_CHECKING:
    from diffsal.auditing.settings import Occluders


@click.command()
@options.index
@options.model
@click.option("--maps", type=options.FILE, help="Folder of human maps, if the index has none.")
@click.option("--out", required=True, type=options.FOLDER, help="Folder.")
@click.option("--reference", type=options.FILE, help="Weights of a model to set beside it.")
@click.option("--reference-arch", metavar="NAME", help="Its architecture, as --arch.")
@click.option("--limit", type=options.COUNT, help="At most so many images, drawn at random.")
@click.option(
    "--precision",
    type=click.FloatRange(0, min_open=True),
    default=0.15,
    show_default=True,
    help="Slow tests take more images until 95 % intervals of their means are no wider than this "
    "to either side.",
)
@click.option(
    "--occluder",
    multiple=True,
    type=click.Choice(["mean", "blur", "noise", "transplant"]),
    default=("blur", "transplant"),
    show_default=True,
    help="What takes the place of cells, beside the mean colour. May be given several times.",
)
@click.option("--batch-size", type=options.COUNT, help="[default: 64, on a CPU 8]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--fail-on",
    multiple=True,
    metavar="'NAME < NUMBER'",
    help="Exit with status 4 where a number of audit.json is so, and write junit.xml. May be given "
    "several times.",
)
@options.overwrite
@options.as_json("Print audit.json to stdout.")
@options.debug
def audit(
    index: Path,
    maps: Path | None,
    out: Path,
    reference: Path | None,
    reference_arch: str | None,
    limit: int | None,
    precision: float,
    occluder: tuple[Occluders, ...],
    batch_size: int | None,
    seed: int,
    fail_on: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell whether a model's heatmaps can be believed, in numbers and a page to send.

    INDEX is a CSV (path,label[,map][,subset][,group][,split]) or a folder of class folders. Writes
    report.html, audit.json and per-image.csv, and audit.log on the way. `torchrun
    --nproc-per-node N -m diffsal audit ...` shares the slow tests among processes.
    """
    from diffsal.auditing.run import audit as run
    from diffsal.auditing.settings import Settings, usual_batch_size
    from diffsal.auditing.thresholds import failures, junit, parse_threshold
    from diffsal.models.checkpoints import load_model
    from diffsal.system.devices import choose_device
    from diffsal.system.files import check_writable, replacing
    from diffsal.system.processes import process_rank
    from diffsal.system.progress import logged

    check_writable(out)
    share = process_rank()
    thresholds = [parse_threshold(text) for text in fail_on]
    loaded, preprocessing = options.load_with_preprocessing(**given)
    trusted = given["trust_arguments"]
    other = (
        load_model(reference, arch=reference_arch, trust_arguments=trusted) if reference else None
    )
    device = choose_device(given["device"])
    settings = Settings(
        preprocessing=preprocessing,
        device=device,
        limit=limit,
        precision=precision,
        occluders=occluder,
        batch_size=batch_size or usual_batch_size(device),
        seed=seed,
        share=share,
    )
    labelled = options.labelled_index(index, maps, loaded, given)
    is_told = share[0] == 0 and not sys.stderr.isatty()
    with logged(logging.StreamHandler()) if is_told else nullcontext():
        found = run(labelled, loaded, out, settings, other, overwrite)
    if share[0] > 0:
        return
    numbers = {one["name"]: one["mean"] for part in found["findings"] for one in part["numbers"]}
    options.warn_of_order(numbers.get("auroc"), loaded, labelled)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(found["summary"]))
        click.echo(out / "report.html")
    failed = failures(thresholds, found)
    if thresholds:
        with replacing(out / "junit.xml") as path:
            path.write_text(junit(thresholds, failed), encoding="utf-8", errors="backslashreplace")
    for failure in found["failed"]:
        click.echo(f"Error: {failure['path']}: {failure['error']}", err=True)
    for sentence in failed.values():
        click.echo(f"Failed: {sentence}", err=True)
    if failed:
        raise SystemExit(options.THRESHOLD_FAILED)
    if found["failed"]:
        raise SystemExit(options.SOME_FAILED)
