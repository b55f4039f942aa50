"""Counts for the summary of ``make torture``."""

from __future__ import annotations

import os


def count(what: str, number: int) -> None:
    """Add to the counts, where SINKLENS_COUNTS names a file."""
    if path := os.environ.get("SINKLENS_COUNTS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{what}\t{number}\n")
