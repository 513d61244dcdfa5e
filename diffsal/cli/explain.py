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
    from diffsal.data import Index
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
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} has an empty name, or one twice")
    return names


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
    model: Path, arch: str | None, target_layer: str | None, **given: Any
) -> tuple[LoadedModel, Preprocessing]:
    """The model, with notes on what its file does not tell, and how images come to its input."""
    from dataclasses import replace

    from diffsal.images import Preprocessing
    from diffsal.models import check_class_order, load_model

    loaded = load_model(model, arch=arch, target_layer=target_layer)
    if given["classes"]:
        check_class_order(loaded, given["classes"], "--classes")
    for note in loaded.notes:
        click.echo(f"Note: {note}", err=True)
    chosen = _given(**{name: given[name] for name in ("size", "resize", "mean", "std")})
    return loaded, replace(loaded.preprocessing or Preprocessing(), **chosen)


def _given(**options: Any) -> dict[str, Any]:
    """The options that the command line names; the rest is left to the file or the defaults."""
    return {name: value for name, value in options.items() if value is not None}


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
    **given: Any,
) -> None:
    """Show what speaks for and against a model's decision on each image, in logits.

    PATHS are images and folders of images. Each image gets a figure, and the folder a
    manifest.json with every number. `torchrun --nproc-per-node N -m diffsal explain ...` shares
    the images among processes.
    """
    from diffsal.devices import choose_device, process_rank
    from diffsal.explanations import MANIFEST, Outputs, Settings, explain_images
    from diffsal.files import check_writable
    from diffsal.images import find_images

    check_writable(out)
    images = find_images(paths, recursive)
    if (out / MANIFEST).exists():  # pictures of an earlier run are no images to explain
        images = [image for image in images if out.resolve() not in image.resolve().parents]
    loaded, preprocessing = _load(**given)
    settings = Settings(
        preprocessing=preprocessing,
        device=choose_device(given["device"]),
        classes=given["classes"] or loaded.classes,
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


@main.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.option(
    "--method",
    metavar="NAME",
    help="cross-entropy, baseline, difference, per-class or contrast.  [default: contrast]",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run.",
)
@click.option(
    "--maps",
    type=click.Path(path_type=Path),
    help="Folder of human maps of the same names, where the index names none.",
)
@click.option("--classes", callback=_names, metavar="A,B", help="Class names, in order.")
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
@click.option("--config", type=click.Path(path_type=Path), help="TOML; the command line wins.")
@click.option("--resume", is_flag=True, help="Go on after the last finished epoch.")
@click.option("--json", "as_json", is_flag=True, help="Print the epochs' records as JSON.")
@_debug
def train(
    index: Path,
    out: Path,
    maps: Path | None,
    classes: tuple[str, ...] | None,
    config: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a classifier with human salience maps, or with cross-entropy alone.

    INDEX is a CSV (path,label[,map][,subset][,group][,split]) or a folder of class folders. Under
    torchrun, several processes train one model. Defaults are the paper's; a TOML file's keys are
    the attributes of diffsal.train.TrainingConfig.
    """
    from diffsal.data import read_index
    from diffsal.devices import process_rank
    from diffsal.files import check_writable
    from diffsal.train import LOG, TrainingConfig
    from diffsal.train import train as run

    check_writable(out)
    given = _given(**options)
    if config is None:
        chosen = TrainingConfig.from_dict(given, "command line")
    else:
        chosen = TrainingConfig.from_toml(config, **given)
    best = run(read_index(index, **_given(maps=maps, classes=classes)), out, chosen, resume=resume)
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


def _index(path: Path, maps: Path | None, loaded: LoadedModel, given: dict[str, Any]) -> Index:
    """The index, with labels in the order of the model's outputs where their names are known."""
    from diffsal.data import read_index

    return read_index(path, **_given(maps=maps, classes=given["classes"] or loaded.classes))


@main.command()
@click.argument("index", type=click.Path(path_type=Path))
@_model_options
@click.option(
    "--maps", type=click.Path(path_type=Path), help="Folder of human maps, if the index has none."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder."
)
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Weights of a model to set beside it."
)
@click.option("--reference-arch", metavar="NAME", help="Its architecture, as --arch.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images, drawn at random.")
@click.option(
    "--subset",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Images for the slow methods, ROAD and randomisation.",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@click.option("--json", "as_json", is_flag=True, help="Print audit.json to stdout.")
@_debug
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
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell whether a model's heatmaps can be believed, in numbers and a page to send.

    INDEX is a CSV (path,label[,map][,subset][,group][,split]) or a folder of class folders. Writes
    report.html, audit.json and per-image.csv.
    """
    from diffsal.audit import Settings
    from diffsal.audit import audit as run
    from diffsal.devices import choose_device
    from diffsal.files import check_writable
    from diffsal.models import load_model

    check_writable(out)
    loaded, preprocessing = _load(**given)
    other = load_model(reference, arch=reference_arch) if reference else None
    settings = Settings(
        preprocessing=preprocessing,
        device=choose_device(given["device"]),
        limit=limit,
        subset=subset,
        batch_size=batch_size,
        seed=seed,
    )
    found = run(_index(index, maps, loaded, given), loaded, out, settings, other, overwrite)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(found["summary"]))
        click.echo(out / "report.html")
    for failure in found["failed"]:
        click.echo(f"Error: {failure['path']}: {failure['error']}", err=True)
    if found["failed"]:
        raise SystemExit(SOME_FAILED)


def _shard(
    _ctx: click.Context, _parameter: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r} is not I/N, as 1/4")
    return int(parts[0]), int(parts[1])


@main.group()
def protocol() -> None:
    """Compare training methods over tasks, held-out subsets and seeds, as the paper does."""


@protocol.command("run")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results.",
)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Jobs done at once."
)
@click.option(
    "--shard",
    callback=_shard,
    metavar="I/N",
    help="Do every N-th job, from the I-th on; by itself under torchrun.",
)
@_device
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Processes that prepare the images of each job.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what became of each job as JSON.")
@_debug
def run_protocol(config: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Train and test what a TOML file says, or what is still missing of it.

    CONFIG is described in docs/protocol.md; examples are in examples/protocol. Each job leaves one
    file in the folder, so a run that was interrupted goes on when it is started again, and several
    machines can share a folder.
    """
    from diffsal.protocol import read_protocol, run

    outcome = run(read_protocol(config), out, **options)
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
        raise SystemExit(SOME_FAILED if outcome.done or outcome.there else 1)


@protocol.command("table")
@click.argument("folder", type=click.Path(path_type=Path))
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
@_debug
def table_protocol(folder: Path, form: Any, score: Any, baseline: str | None) -> None:
    """Print the tables of a protocol's results, finished or not, and draw its plots.

    FOLDER is what `protocol run` wrote to; plots go to its folder plots.
    """
    from diffsal.protocol import draw, read_results
    from diffsal.tables import make_tables, written

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


@main.command()
@click.argument("index", type=click.Path(path_type=Path))
@_model_options
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The fooled model's checkpoint.",
)
@click.option(
    "--target", default="edges", show_default=True, metavar="edges|corner|IMAGE", help="To display."
)
@click.option("--width", type=click.IntRange(1), help="Of the frame, in cells.  [default: a 7th]")
@click.option(
    "--objective",
    type=click.Choice(["true", "difference", "both", "top-k", "center-mass"]),
    default="true",
    show_default=True,
    help="What the attack moves.",
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
@click.option("--seed", type=int, help="Of all that is random.  [default: 0]")
@click.option("--workers", type=int, help="Processes that read images.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@_debug
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

    from diffsal.files import check_writable
    from diffsal.fooling import FINE_TUNING, as_table
    from diffsal.fooling import fool as run

    check_writable(out.parent)
    if out.exists() and not overwrite:
        raise DiffsalError(f"{out} is there already: pass --overwrite, or another --out")
    loaded, preprocessing = _load(**given)
    names = ("epochs", "lr", "batch_size", "freeze_batchnorm", "alpha", "beta", "seed", "workers")
    training = {name: given[name] for name in (*names, "device")}
    found = run(
        _index(index, None, loaded, given),
        loaded,
        out,
        target=target,
        width=width,
        objective=objective,
        method=method,
        preprocessing=preprocessing,
        config=replace(FINE_TUNING, **_given(**training)),
    )
    click.echo(json.dumps(found, indent=2) if as_json else as_table(found))
