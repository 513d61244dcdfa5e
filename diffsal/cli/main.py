"""The command line's root: collects the commands, turns errors into one line."""

from __future__ import annotations

import errno
import sys
from io import TextIOWrapper
from typing import Any

import click

from diffsal import __version__
from diffsal.cli.audit import audit
from diffsal.cli.demo import demo
from diffsal.cli.explain import explain
from diffsal.cli.fool import fool
from diffsal.cli.layers import layers
from diffsal.cli.options import DEBUG
from diffsal.cli.protocol import protocol
from diffsal.cli.serve import serve
from diffsal.cli.train import train
from diffsal.errors import DiffsalError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Commands(click.Group):
    """Turns what users can put right into one line; ``--debug`` shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):  # names of files may be in no encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except DiffsalError as error:
            if ctx.meta.get(DEBUG):
                raise
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if ctx.meta.get(DEBUG) or error.errno not in _FULL:
                raise
            place = error.filename or "the output"
            raise click.ClickException(f"{place}: {error.strerror}; make room") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Explain binary image classifiers by the difference of their classes' maps.

    Data goes to stdout, progress and notes to stderr. Exit status: 0 done, 1 nothing could be
    done, 2 wrong usage, 3 some inputs failed and the rest are done, 4 a threshold of
    yours (audit --fail-on) is not met.
    """


for command in (explain, layers, demo, train, audit, protocol, fool, serve):
    main.add_command(command)
