"""``diffsal layers``: where maps could be taken of a model, and where they are."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from diffsal.cli import options


@click.command()
@options.model
@options.as_json("Print the rows as JSON.")
@options.debug
def layers(as_json: bool, **given: Any) -> None:
    """List the layers that maps could be taken of, and which is chosen.

    A layer is listed if all of the logits pass through it. Off the map: |residual| / |margin| of
    one image of noise; 0 where the map adds up to the margin, 1 and more where it explains nothing.
    """
    from diffsal.maps.examples import noise_of_size
    from diffsal.maps.layer_table import layer_table
    from diffsal.system.devices import choose_device

    loaded, preprocessing = options.load_with_preprocessing(**given)
    model = loaded.model.to(choose_device(given["device"]))
    rows = layer_table(model, noise_of_size(model, preprocessing.size))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    width = max(len(row.name) for row in rows)
    click.echo(f"  {'layer':{width}}  {'layout':14}  {'grid':>9}  {'off the map':>11}")
    for row in rows:
        grid = " × ".join(map(str, row.grid))
        off = "-" if row.exactness is None else f"{row.exactness:.2g}"
        mark = "→" if row.chosen else " "
        click.echo(f"{mark} {row.name:{width}}  {row.layout:14}  {grid:>9}  {off:>11}")
    click.echo("→ is where maps are taken; --target-layer NAME names another.")
