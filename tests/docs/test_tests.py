"""The tests themselves: what they share lies in tests/support, so that any of them can be moved or run alone."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions

import pytest
from places import ROOT, SUPPORT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))


def imported(source: str) -> set[str]:
    """The parts of the names of every module that a file imports, also inside functions and by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "importorskip")):
            found |= {part for a in node.args if isinstance(a, ast.Constant) for part in str(a.value).split(".")}
    return found


def test_no_file_imports_a_test_file_or_the_fixtures_file() -> None:
    others = {path.stem for path in FILES if path.name.startswith("test_")} | {"conftest"}
    assert len(others) > 80
    wrong = {str(path.relative_to(ROOT)): imported(path.read_text(encoding="utf-8")) & others for path in FILES}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from test_sinks import x", "def f():\n    import test_sinks as t", "from tests.find import test_sinks",
        "import tests.find.test_sinks", "importlib.import_module('test_sinks')",
    ],
)  # fmt: skip
def test_an_import_of_a_test_file_is_seen_wherever_it_stands(code: str) -> None:
    assert "test_sinks" in imported(code)


def test_only_support_holds_files_that_are_no_tests() -> None:
    others = {path for path in FILES if not path.name.startswith("test_")} - {TESTS / "conftest.py"}
    assert {path.parent for path in others} == {SUPPORT}
    assert not [path for path in FILES if path.parent == SUPPORT and path.name.startswith("test_")]


def test_no_helper_hides_a_module_of_something_else() -> None:
    """Helpers are imported by their bare names, so these must be nobody else's."""
    taken = {*sys.stdlib_module_names, *packages_distributions()}
    assert not {path.stem for path in SUPPORT.glob("*.py")} & taken
