"""The command line: a thin layer over the public functions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sinklens.console import stderr
from sinklens.corpora import is_file, shortened
from sinklens.embedded import CATALOGUE, DEFAULT_MODEL
from sinklens.errors import BadInputError, SinklensError

app = typer.Typer(
    help="Find attention sinks in real models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stdout = Console()
SHOWN_SINKS = 40

ModelOption = Annotated[str, typer.Option("--model", help="Embedded name, folder, .gguf file or hub id.")]
TextOption = Annotated[str | None, typer.Option("--text", help="A text or .jsonl file; - reads standard input.")]
CorpusOption = Annotated[str | None, typer.Option("--corpus", help="A corpus: python-docs, or a dataset id.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for the page, the table and the manifest.")]


class Context(str, Enum):
    """What the model reads."""

    natural = "natural"
    random = "random"
    repeat = "repeat"


ContextOption = Annotated[Context, typer.Option(help="Natural text, random ids, or one id repeated.")]
LengthOption = Annotated[int | None, typer.Option("--seq-len", help="Tokens per sequence; default up to 512.")]
CountOption = Annotated[int | None, typer.Option("--n-seqs", help="Sequences; default up to 16.")]
SeedOption = Annotated[int, typer.Option(help="Which documents, which random ids.")]


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show expected errors as one line and end with status 2; Ctrl-C with 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except SinklensError as error:
            stderr.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            stderr.print("interrupted; nothing half-written was left")
            raise typer.Exit(130) from None

    return run


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
        stdout.print(f"[bold]{model.name}[/]: {_plain(model.summary)}", highlight=False)
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
    from sinklens.models import has_trained_head
    from sinklens.scan import summarize

    if not 0 <= epsilon < 1:
        raise BadInputError(f"epsilon must lie in [0, 1), got {epsilon}")
    _check_out(out)
    source = _source(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    scores = sl.sink_scores(loaded, tokens)
    predicts = sl.capabilities(loaded).causal and has_trained_head(loaded)
    loss = float(sl.token_loss(loaded, tokens).nanmean()) if predicts else None
    _show(summarize(scores, position=position, epsilon=epsilon, loss=loss))
    if out is not None:
        command = ["sinklens", *sys.argv[1:]]
        paths = sl.write_scan(scores, out, position=position, epsilon=epsilon, loss=loss, command=command)
        _say_written(paths)


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

    _check_out(out)
    source = _source(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)  # the notes say it
        found = sl.find_sinks(loaded, tokens, method=method, activity=activity)
    anatomy = sl.sink_anatomy(loaded, found)
    _show_sinks(found, anatomy)
    if out is not None:
        _say_written(sl.write_sinks(found, anatomy, out, command=["sinklens", *sys.argv[1:]]))


def _show_sinks(found: Any, anatomy: Any) -> None:
    """The sinks and the heads' classes on the terminal."""
    counts = f"{len(found.primary)} primary, {len(found.secondary)} secondary sinks in {len(found.tokens)} sequence(s)"
    stdout.print(f"{counts}, by {found.method}", highlight=False)
    table = Table(
        "sequence", "position", "token", "kind", "reason", "layers", "mass", "heads", box=None, pad_edge=False
    )
    for sink in list(found)[:SHOWN_SINKS]:
        life = f"{sink.onset}-{sink.end}"
        token = _plain(repr(sink.token))
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
        stdout.print(f"note: {_plain(note)}", highlight=False)


def _say_written(paths: dict[str, Path]) -> None:
    for path in paths.values():
        stdout.print(f"wrote {_plain(str(path))}", highlight=False, soft_wrap=True)


def _source(text: str | None, corpus: str | None, context: Context) -> str | list[str]:
    if text is not None and corpus is not None:
        raise BadInputError("give --text or --corpus, not both")
    if context is not Context.natural:
        if text is not None or corpus is not None:
            raise BadInputError(f"--context {context.value} makes its own ids; drop --text and --corpus")
        return context.value
    if text == "-":
        try:
            return [sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")]
        except UnicodeDecodeError as error:
            raise BadInputError(f"standard input is not UTF-8 text ({error}); convert it first") from error
    if text is not None and not is_file(text):
        raise BadInputError(f"no file at {shortened(text)}; --text takes a file, or - for standard input")
    return text or corpus or "python-docs"


def _check_out(out: Path | None) -> None:
    """Refuse an output folder that cannot be one before any work is done."""
    if out is not None and out.exists() and not out.is_dir():
        raise BadInputError(f"--out {str(out)!r} is a file; give a folder")


def _show(summary: Any) -> None:
    """The summary on the terminal: sentence, bars per layer, top tokens."""
    stdout.print(_plain(summary.sentence()), highlight=False)
    loss = "" if summary.loss is None else f"; loss {summary.loss:.3f} nats per token"
    stdout.print(
        f"{summary.sequences} sequence(s) of up to {summary.longest} tokens from {_plain(summary.source)}{loss}",
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
            f"{row.sequence}", f"{row.position}", _plain(repr(row.token)), _number(row.beta), _number(row.alpha)
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


def _plain(text: str) -> str:
    """Text that rich does not read as markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    app()
