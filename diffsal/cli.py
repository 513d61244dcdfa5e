"""The command line: parses and calls, nothing else. Modules that need torch load on use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from diffsal import __version__
from diffsal.errors import DiffsalError

if TYPE_CHECKING:
    from diffsal.images import Preprocessing
    from diffsal.models import LoadedModel

__all__ = ["main"]

SOME_FAILED = 3
_DEBUG = "diffsal.debug"

Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns what users can put right into one line; ``--debug`` shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DiffsalError as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Explain binary image classifiers by the difference of their classes' maps.

    Data goes to stdout, progress and notes to stderr. Exit status: 0 done, 1 nothing could be
    done, 2 wrong usage, 3 some inputs failed and the rest are done.
    """


def _remember_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value


_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_remember_debug,
    help="Show tracebacks of errors.",
)
_device = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N|mps"
)


def _numbers(count: int) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    def parse(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> Any:
        if text is None:
            return None
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, count):
            raise click.BadParameter(f"{text!r} is not {count} numbers with commas between them")
        return numbers * (count // len(numbers))

    return parse


def _size(
    _ctx: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    return int(parts[0]), int(parts[-1])


def _names(
    _ctx: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _model_options(command: Command) -> Command:
    """What it takes to load any model and feed it."""
    options = [
        click.option(
            "--model", required=True, type=click.Path(path_type=Path), help="Weights file."
        ),
        click.option(
            "--arch",
            metavar="NAME",
            help="Architecture, where the file does not tell: a name in torchvision, timm:NAME, "
            "or package.module:factory.",
        ),
        click.option(
            "--classes", callback=_names, metavar="A,B", help="Class names, in order of outputs."
        ),
        click.option("--target-layer", metavar="NAME", help="Layer of the maps.  [default: found]"),
        click.option(
            "--size", callback=_size, metavar="PIXELS", help="Input size, N or HEIGHTxWIDTH."
        ),
        click.option("--resize", type=click.Choice(["squash", "crop"]), help="How to get there."),
        click.option("--mean", callback=_numbers(3), metavar="R,G,B", help="Of the input, 0 to 1."),
        click.option("--std", callback=_numbers(3), metavar="R,G,B", help="Of the input, 0 to 1."),
        _device,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _load(
    model: Path,
    arch: str | None,
    target_layer: str | None,
    **given: Any,
) -> tuple[LoadedModel, Preprocessing]:
    from dataclasses import replace

    from diffsal.images import Preprocessing
    from diffsal.models import load_model

    loaded = load_model(model, arch=arch, target_layer=target_layer)
    for note in loaded.notes:
        click.echo(f"Note: {note}", err=True)
    chosen = {name: value for name, value in given.items() if value is not None}
    return loaded, replace(loaded.preprocessing or Preprocessing(), **chosen)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@_model_options
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
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("explanations"),
    show_default=True,
    help="Folder for what is written.",
)
@click.option("--recursive", is_flag=True, help="Look into folders' subfolders too.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
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
@click.option("--save-maps", is_flag=True, help="Write <stem>.npz with raw and normalised maps.")
@click.option("--overlays", is_flag=True, help="Write each panel as a PNG of the image's size.")
@click.option("--no-figure", is_flag=True, help="Write no <stem>.png.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest to stdout.")
@_debug
def explain(
    paths: tuple[Path, ...],
    model: Path,
    arch: str | None,
    classes: tuple[str, ...] | None,
    target_layer: str | None,
    size: tuple[int, int] | None,
    resize: str | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    device: str,
    true: str | None,
    false: str | None,
    weighting: Any,
    out: Path,
    recursive: bool,
    batch_size: int,
    workers: int,
    save_maps: bool,
    overlays: bool,
    no_figure: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show what speaks for and against a model's decision on each image, in logits.

    PATHS are images and folders of images. Each image gets a figure, and the folder a
    manifest.json with every number. `torchrun --nproc-per-node N -m diffsal explain ...` shares
    the images among processes.
    """
    from diffsal.devices import choose_device, process_rank
    from diffsal.explanations import Outputs, Settings, explain_images
    from diffsal.images import find_images

    images = find_images(paths, recursive)
    loaded, preprocessing = _load(
        model, arch, target_layer, size=size, resize=resize, mean=mean, std=std
    )
    settings = Settings(
        preprocessing=preprocessing,
        device=choose_device(device),
        classes=classes or loaded.classes,
        true=true,
        false=false,
        weighting=weighting,
        batch_size=batch_size,
        workers=workers,
        outputs=Outputs(figure=not no_figure, overlays=overlays, maps=save_maps),
    )
    manifest = explain_images(images, loaded, out, settings, overwrite)
    if process_rank()[0] == 0:
        _report(manifest, out, as_json)
    if manifest["failed"]:
        raise SystemExit(SOME_FAILED if manifest["explained"] else 1)


def _report(manifest: dict[str, Any], out: Path, as_json: bool) -> None:
    """Results to stdout, failures to stderr."""
    if as_json:
        click.echo(json.dumps(manifest, indent=2, ensure_ascii=False))
    for record in manifest["images"]:
        if "error" in record:
            click.echo(f"Error: {record['path']}: {record['error']}", err=True)
        elif not as_json:
            where = out / record["files"][0] if record["files"] else record["path"]
            click.echo(
                f"{where}: {record['predicted_name']} "
                f"(p = {record['probabilities'][record['predicted_class']]:.3f}), "
                f"{record['true_name']} over {record['false_name']} by {record['margin']:+.2f} "
                f"logits: {record['evidence_for']:+.2f} for, {record['evidence_against']:+.2f} "
                f"against, {record['residual']:+.2f} not on the map"
            )


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Folder for image, weights and explanation.",
)
@click.option(
    "--pretrained",
    is_flag=True,
    help="EfficientNet-Lite0 with ImageNet weights on photographs (extra `pretrained`).",
)
@_debug
def demo(out: Path, pretrained: bool) -> None:
    """Train a small network on handwritten digits and explain one; nothing is downloaded."""
    from diffsal.demo import run_demo

    run_demo(out, pretrained)
