"""``diffsal demo``: a first picture, from nothing."""

from __future__ import annotations

from pathlib import Path

import click

from diffsal.cli import options


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
    from diffsal.demo import run_demo

    run_demo(out, pretrained)
