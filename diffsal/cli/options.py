"""What several commands share: options, and the model and the index that these name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from diffsal.data.index import Index
    from diffsal.data.preprocessing import Preprocessing
    from diffsal.models.checkpoints import LoadedModel


SOME_FAILED = 3
"""The exit status where some inputs failed and the rest are done."""
THRESHOLD_FAILED = 4
"""The exit status where a number fails a threshold that the user set."""
DEBUG = "diffsal.debug"
"""Where click's context remembers whether tracebacks are wanted."""

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(1)

Command = TypeVar("Command", bound=Callable[..., Any])


def _remember_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value


debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_remember_debug,
    help="Show tracebacks of errors.",
)
device = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N|mps"
)
index = click.argument("index", type=FILE)
overwrite = click.option("--overwrite", is_flag=True, help="Replace files that are there already.")


def as_json(help_text: str) -> Callable[[Command], Command]:
    """``--json``: what is printed to stdout, for programs."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def parsed(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """Makes a click callback of what parses a text; an option that is not given stays ``None``.

    Example:
        >>> callback = parsed(int)
        >>> callback(None, None, "7"), callback(None, None, None)
        (7, None)
    """

    def callback(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> Any:
        return None if text is None else parse(text)

    return callback


@parsed
def _rgb(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise click.BadParameter(f"{text!r} is not 3 numbers with commas between them")
    return numbers * (3 // len(numbers))


@parsed
def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise click.BadParameter(f"{text!r} is neither a number of pixels nor HEIGHTxWIDTH")
    return int(parts[0]), int(parts[-1])


@parsed
def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} has an empty name, or one twice")
    return names


def classes(help_text: str) -> Callable[[Command], Command]:
    """``--classes A,B``."""
    return click.option("--classes", callback=_names, metavar="A,B", help=help_text)


def model(command: Command) -> Command:
    """What it takes to load any model and feed it."""
    options = [
        click.option("--model", required=True, type=FILE, help="Weights file, or hub folder."),
        click.option(
            "--arch",
            metavar="NAME",
            help="Architecture, where the file does not tell: a name in torchvision, timm:NAME, "
            "or package.module:factory.",
        ),
        click.option(
            "--trust-arguments",
            is_flag=True,
            help="Call package.module:factory with the arguments that the file holds.",
        ),
        classes("Class names, in order of outputs."),
        click.option("--target-layer", metavar="NAME", help="Layer of the maps.  [default: found]"),
        click.option(
            "--reshape",
            metavar="tokens:PREFIX|channels-last|none",
            help="How the named layer's output lies over the image.  [default: found]",
        ),
        click.option(
            "--outputs",
            type=click.Choice(["logits", "probabilities"]),
            help="What the model returns.  [default: told from how it is made]",
        ),
        click.option(
            "--size",
            callback=_size,
            metavar="PIXELS",
            help="Input size, N or HEIGHTxWIDTH.",
        ),
        click.option("--resize", type=click.Choice(["squash", "crop"]), help="How to get there."),
        click.option("--mean", callback=_rgb, metavar="R,G,B", help="Of the input, 0 to 1."),
        click.option("--std", callback=_rgb, metavar="R,G,B", help="Of the input, 0 to 1."),
        device,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def load_with_preprocessing(
    model: Path, arch: str | None, target_layer: str | None, **given: Any
) -> tuple[LoadedModel, Preprocessing]:
    """The model, with notes on what its file does not tell, and how images come to its input."""
    from dataclasses import replace

    from diffsal.data.preprocessing import Preprocessing
    from diffsal.models.checkpoints import UNNAMED, check_class_order, load_model

    trusted = given["trust_arguments"]
    loaded = load_model(model, arch=arch, target_layer=target_layer, trust_arguments=trusted)
    if given["classes"]:
        check_class_order(loaded, given["classes"], "--classes")
    loaded = _as_told(loaded, target_layer, given["reshape"], given["outputs"])
    for note in loaded.notes:
        if note == UNNAMED and given["classes"]:
            note = _assumed_order(loaded, given["classes"])
        click.echo(f"Note: {note}", err=True)
    chosen = named(**{name: given[name] for name in ("size", "resize", "mean", "std")})
    return loaded, replace(loaded.preprocessing or Preprocessing(), **chosen)


def _as_told(
    loaded: LoadedModel, target_layer: str | None, reshape: str | None, outputs: Any
) -> LoadedModel:
    """The model with what the user knows of its outputs and of the layer that is named."""
    from dataclasses import replace

    from diffsal.maps.layouts import layout_from_word
    from diffsal.maps.outputs import declare_outputs

    declare_outputs(loaded.model, outputs)
    layer = loaded.target_layer  # one that is missing is told before any work is done
    if reshape is not None:
        if target_layer is None:
            raise click.UsageError("--reshape is for a layer that --target-layer names")
        layer = replace(layer, reshape=layout_from_word(reshape))
    return replace(loaded, layer=layer)


def _assumed_order(loaded: LoadedModel, classes: tuple[str, ...]) -> str:
    if loaded.arguments.get("num_classes") == 1 and len(classes) == 2:
        return f"assumed: the output is the logit of {classes[1]}, against {classes[0]}"
    outputs = (f"output {output} = {name}" for output, name in enumerate(classes))
    return f"assumed: {', '.join(outputs)}"


def warn_of_order(auroc: float | None, loaded: LoadedModel, index: Index) -> None:
    """Say on stderr that ranks below chance may come of the classes' order, unless it is known."""
    if auroc is not None and auroc < 0.5 and set(loaded.classes or ()) != set(index.classes):
        click.echo(
            f"Warning: the area under the ROC curve is {auroc:.3f}, below chance: the classes may "
            f"be in the other order; assumed is --classes {','.join(index.classes)}",
            err=True,
        )


def named(**options: Any) -> dict[str, Any]:
    """The options that the command line names; the rest is left to the file or the defaults.

    Example:
        >>> named(epochs=3, lr=None)
        {'epochs': 3}
    """
    return {name: value for name, value in options.items() if value is not None}


def labelled_index(
    path: Path, maps: Path | None, loaded: LoadedModel, given: dict[str, Any]
) -> Index:
    """The index, with labels in the order of the model's outputs where their names are known."""
    from diffsal.data.index import read_index

    given_or_own = given["classes"] or loaded.classes
    return with_notes(read_index(path, **named(maps=maps, classes=given_or_own)))


def with_notes(index: Index) -> Index:
    """The index, after its notes are said on stderr, and what is odd about its files."""
    from diffsal.data.oddities import oddities

    for note in (*index.notes, *oddities(index.samples)):
        click.echo(f"Note: {note}", err=True)
    return index
