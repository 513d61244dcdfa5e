"""``diffsal serve``: a local page to play with a model."""

from __future__ import annotations

from typing import Any

import click

from diffsal.cli import options


@click.command()
@options.model
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; another one lets other machines in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=7860,
    show_default=True,
    help="0: any that is free.",
)
@options.debug
def serve(host: str, port: int, **given: Any) -> None:
    """Open a page on which to drop images: what decides, and whether the map can lie.

    Listens on this machine alone, keeps images in memory, and fetches nothing from elsewhere. Ends
    with Ctrl-C. Needs the extra `serve`.
    """
    from diffsal.serving.run import serve as run

    loaded, preprocessing = options.load_with_preprocessing(**given)
    run(
        loaded,
        preprocessing,
        classes=given["classes"],
        device=given["device"],
        host=host,
        port=port,
        ready=click.echo,
    )
