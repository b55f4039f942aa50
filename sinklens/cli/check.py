"""``sinklens check``: which functions are exact on a model, with measured errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import friendly, plain, say_written, stdout
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL


@friendly
def check(
    model: Annotated[str, typer.Argument(help="Embedded name, folder, .gguf file or hub id.")] = DEFAULT_MODEL,
    only: Annotated[str | None, typer.Option(help="Some functions, such as ablate_sinks,flash.")] = None,
    out: Annotated[Path | None, typer.Option(help="A CSV file for every part's error.")] = None,
) -> None:
    """Check a model: run every function on two short texts and compare it with its formula, written out."""
    if out is not None and out.is_dir():
        raise BadInputError(f"--out {str(out)!r} is a folder; give a .csv file")
    loaded = sl.load_model(model)
    facts = sl.models.capabilities(loaded)
    found = sl.check_model(loaded, functions=None if only is None else [name.strip() for name in only.split(",")])
    edits = "editable" if facts.pattern_edit else "read-only (edits go through the registered attention function)"
    kind = "causal" if facts.causal else "bidirectional"
    windows = sorted({w for w in facts.windows if w is not None})
    stdout.print(
        f"{plain(facts.model)} ({facts.architecture}): {facts.n_layers} layers x {facts.n_heads} heads, {kind}, "
        f"{f'windows {windows}' if windows else 'full attention'}; patterns {edits}; proven",
        highlight=False,
    )
    table = Table("function", "outcome", "error", "", box=None, pad_edge=False)
    for row in found.rows:
        colour = {"exact": "green", "refused": "yellow"}.get(row.outcome, "bold red")
        notes = [row.reason] if row.reason else [f"{part}: {why}" for part, why in row.refused.items()]
        error = "" if row.error != row.error else f"{row.error:.1e}"
        table.add_row(row.function, f"[{colour}]{row.outcome}[/]", error, plain("; ".join(notes)))
    stdout.print(table)
    counts = [
        (kind, sum(row.outcome == kind for row in found.rows)) for kind in ("exact", "refused", "wrong", "failed")
    ]
    told = ", ".join(f"{n} {kind}" for kind, n in counts if n)
    stdout.print(f"{told}; an error up to {found.tolerance:g} counts as exact", highlight=False)
    if out is not None:
        say_written({"table": found.save(out)})
    if not found.ok:
        stdout.print("[bold red]Please report this:[/] a function is neither exact nor refused on this model.")
        raise typer.Exit(1)
