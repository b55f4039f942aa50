"""What the commands share: options, friendly errors, where the text comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sinklens.core.errors import BadInputError, SinklensError
from sinklens.core.validation import shortened
from sinklens.inputs.corpora import is_file
from sinklens.show.progress import stderr

stdout = Console()

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
            stderr.print(f"[bold red]error:[/] {plain(str(error))}", highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            stderr.print("interrupted; nothing half-written was left")
            raise typer.Exit(130) from None

    return run


def say_written(paths: dict[str, Path]) -> None:
    """Name the files that were written."""
    for path in paths.values():
        stdout.print(f"wrote {plain(str(path))}", highlight=False, soft_wrap=True)


def source_of(text: str | None, corpus: str | None, context: Context) -> str | list[str]:
    """The source for load_tokens that --text, --corpus and --context name together."""
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


def check_out(out: Path | None) -> None:
    """Refuse an output folder that cannot be one before any work is done."""
    if out is not None and out.exists() and not out.is_dir():
        raise BadInputError(f"--out {str(out)!r} is a file; give a folder")


def plain(text: str) -> str:
    """Text that rich does not read as markup."""
    return text.replace("[", r"\[")


def numbers_of(words: str | None, option: str, example: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        BadInputError: something else.
    """
    try:
        return tuple(float(part) for part in words.split(",")) if words else ()
    except ValueError:
        raise BadInputError(f"{option} takes numbers between commas, such as {example}; got {words!r}") from None


KINDS = ("all", "primary", "secondary")


def numbers(text: str | None, what: str) -> list[int] | None:
    """``0,3-5`` as [0, 3, 4, 5]."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise BadInputError(f"--{what} takes numbers such as 0,3-5; got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def or_dash(value: float) -> str:
    """A number with three digits; - for NaN."""
    return "-" if value != value else f"{value:.3f}"
