"""``sinklens scan``: how much attention sinks take."""

from __future__ import annotations

import sys
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
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL


@friendly
def scan(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    context: ContextOption = Context.natural,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    position: Annotated[int, typer.Option(help="The position whose sink rate is reported.")] = 0,
    epsilon: Annotated[float, typer.Option(help="The threshold of the sink rate.")] = 0.3,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Scan a model for attention sinks: the sink rate, the layers, the tokens that draw attention."""
    from sinklens.find.scan_page import summarize  # torch is slow to load
    from sinklens.models.load import has_trained_head  # torch is slow to load

    if not 0 <= epsilon < 1:
        raise BadInputError(f"epsilon must lie in [0, 1), got {epsilon}")
    check_out(out)
    source = source_of(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    scores = sl.sink_scores(loaded, tokens)
    loss = None
    if (
        not isinstance(loaded, sl.models.PlainModel)
        and sl.models.capabilities(loaded).causal
        and has_trained_head(loaded)
    ):
        loss = float(sl.token_loss(loaded, tokens).nanmean())
    show_summary(summarize(scores, position=position, epsilon=epsilon, loss=loss))
    if out is not None:
        command = ["sinklens", *sys.argv[1:]]
        paths = sl.find.write_scan(scores, out, position=position, epsilon=epsilon, loss=loss, command=command)
        say_written(paths)


def show_summary(summary: Any) -> None:
    """The summary on the terminal: sentence, bars per layer, top tokens."""
    stdout.print(plain(summary.sentence()), highlight=False)
    loss = "" if summary.loss is None else f"; loss {summary.loss:.3f} nats per token"
    stdout.print(
        f"{summary.sequences} sequence(s) of up to {summary.longest} tokens from {plain(summary.source)}{loss}",
        highlight=False,
    )
    layers = Table("layer", f"sink rate at position {summary.position}", "", "alpha", "beta", box=None, pad_edge=False)
    for row in summary.layers.itertuples():
        bar = "\u2588" * round(24 * row.sink_rate)
        layers.add_row(f"{row.layer}", f"{row.sink_rate:.3f}", bar, f"{row.alpha:.3f}", or_dash(row.beta))
    stdout.print(layers)
    tokens = Table("sequence", "position", "token", "beta", "alpha", box=None, pad_edge=False, title_justify="left")
    for row in summary.top_tokens.itertuples():
        tokens.add_row(
            f"{row.sequence}", f"{row.position}", plain(repr(row.token)), or_dash(row.beta), or_dash(row.alpha)
        )
    stdout.print(
        f"Tokens apart from position {summary.position} that draw the most far attention, mean over layers and heads:",
        highlight=False,
    )
    stdout.print(tokens)
    if summary.top_tokens.beta.isna().any():
        stdout.print("- : fewer than 32 queries see the token from 16 or more tokens away: too few to say")
