"""The guarantees page names every public name, and only tests that exist."""

from __future__ import annotations

import re

from places import ROOT
from public_calls import PUBLIC

import sinklens as sl
from sinklens import streaming

PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_public_name_has_one_row() -> None:
    names = [row[1].strip().strip("`") for row in ROWS]
    assert len(names) == len(set(names))
    assert set(sl.__all__) | set(PUBLIC) | {f"streaming.{name}" for name in streaming.__all__} == set(names)


def test_every_row_promises_something_and_names_a_test() -> None:
    for row in ROWS:
        assert all(cell.strip() for cell in row[2:5]), row
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row[4]), row


def sources(cell: str) -> str:
    """The files of the tests that a cell names."""
    return "".join((ROOT / path).read_text(encoding="utf-8") for path in re.findall(r"`(tests/[\w/]+\.py)::", cell))


def test_every_row_says_how_exactly() -> None:
    """A number, exact, or refused; and a tolerance stands in a file of its tests (1e-6 relative is pytest's own)."""
    for row in ROWS:
        assert re.search(r"\d|\bexact\b|\brefused\b", row[3]), row
        assert "of the test" not in row[3], row
        for number in re.findall(r"\d+e-\d+", row[3].replace("1e-6 relative", "").replace("1e-3 (self-test)", "")):
            assert number in sources(row[4]), f"{number} is in no test of {row[1]}"


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE))
    assert len(named) > 100
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{test}"
    assert PAGE.count("::") == len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", PAGE))
