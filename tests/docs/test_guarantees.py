"""The guarantees page names every public name, and only tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache

from places import ROOT, SUPPORT
from public_names import CLASSES, FUNCTIONS

PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
ROWS = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_public_name_has_one_row() -> None:
    names = [row[1].strip().strip("`") for row in ROWS]
    assert len(names) == len(set(names))
    parts = ("lab.", "sweep.", "reproductions.")  # whose classes are specifications, told with their functions
    told = {name for name in CLASSES if not name.startswith(parts)} | {"reproductions.Reproductions"}
    assert told | set(FUNCTIONS) == set(names)


def test_every_row_promises_something_and_names_a_test() -> None:
    for row in ROWS:
        assert all(cell.strip() for cell in row[2:5]), row
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row[4]), row


def shared(text: str) -> str:
    """The definitions in tests/support that a file imports by name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom):
            continue
        path = SUPPORT / f"{node.module}.py"
        if not path.is_file():
            continue
        helper, names = path.read_text(encoding="utf-8"), {alias.name for alias in node.names}
        for one in ast.parse(helper).body:
            defined = {n.id for n in ast.walk(one) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            mine = {one.name} if isinstance(one, (ast.FunctionDef, ast.ClassDef)) else defined
            if mine & names:
                found.append(ast.get_source_segment(helper, one) or "")
    return "\n".join(found)


@cache
def source(path: str) -> str:
    """A test file, with what it imports of tests/support."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{text}\n{shared(text)}"


def sources(cell: str) -> str:
    """The files of the tests that a cell names."""
    return "\n".join(map(source, re.findall(r"`(tests/[\w/]+\.py)::", cell)))


def test_every_row_says_how_exactly() -> None:
    """A number, exact, or refused; and a tolerance stands in its tests or what they share (1e-6 relative: pytest's)."""
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
