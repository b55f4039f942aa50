"""What the scripts that measure docs/findings/ share: a page, its tables, their command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.results import write_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def find_tests() -> None:
    """Let the tests be imported by name, whichever folder they lie in."""
    sys.path += sorted({str(path.parent) for path in (ROOT / "tests").rglob("*.py")})


def put(topic: str, parts: Sequence[str]) -> None:
    """Write the page of a topic."""
    write_text(DOCS / "findings" / f"{topic}.md", "\n\n".join(parts) + "\n")


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    rows = frame.to_dict("records")
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(shown(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A cell."""
    return "-" if value != value else f"{value:.4g}" if isinstance(value, float) else str(value)


def between(row: dict[str, Any], name: str = "") -> str:
    """A mean with its interval."""
    keys = (name, f"{name}_low", f"{name}_high") if name else ("mean", "low", "high")
    mean, low, high = (row[key] for key in keys)
    if mean != mean:
        return "-"
    return f"{mean:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low == low else "")


def command_line(
    words: str | None,
    models: Sequence[str],
    pieces: Sequence[str],
    run: Callable[[str, Path, list[str]], None],
    write: Callable[[Path], None],
) -> None:
    """``run MODEL STORE [--only PIECE ...]`` and ``write STORE``."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("model", choices=models)
    runner.add_argument("store", type=Path)
    runner.add_argument("--only", nargs="*", default=[], choices=pieces)
    writer = commands.add_parser("write")
    writer.add_argument("store", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        options.store.mkdir(parents=True, exist_ok=True)
        run(options.model, options.store, options.only)
    else:
        write(options.store)
