"""``diffsal audit``: can a model's heatmaps be believed?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffsal.cli import options


@click.command()
@options.index
@options.model
@click.option("--maps", type=options.FILE, help="Folder of human maps, if the index has none.")
@click.option("--out", required=True, type=options.FOLDER, help="Folder.")
@click.option("--reference", type=options.FILE, help="Weights of a model to set beside it.")
@click.option("--reference-arch", metavar="NAME", help="Its architecture, as --arch.")
@click.option("--limit", type=options.COUNT, help="At most so many images, drawn at random.")
@click.option(
    "--subset",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Images for the slow methods, ROAD and randomisation.",
)
@click.option("--batch-size", type=options.COUNT, default=64, show_default=True)
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
    subset: int,
    batch_size: int,
    seed: int,
    fail_on: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell whether a model's heatmaps can be believed, in numbers and a page to send.

    INDEX is a CSV (path,label[,map][,subset][,group][,split]) or a folder of class folders. Writes
    report.html, audit.json and per-image.csv.
    """
    from diffsal.auditing.run import audit as run
    from diffsal.auditing.settings import Settings
    from diffsal.auditing.thresholds import failures, junit, parse_threshold
    from diffsal.models.checkpoints import load_model
    from diffsal.system.devices import choose_device
    from diffsal.system.files import check_writable, replacing

    check_writable(out)
    thresholds = [parse_threshold(text) for text in fail_on]
    loaded, preprocessing = options.load_with_preprocessing(**given)
    trusted = given["trust_arguments"]
    other = (
        load_model(reference, arch=reference_arch, trust_arguments=trusted) if reference else None
    )
    settings = Settings(
        preprocessing=preprocessing,
        device=choose_device(given["device"]),
        limit=limit,
        subset=subset,
        batch_size=batch_size,
        seed=seed,
    )
    labelled = options.labelled_index(index, maps, loaded, given)
    found = run(labelled, loaded, out, settings, other, overwrite)
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
