"""What the scripts that measure docs/findings/ share: a page, its tables, their command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sinklens.core.storage import write_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT / "benchmarks"))

from smoke import HELP, TINY, tiny_model  # noqa: E402

__all__ = ["DOCS", "HELP", "TINY", "between", "command_line", "draw", "find_tests", "put", "shown", "shrink", "table",
           "tiny_model"]  # fmt: skip


def find_tests() -> None:
    """Let what the tests share be imported by name."""
    sys.path.append(str(ROOT / "tests" / "support"))


def put(topic: str, parts: Sequence[str], docs: Path) -> None:
    """Write the page of a topic."""
    page = docs / "findings" / f"{topic}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n\n".join(parts) + "\n")


def draw(figure: Any, path: Path, **size: float) -> None:
    """Write a figure as its file's ending says: .html needs no browser."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path) if path.suffix == ".html" else figure.write_image(path, **size)


def table(frame: Any) -> str:  # a DataFrame; to pandas' stubs a selection may be a Series
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


def shrink(names: dict[str, Any], small: Mapping[str, Any]) -> None:
    """Give a script the sizes of ``--smoke`` instead of its own."""
    unknown = small.keys() - names.keys()
    assert not unknown, f"the script has no {', '.join(sorted(unknown))}"
    names.update(small)


def command_line(
    words: str | None,
    models: Sequence[str],
    pieces: Sequence[str],
    run: Callable[[str, Path, list[str]], None],
    write: Callable[[Path, Path], None],
    shrunk: Callable[[], None],
) -> None:
    """``run MODEL STORE [--only PIECE ...]`` and ``write STORE``; ``--smoke`` does both, ``shrunk``."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=HELP)
    commands = parser.add_subparsers(dest="command")
    runner = commands.add_parser("run")
    runner.add_argument("model", choices=models)
    runner.add_argument("store", type=Path)
    runner.add_argument("--only", nargs="*", default=[], choices=pieces)
    writer = commands.add_parser("write")
    writer.add_argument("store", type=Path)
    options = parser.parse_args()
    if options.smoke:
        shrunk()
        with tiny_model() as name:
            store = Path("store")
            store.mkdir()
            run(name, store, [])
            missing = [piece for piece in pieces if not any(store.glob(f"{name}-{piece}*"))]
            assert not missing, f"nothing was measured of {', '.join(missing)}"
            write(store, Path("docs"))
    elif options.command == "run":
        options.store.mkdir(parents=True, exist_ok=True)
        run(options.model, options.store, options.only)
    elif options.command == "write":
        write(options.store, DOCS)
    else:
        parser.error("what is to be done: run or write?")
