"""The command line: a thin layer over the public functions."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.table import Table

from sinklens.cli_check import check
from sinklens.cli_common import (
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
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.cli_decompose import decompose
from sinklens.cli_images import images
from sinklens.cli_interventions import ablate, bos
from sinklens.cli_lab import lab
from sinklens.cli_mix import mix
from sinklens.cli_report import report
from sinklens.cli_reproduce import reproduce
from sinklens.cli_stream import stream
from sinklens.cli_sweep import app as sweep_app
from sinklens.cli_trace import trace
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import CATALOGUE, DEFAULT_MODEL

app = typer.Typer(
    help="Find attention sinks in real models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
SHOWN_SINKS = 40


def _show_version(wanted: bool) -> bool:
    if wanted:
        import sinklens

        stdout.print(f"sinklens {sinklens.__version__}", highlight=False)
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find attention sinks in real models."""


@app.command()
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


@app.command()
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
    import sinklens as sl
    from sinklens.find.scan_page import summarize
    from sinklens.models.load import has_trained_head

    if not 0 <= epsilon < 1:
        raise BadInputError(f"epsilon must lie in [0, 1), got {epsilon}")
    check_out(out)
    source = source_of(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    scores = sl.sink_scores(loaded, tokens)
    loss = None
    if not isinstance(loaded, sl.PlainModel) and sl.capabilities(loaded).causal and has_trained_head(loaded):
        loss = float(sl.token_loss(loaded, tokens).nanmean())
    _show(summarize(scores, position=position, epsilon=epsilon, loss=loss))
    if out is not None:
        command = ["sinklens", *sys.argv[1:]]
        paths = sl.write_scan(scores, out, position=position, epsilon=epsilon, loss=loss, command=command)
        say_written(paths)


@app.command()
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
    import sinklens as sl

    check_out(out)
    source = source_of(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)  # the notes say it
        found = sl.find_sinks(loaded, tokens, method=method, activity=activity)
    anatomy = sl.sink_anatomy(loaded, found)
    _show_sinks(found, anatomy)
    if out is not None:
        say_written(sl.write_sinks(found, anatomy, out, command=["sinklens", *sys.argv[1:]]))


def _show_sinks(found: Any, anatomy: Any) -> None:
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
        table.add_row(*where, token, sink.kind, sink.reason, life, _number(sink.mass), f"{len(sink.heads)}")
    if len(found):
        stdout.print(table)
    if len(found) > SHOWN_SINKS:
        stdout.print(f"... and {len(found) - SHOWN_SINKS} more; --out writes them all", highlight=False)
    if len(anatomy.use):
        classes = anatomy.head_classes()["class"].value_counts()
        stdout.print("heads: " + ", ".join(f"{n} {name}" for name, n in classes.items()), highlight=False)
    for note in (*found.notes, *anatomy.notes):
        stdout.print(f"note: {plain(note)}", highlight=False)


def _show(summary: Any) -> None:
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
        layers.add_row(f"{row.layer}", f"{row.sink_rate:.3f}", bar, f"{row.alpha:.3f}", _number(row.beta))
    stdout.print(layers)
    tokens = Table("sequence", "position", "token", "beta", "alpha", box=None, pad_edge=False, title_justify="left")
    for row in summary.top_tokens.itertuples():
        tokens.add_row(
            f"{row.sequence}", f"{row.position}", plain(repr(row.token)), _number(row.beta), _number(row.alpha)
        )
    stdout.print(
        f"Tokens apart from position {summary.position} that draw the most far attention, mean over layers and heads:",
        highlight=False,
    )
    stdout.print(tokens)
    if summary.top_tokens.beta.isna().any():
        stdout.print("- : fewer than 32 queries see the token from 16 or more tokens away: too few to say")


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


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


if __name__ == "__main__":
    app()
