"""``sinklens sinks``: which tokens are sinks, and what heads do with them."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import (
    Context,
    ContextOption,
    CorpusOption,
    CountOption,
    LengthOption,
    ModelOption,
    OutOption,
    SeedOption,
    TextOption,
    check_out,
    friendly,
    or_dash,
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.models.catalogue import DEFAULT_MODEL

SHOWN_SINKS = 40


@friendly
def sinks(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    context: ContextOption = Context.natural,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    method: Annotated[str, typer.Option(help="attention, direction or wong.")] = "attention",
    activity: Annotated[float, typer.Option(help="Smallest mass of an active layer.")] = 0.05,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Find the sinks: primary and secondary, when each lives, what each head does with them."""
    check_out(out)
    source = source_of(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)  # the notes say it
        chosen: Any = method
        found = sl.find_sinks(loaded, tokens, method=chosen, activity=activity)
    anatomy = sl.sink_anatomy(loaded, found)
    show_sinks(found, anatomy)
    if out is not None:
        say_written(sl.find.write_sinks(found, anatomy, out, command=["sinklens", *sys.argv[1:]]))


def show_sinks(found: Any, anatomy: Any) -> None:
    """The sinks and the heads' classes on the terminal."""
    counts = f"{len(found.primary)} primary, {len(found.secondary)} secondary sinks in {len(found.tokens)} sequence(s)"
    stdout.print(f"{counts}, by {found.method}", highlight=False)
    table = Table(
        "sequence", "position", "token", "kind", "reason", "layers", "mass", "heads", box=None, pad_edge=False
    )
    for sink in list(found)[:SHOWN_SINKS]:
        life = f"{sink.onset}-{sink.end}"
        token = plain(repr(sink.token))
        where = f"{sink.sequence}", f"{sink.position}"
        table.add_row(*where, token, sink.kind, sink.reason, life, or_dash(sink.mass), f"{len(sink.heads)}")
    if len(found):
        stdout.print(table)
    if len(found) > SHOWN_SINKS:
        stdout.print(f"... and {len(found) - SHOWN_SINKS} more; --out writes them all", highlight=False)
    if len(anatomy.use):
        classes = anatomy.head_classes()["class"].value_counts()
        stdout.print("heads: " + ", ".join(f"{n} {name}" for name, n in classes.items()), highlight=False)
    for note in (*found.notes, *anatomy.notes):
        stdout.print(f"note: {plain(note)}", highlight=False)
