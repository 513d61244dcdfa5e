"""``diffsal explain``: what speaks for and against a decision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from diffsal.cli import options


@click.command()
@click.argument("paths", nargs=-1, required=True, type=options.FILE)
@options.model
@click.option(
    "--true", metavar="CLASS", help="Taken as true, by name or index.  [default: predicted]"
)
@click.option(
    "--false",
    metavar="CLASS",
    help="Set against it: a class, runner-up or rest.  [default: the other one, runner-up of more]",
)
@click.option(
    "--weighting",
    type=click.Choice(["elementwise", "channel_mean", "xgrad"]),
    default="elementwise",
    show_default=True,
    help="How gradients weigh activations.",
)
@click.option(
    "--out",
    type=options.FOLDER,
    default=Path("explanations"),
    show_default=True,
    help="Folder for what is written.",
)
@click.option("--recursive", is_flag=True, help="Look into folders' subfolders too.")
@click.option(
    "--batch-size",
    type=options.COUNT,
    default=8,
    show_default=True,
    help="Images in one forward pass.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Processes that read images and draw.",
)
@click.option("--save-maps", is_flag=True, help="Write <stem>.npz with the raw maps.")
@click.option(
    "--save-resized-maps",
    is_flag=True,
    help="Write <stem>.npz with maps at the image's size, too, in [0, 1].",
)
@click.option("--overlays", is_flag=True, help="Write each panel as a PNG of the image's size.")
@click.option("--no-figure", is_flag=True, help="Write no <stem>.png.")
@options.overwrite
@options.as_json("Print the manifest to stdout.")
@options.debug
def explain(
    paths: tuple[Path, ...],
    true: str | None,
    false: str | None,
    weighting: Any,
    out: Path,
    recursive: bool,
    batch_size: int,
    workers: int,
    save_maps: bool,
    save_resized_maps: bool,
    overlays: bool,
    no_figure: bool,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what speaks for and against a model's decision on each image, in logits.

    PATHS are images and folders of images. Each image gets a figure, and the folder a
    manifest.json with every number. `torchrun --nproc-per-node N -m diffsal explain ...` shares
    the images among processes.
    """
    from diffsal.data.images import find_images
    from diffsal.explaining.explanations import MANIFEST, Settings, explain_images
    from diffsal.explaining.one_image import Outputs
    from diffsal.system.devices import choose_device
    from diffsal.system.files import check_writable
    from diffsal.system.processes import process_rank

    check_writable(out)
    images = find_images(paths, recursive)
    if (out / MANIFEST).exists():  # pictures of an earlier run are no images to explain
        images = [image for image in images if out.resolve() not in image.resolve().parents]
    loaded, preprocessing = options.load_with_preprocessing(**given)
    settings = Settings(
        preprocessing=preprocessing,
        device=choose_device(given["device"]),
        classes=given["classes"] or loaded.classes,
        true=true,
        false=false,
        weighting=weighting,
        batch_size=batch_size,
        workers=workers,
        outputs=Outputs(
            figure=not no_figure,
            overlays=overlays,
            maps=save_maps,
            resized_maps=save_resized_maps,
        ),
    )
    manifest = explain_images(images, loaded, out, settings, overwrite)
    if process_rank()[0] == 0:
        _report(manifest, out, as_json)
    if manifest["failed"]:
        raise SystemExit(options.SOME_FAILED if manifest["explained"] else 1)


def _report(manifest: dict[str, Any], out: Path, as_json: bool) -> None:
    """Results to stdout, failures to stderr."""
    from diffsal.maps.numbers import signed

    if as_json:
        click.echo(json.dumps(manifest, indent=2, ensure_ascii=False))
    for record in manifest["images"]:
        if "error" in record:
            click.echo(f"Error: {record['path']}: {record['error']}", err=True)
        elif not as_json:
            where = out / record["files"][0] if record["files"] else record["path"]
            told = ("margin", "evidence_for", "evidence_against", "residual")
            margin, above, below, missing = signed(*(record[name] for name in told))
            click.echo(
                f"{where}: {record['predicted_name']} "
                f"(p = {record['probabilities'][record['predicted_class']]:.3f}), "
                f"{record['true_name']} over {record['false_name']} by {margin} "
                f"logits: {above} for, {below} against, {missing} not on the map"
            )
            for caveat in record["caveats"]:
                click.echo(f"  {caveat}")
