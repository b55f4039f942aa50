"""The guarantees page names every public name, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from public_calls import PUBLIC

import sinklens as sl
from sinklens import streaming

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_public_name_has_one_row() -> None:
    names = [row[1].strip().strip("`") for row in ROWS]
    assert len(names) == len(set(names))
    assert set(sl.__all__) | set(PUBLIC) | {f"streaming.{name}" for name in streaming.__all__} == set(names)


def test_every_row_promises_something_and_names_a_test() -> None:
    for row in ROWS:
        assert all(cell.strip() for cell in row[2:5]), row
        assert re.search(r"`tests/test_\w+\.py::test_\w+`", row[4]), row


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", PAGE))
    assert len(named) > 100
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{test}"
    assert PAGE.count("::") == len(re.findall(r"`tests/test_\w+\.py::test_\w+`", PAGE))
