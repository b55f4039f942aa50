"""The Python blocks of the documentation, and whether the names and arguments in them exist."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from places import ROOT

DOCS = ROOT / "docs"
MODULES = {"sl": "sinklens", "lab": "sinklens.lab", "streaming": "sinklens.streaming", "sweep": "sinklens.sweep"}


def blocks(path: Path) -> list[str]:
    """The blocks marked as Python, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def unknown_names(code: str) -> list[str]:
    """What a block asks of sinklens that there is not: names of its modules, and keywords of its functions."""
    found = []
    for node in ast.walk(ast.parse(code)):
        target = node.func if isinstance(node, ast.Call) else node
        if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)):
            continue
        module = MODULES.get(target.value.id)
        if module is None:
            continue
        if target.attr not in import_module(module).__all__:
            found.append(f"{module}.{target.attr}")
        elif isinstance(node, ast.Call):
            found += _wrong_keywords(getattr(import_module(module), target.attr), node)
    return found


def _wrong_keywords(function: Any, call: ast.Call) -> list[str]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [f"{function.__name__}({k.arg}=)" for k in call.keywords if k.arg is not None and k.arg not in parameters]
