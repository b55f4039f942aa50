"""``sinklens models``: what is always at hand."""

from __future__ import annotations

from rich.table import Table

from sinklens.cli.options import friendly, plain, stdout
from sinklens.models.catalogue import CATALOGUE, DEFAULT_MODEL


@friendly
def models() -> None:
    """List the embedded models: name, size, licence, whether cached."""
    table = Table("name", "download", "licence", "cached", box=None, pad_edge=False)
    for model in CATALOGUE.values():
        table.add_row(model.name, f"{model.download_mb} MB", model.licence, "yes" if model.cached else "no")
    stdout.print(table)
    for model in CATALOGUE.values():
        stdout.print(f"[bold]{model.name}[/]: {plain(model.summary)}", highlight=False)
    stdout.print(f"Default: {DEFAULT_MODEL}.", highlight=False)
    stdout.print("Also: any local folder with safetensors, .gguf file, or Hugging Face hub id.", highlight=False)
