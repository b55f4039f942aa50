"""Tables: each once, as CSV and Parquet in ``tables/``, and its first rows on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.core.storage import atomic_path
from sinklens.report.content import Section

SHOWN_ROWS = 12


def write_tables(parts: list[Section], folder: Path) -> list[str]:
    """Write every table whole or not at all; returns the names of the files."""
    written = []
    for section in parts:
        for sheet in section.sheets:
            for ending in ("csv", "parquet"):
                with atomic_path(folder / f"{sheet.name}.{ending}") as partial:
                    if ending == "csv":
                        sheet.frame.to_csv(partial, index=False)
                    else:
                        sheet.frame.to_parquet(partial, index=False)
                written.append(f"{sheet.name}.{ending}")
    return written


def cells(frame: pd.DataFrame, most: int = SHOWN_ROWS) -> tuple[list[str], list[list[str]]]:
    """The header and the first rows as text; columns without any value are left out."""
    known = frame.dropna(axis=1, how="all")
    return [str(name) for name in known.columns], [
        [_cell(value) for value in row] for row in known.head(most).itertuples(index=False, name=None)
    ]


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1000 or 0 < abs(value) < 1e-3 else f"{value:.4f}"
    return repr(value) if isinstance(value, str) and (value != value.strip() or "\n" in value) else str(value)


def markdown(frame: pd.DataFrame, most: int = SHOWN_ROWS) -> str:
    """The first rows as a Markdown table."""
    header, rows = cells(frame, most)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(escaped(cell) for cell in line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that Markdown neither formats nor takes for HTML or for a table's border."""
    for char in "\\`*_[]|$~":
        text = text.replace(char, f"\\{char}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
