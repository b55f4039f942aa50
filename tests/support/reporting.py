"""Reports of tiny models for tests: a planted model whose sinks are known, with documents enough for intervals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from planted import X, Y, planted_model, row

import sinklens as sl
from sinklens.inputs.load import as_tokens
from sinklens.report.budget import QUICK

LAYERS = 6
LENGTH = 56
SMALL = replace(QUICK, mixing_seqs=1, mixing_tokens=5)
NASTY = ("</script><script>document.title='hit'</script>", "<b>bold</b>", "%{x} %{y}", "<img src=x onerror=alert(1)>")


def planted() -> Any:
    """X is a sink in layers 1 to 5, Y in layers 1 to 3; attention writes a little."""
    return planted_model(LAYERS, {X: 6.0, Y: 4.5}, {X: range(1, LAYERS), Y: range(1, 4)}, writes=0.02)


def texts(model: Any, count: int = 16) -> sl.Tokens:
    """X first in every text, Y a little later; every text is a document."""
    return as_tokens(model, torch.stack([row(LENGTH, {0: X, 3 + b % 5: Y}) for b in range(count)]))


def nasty(tokens: sl.Tokens) -> sl.Tokens:
    """The same ids, their labels such as no page must run, render or fill in."""
    labels = [list(line) for line in tokens.labels]
    for line in labels:
        line[0], line[3], line[4], line[5] = NASTY
    return replace(tokens, labels=tuple(tuple(line) for line in labels))


@contextlib.contextmanager
def counted_forwards(model: Any) -> Iterator[list[int]]:
    """Within, one entry per forward of the model."""
    seen: list[int] = []
    handle = model.original_model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def files_of(folder: Path) -> set[str]:
    """Every file of a folder, by path."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
