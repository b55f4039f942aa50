"""The Python blocks of the documentation, and whether the names and arguments in them exist."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from places import ROOT
from public_names import ROOMS

DOCS = ROOT / "docs"
BARE = {"sl": "sinklens"} | {room: f"sinklens.{room}" for room in ("lab", "streaming", "sweep")}  # as pages import them


def blocks(path: Path) -> list[str]:
    """The blocks marked as Python, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def unknown_names(code: str) -> list[str]:
    """What a block asks of sinklens that there is not: names of its modules, and keywords of its functions."""
    found = []
    for node in ast.walk(ast.parse(code)):
        target = node.func if isinstance(node, ast.Call) else node
        if not isinstance(target, ast.Attribute):
            continue
        module = _module(target.value)
        if module is None:
            continue
        if target.attr not in import_module(module).__all__:
            found.append(f"{module}.{target.attr}")
        elif isinstance(node, ast.Call):
            found += _wrong_keywords(getattr(import_module(module), target.attr), node)
    return found


def _module(value: ast.expr) -> str | None:
    """The module that ``sl``, ``sl.trace`` or an imported ``lab`` stands for."""
    if isinstance(value, ast.Name):
        return BARE.get(value.id)
    if isinstance(value, ast.Attribute) and ast.unparse(value.value) == "sl" and value.attr in ROOMS:
        return f"sinklens.{value.attr}"
    return None


def _wrong_keywords(function: Any, call: ast.Call) -> list[str]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [f"{function.__name__}({k.arg}=)" for k in call.keywords if k.arg is not None and k.arg not in parameters]
