"""``sinklens trace``: who writes and erases the sinks of a text."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import (
    KINDS,
    Context,
    CorpusOption,
    CountOption,
    LengthOption,
    ModelOption,
    OutOption,
    SeedOption,
    TextOption,
    check_out,
    friendly,
    numbers_of,
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL


@friendly
def trace(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    kind: Annotated[str, typer.Option(help="Which found sinks: all, primary or secondary.")] = "all",
    causal: Annotated[bool, typer.Option(help="Prove writers by replacing what they write.")] = True,
    plant: Annotated[bool, typer.Option("--plant", help="Also add writers' outputs at ordinary tokens.")] = False,
    neurons: Annotated[bool, typer.Option("--neurons", help="Also split the writers into their neurons.")] = False,
    doses: Annotated[
        str | None, typer.Option(help="Also rescale the writers' outputs at the sink, such as 0,0.5,2.")
    ] = None,
    most: Annotated[int | None, typer.Option(help="Prove at most so many sinks per kind and sequence.")] = None,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Trace sinks to the layers that write and erase them."""
    from sinklens.find.sinks import from_scores  # torch is slow to load

    if kind not in KINDS:
        raise BadInputError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
    factors = numbers_of(doses, "--doses", "0,0.5,2")
    check_out(out)
    source = source_of(text, corpus, Context.natural)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        scores = sl.sink_scores(loaded, tokens)
        found = from_scores(scores)
    chosen = found if kind == "all" else found.where(kind=kind)
    result = sl.trace_sinks(loaded, tokens, chosen, causal=causal, doses=factors, most_proven=most, seed=seed)
    if not result.traced:
        stdout.print("no sink to trace; " + plain(" ".join(found.notes)), highlight=False)
        return
    show(result)
    planted = sl.trace.plant_sinks(loaded, result, seed=seed) if plant else None
    if planted is not None:
        table = Table("sink", "writer", "planted at", "added", "alpha", "change", box=None, pad_edge=False)
        for row in planted.to_dict("records"):
            at = f"{row['position']} {row['token']!r}"
            numbers = (f"{row['alpha']:.3f}", f"{row['d_alpha']:+.3f}")
            table.add_row(str(row["sink"]), row["writer"], plain(at), row["added"], *numbers)
        stdout.print(table)
    split = sl.trace.writer_neurons(loaded, result, seed=seed) if neurons else None
    for row in split.writers.to_dict("records") if split is not None else []:
        count = f"{row['neurons_for_90']} of {row['neurons']} neurons carry 90 % of {row['writer']}"
        stdout.print(f"{row['sequence']}:{row['position']}: {count}", highlight=False)
    if out is not None:
        command = ["sinklens", *sys.argv[1:]]
        say_written(sl.trace.write_trace(result, out, planted=planted, neurons=split, scores=scores, command=command))


def show(result: Any) -> None:
    """Writers and erasers on the terminal."""
    table = Table(
        "position", "token", "kind", "layers", "writer", "share", "d margin", "proven", box=None, pad_edge=False
    )
    for row in result.writers().to_dict("records"):
        fall = "" if row["d_margin"] != row["d_margin"] else f"{row['d_margin']:+.2f}"
        proven = "" if row["proven"] is None else "yes" if row["proven"] else "no"
        table.add_row(
            f"{row['sequence']}:{row['position']}",
            plain(repr(row["token"])),
            row["kind"],
            f"{row['onset']}-{row['end']}",
            row["writer"],
            f"{row['share']:.2f}",
            fall,
            proven,
        )
    stdout.print(table)
    for row in result.erasers().to_dict("records"):
        after = (
            "" if row["d_margin_after"] != row["d_margin_after"] else f", margin behind it {row['d_margin_after']:+.2f}"
        )
        where = f"{row['sequence']}:{row['position']}"
        stdout.print(f"{where}: {row['eraser']} erases {-row['share']:.2f}{after} without it", highlight=False)
    for note in result.notes:
        stdout.print(f"note: {plain(note)}", highlight=False)
