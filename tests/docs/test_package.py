"""The package as a whole: quick to import, complete, quiet, and built as docs/architecture.md says."""

from __future__ import annotations

import ast
import inspect
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT
from public_names import ROOMS, TOP, named

import sinklens as sl

SOURCES = ROOT / "sinklens"
MOVED: dict[str, str] = sl._MOVED
MOST_MODULES = 25
INTERNAL = {"attention", "bridge", "cli", "core", "forward", "residual", "show"}


def test_importing_sinklens_imports_no_heavy_library() -> None:
    code = "import sys, sinklens; sinklens.__all__; print(*[m for m in ('torch', 'transformers', 'pandas', 'plotly', "
    code += "'transformer_lens', 'numpy', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in TOP:
        assert getattr(sl, name).__name__ == name
    for room in ROOMS:
        module = getattr(sl, room)
        assert dir(module) == sorted(module.__all__)
        for name in module.__all__:
            assert name.isupper() or getattr(module, name).__name__ == name
    assert dir(sl) == sorted([*TOP, *ROOMS])
    assert len(TOP) <= 34


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(sl, "no_such_name")
    assert not hasattr(sl.trace, "no_such_name")


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_name_works_and_names_its_new_place(name: str) -> None:
    with pytest.warns(FutureWarning, match=rf"sinklens\.{name} is sinklens\.{MOVED[name]}\.{name} now"):
        old = getattr(sl, name)
    assert old is named(f"{MOVED[name]}.{name}")
    assert name not in sl.__all__
    assert name not in dir(sl)
    assert MOVED[name] in ROOMS


def test_the_package_itself_uses_no_old_name() -> None:
    """In a process of its own: what is imported already would not warn again."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(SOURCES.rglob("*.py"))]
    names = [".".join(one[:-1] if one[-1] == "__init__" else one) for one in parts]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-W", "error:sinklens:FutureWarning", "-c", code], capture_output=True, text=True, check=False
    )
    assert "FutureWarning: sinklens." not in done.stderr
    assert done.returncode == 0, done.stderr


def test_help_shows_the_public_names_and_nothing_else() -> None:
    shown = pydoc.plain(pydoc.render_doc(sl))
    for name in TOP:
        assert name in shown
    assert not any(
        f" {name}" in shown for name in ("_MOVED", "_READERS", "attach_stub", "import_module", *MOVED_FUNCTIONS)
    )


MOVED_FUNCTIONS = tuple(f"{name}(" for name, room in MOVED.items() if inspect.isfunction(named(f"{room}.{name}")))


def test_a_name_that_is_also_a_module_stays_the_name() -> None:
    """Importing a module sets it as an attribute of its package, in front of a function of the same name."""
    for room in (sl, *(getattr(sl, name) for name in ROOMS)):
        for name in room.__all__:
            if (Path(str(room.__file__)).parent / f"{name}.py").is_file():
                import_module(f"{room.__name__}.{name}")
                assert not isinstance(getattr(room, name), ModuleType), f"{room.__name__}.{name}"


def test_no_folder_holds_more_modules_than_a_reader_can_look_through() -> None:
    for folder in [SOURCES, *(path for path in SOURCES.rglob("*") if path.is_dir())]:
        modules = list(folder.glob("*.py"))
        assert len(modules) <= MOST_MODULES, folder.name
    assert [path.name for path in SOURCES.glob("*.py")] == ["__init__.py"]


def test_every_room_says_what_it_is() -> None:
    rooms = {path.parent.name for path in SOURCES.glob("*/__init__.py")}
    assert rooms == {*ROOMS, *INTERNAL}
    for room in rooms:
        first = ast.get_docstring(ast.parse((SOURCES / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert len(first) > 20, room
        assert first.startswith("Internal: ") == (room in INTERNAL - {"cli"}), room


def test_an_import_inside_a_function_says_what_it_spares() -> None:
    """Otherwise nobody can tell it from one that hides a circle."""
    silent = []
    for path in SOURCES.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = [n for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom))]
                silent += [f"{path.name}:{n.lineno}" for n in inside if "#" not in text.splitlines()[n.lineno - 1]]
    assert silent == []
