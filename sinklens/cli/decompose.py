"""``sinklens decompose``: where a sink's score comes from, and whether it acts by key or by value."""

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
    numbers,
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL

SHOWN = {
    "margin": "margin",
    "gap": "gap",
    "distance": "dist",
    "key_side": "key",
    "query_distance": "q.dist",
    "query_specific": "q.key",
    "bias_share": "bias",
    "mass": "mass",
    "value_ratio": "value",
}


@friendly
def decompose(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    kind: Annotated[str, typer.Option(help="Which found sinks: all, primary or secondary.")] = "all",
    positions: Annotated[str | None, typer.Option(help="Positions instead of found sinks, such as 0,4-6.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to take apart, such as 3-10; default: of each life.")
    ] = None,
    effects: Annotated[str, typer.Option(help="The 2x2 for all, layer, head (comma-separated), or none.")] = "all",
    metric: Annotated[list[str] | None, typer.Option(help="Of the 2x2: loss, kl or embedding; may repeat.")] = None,
    exact_heads: Annotated[int, typer.Option(help="Heads to measure, the rest estimated; 0: measure all.")] = 20,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Take sinks apart: why the margin is high, what they write, key or value."""
    if kind not in KINDS:
        raise BadInputError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_out(out)
    chosen, places = numbers(layers, "layers"), numbers(positions, "positions")
    scopes: Any = [] if effects == "none" else [part.strip() for part in effects.split(",")]
    source = source_of(text, corpus, Context.natural)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    sinks: Any = places
    if places is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sl.SinklensWarning)
            found = sl.find_sinks(loaded, tokens)
        sinks = found if kind == "all" else found.where(kind=kind)
    result = sl.decompose_sinks(
        loaded, tokens, sinks, layers=chosen, effects=scopes, metrics=metric, exact_heads=exact_heads or None, seed=seed
    )
    stdout.print(plain(result.summary()), highlight=False, soft_wrap=True)
    for name in result.kinds:
        rows = sorted(result.heads(name).to_dict("records"), key=lambda row: -row["gap"])[:10]
        table = Table(
            "head", "class", *SHOWN, title=f"{name}: the heads with the largest gap", box=None, pad_edge=False
        )
        for row in rows:
            cells = [f"{row[column]:.2f}" for column in SHOWN]
            table.add_row(f"{row['layer']}.{row['head']}", row["class"], *cells)
        stdout.print(table)
    stdout.print(
        "gap = dist + key + q.dist + q.key (mean query x mean key, x the sink's key; each query's own part x either); "
        "bias: bias share; value: length of what it writes, of the usual",
        highlight=False,
    )
    if out is not None:
        say_written(sl.decompose.write_decomposition(result, out, command=["sinklens", *sys.argv[1:]]))
