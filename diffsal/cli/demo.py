"""``diffsal demo``: a first picture, from nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from diffsal.cli import options
from diffsal.cli.explain import explain


@click.command()
@click.option(
    "--out",
    type=options.FOLDER,
    default=Path("demo"),
    show_default=True,
    help="Folder for image, weights and explanation.",
)
@click.option(
    "--pretrained",
    is_flag=True,
    help="EfficientNet-Lite0 with ImageNet weights on photographs (extra `pretrained`).",
)
@options.debug
def demo(out: Path, pretrained: bool) -> None:
    """Train a small network on handwritten digits and explain one; nothing is downloaded."""
    from diffsal.demo import write_demo

    images, weights = write_demo(out, pretrained)
    names = [image.name for image in images]
    words = [*names, "--model", weights.name, "--overwrite"]
    click.echo(f"\ncd {out}\n$ diffsal explain {shlex.join(words)}")
    # The very command, but in this process: another one would import everything again.
    with _inside(out):
        explain.main(words, standalone_mode=False)
    for name in names:
        click.echo(f"\nLook at {out / 'explanations' / name}")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
