"""``sinklens images``: attention and norms of an image model's tokens."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import OutOption, check_out, friendly, plain, say_written, stdout

IMAGE_MODEL = "dinov2-s"


@friendly
def images(
    paths: Annotated[list[str] | None, typer.Argument(help="Pictures; default three photographs.")] = None,
    model: Annotated[str, typer.Option("--model", help="Embedded name, folder or hub id.")] = IMAGE_MODEL,
    size: Annotated[int | None, typer.Option(help="Pixels of the square; default the model's own.")] = None,
    ratio: Annotated[float, typer.Option(help="High norm: this many times the patches' median.")] = 3.0,
    out: OutOption = None,
) -> None:
    """Look for sinks in pictures: attention on [CLS], registers and patches, and patches with high norms."""
    check_out(out)
    loaded = sl.load_model(model)
    tokens = sl.load_images(loaded, list(paths) if paths else sl.inputs.sample_images(), size=size)
    scores = sl.sink_scores(loaded, tokens)
    registers = sl.find.register_tokens(loaded, tokens, ratio=ratio)
    stdout.print(plain(repr(registers)), highlight=False)
    found = registers.to_dataframe(scores)
    table = Table("picture", "token", "norm / median", "alpha", "times uniform", box=None, pad_edge=False)
    for row in found.head(40).itertuples():
        name = plain(tokens.sources[row.sequence])
        table.add_row(name, plain(row.token), f"{row.largest:.2f}", f"{row.alpha:.4f}", f"{row.share:.1f}")
    if len(found):
        stdout.print(table)
    if len(found) > 40:
        stdout.print(f"... and {len(found) - 40} more; --out writes them all", highlight=False)
    if out is not None:
        say_written(sl.find.write_images(scores, registers, out, command=["sinklens", *sys.argv[1:]]))
