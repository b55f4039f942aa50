"""docs/architectures.md: written from the results of tests/check/test_architectures.py, and read again by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

import sinklens as sl

PATH = ROOT / "docs" / "architectures.md"
NAMES = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "neox", "phi3", "falcon", "opt", "bloom",
    "mixtral", "gpt-oss", "deepseek-v3", "bert", "roberta", "vit", "gpt-neo", "modernbert", "distilbert", "dinov2",
)  # fmt: skip
TABLE: Any = pytest.StashKey[dict[str, sl.check.SelfTest]]()
MARKS = {"exact": "✓", "partly": "(✓)", "refused": "–"}
_HEAD = """# Architectures

Written by `make architectures` from the run of `tests/check/test_architectures.py`: tiny random models of each
architecture (2 or 3 layers, large weights), every public function that runs a model, each against its formula written
out (`sinklens check` does the same on your model). {counts}

✓ exact: the largest error of all parts is at most 1e-3 (for edits: of what the edit changes). (✓) exact, but some part
is refused, see below. – refused: `UnsupportedModelError` says why and what to do. There is no third outcome.

"""


def mark(row: sl.check.SelfTest, function: str) -> str:
    """The cell of one function."""
    found = row[function]
    return MARKS["partly" if found.outcome == "exact" and found.refused else found.outcome]


def write(results: Mapping[str, sl.check.SelfTest], path: Path = PATH) -> None:
    """The table, the largest errors, and every refusal with its reason."""
    names = list(results)
    functions = [row.function for row in next(iter(results.values())).rows]
    pairs = [(name, row) for name in names for row in results[name].rows]
    exact, refused = (sum(row.outcome == kind for _, row in pairs) for kind in ("exact", "refused"))
    partly = sum(row.outcome == "exact" and bool(row.refused) for _, row in pairs)
    counts = f"Of {len(pairs)} pairs {exact} are exact ({partly} of them in part) and {refused} refused."
    lines = [_HEAD.format(counts=counts)]
    lines.append("| function | " + " | ".join(names) + " |")
    lines.append("|---|" + "---|" * len(names))
    for function in functions:
        lines.append(f"| `{function}` | " + " | ".join(mark(results[name], function) for name in names) + " |")
    worst = [max((row.error for row in results[name].rows if row.errors), default=float("nan")) for name in names]
    lines.append("| largest error | " + " | ".join("–" if w != w else f"{w:.0e}" for w in worst) + " |")
    lines += ["", "## What is refused, and why", ""]
    reasons: dict[str, dict[str, list[str]]] = {}  # why -> function -> where
    for name, row in pairs:
        told = row.refused if row.outcome == "exact" else {"": row.reason or next(iter(row.refused.values()), "")}
        facts = results[name].info["capabilities"]
        for part, why in told.items():
            label = f"`{row.function}`" + (f" ({part})" if part else "")
            for own in (f"{facts['model']} ({facts['architecture']}): ", f"{facts['model']}: ", f"{facts['model']} "):
                why = why.replace(own, "")
            for own in (facts["model"], facts["architecture"]):
                why = why.replace(own, "this model")
            if row.outcome == "refused" or part:
                where = reasons.setdefault(" ".join(why.split()), {}).setdefault(label, [])
                where += [name] if name not in where else []
    for why, by in reasons.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for label, where in by.items():
            alike.setdefault(tuple(where), []).append(label)
        for where, labels in alike.items():
            lines.append(f"- {', '.join(labels)}: {', '.join(where)}: {why}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: Path = PATH) -> dict[str, dict[str, str]]:
    """The cells of the written table: by architecture, by function."""
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    names = cells[0][1:]
    body = [row for row in cells[2:] if row[0].startswith("`")]
    return {name: {row[0].strip("`"): row[n + 1] for row in body} for n, name in enumerate(names)}
