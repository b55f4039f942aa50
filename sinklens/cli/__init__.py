"""The command line: a thin layer over the public functions."""

from __future__ import annotations

from typing import Annotated

import typer

import sinklens as sl
from sinklens.cli.ablate import ablate
from sinklens.cli.bos import bos
from sinklens.cli.check import check
from sinklens.cli.decompose import decompose
from sinklens.cli.images import images
from sinklens.cli.lab import lab
from sinklens.cli.mix import mix
from sinklens.cli.models import models
from sinklens.cli.options import stdout
from sinklens.cli.report import report
from sinklens.cli.reproduce import reproduce
from sinklens.cli.scan import scan
from sinklens.cli.sinks import sinks
from sinklens.cli.stream import stream
from sinklens.cli.sweep import app as sweep_app
from sinklens.cli.trace import trace

app = typer.Typer(
    help="Find attention sinks in real models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        stdout.print(f"sinklens {sl.__version__}", highlight=False)
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find attention sinks in real models."""


app.command()(models)
app.command()(scan)
app.command()(sinks)
app.command()(ablate)
app.command()(bos)
app.command()(decompose)
app.command()(trace)
app.command()(mix)
app.command()(stream)
app.command()(report)
app.command()(reproduce)
app.command()(check)
app.command()(images)
app.add_typer(lab, name="lab")
app.add_typer(sweep_app, name="sweep")
