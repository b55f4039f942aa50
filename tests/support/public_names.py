"""Every public name of sinklens: those at the top bare, those of a subpackage behind its name."""

from __future__ import annotations

import inspect
from functools import reduce
from typing import Any

import sinklens as sl

ROOMS = tuple(name for name in sl.__all__ if inspect.ismodule(getattr(sl, name)))
TOP = tuple(name for name in sl.__all__ if name not in ROOMS)


def named(name: str) -> Any:
    """What a name such as ``token_loss`` or ``trace.writer_neurons`` stands for."""
    return reduce(getattr, name.split("."), sl)


INSIDE = tuple(  # what stands at the top too has its place there
    f"{room}.{name}"
    for room in ROOMS
    for name in getattr(sl, room).__all__
    if getattr(getattr(sl, room), name) not in [getattr(sl, top) for top in TOP]
)
NAMES = (*TOP, *INSIDE)
FUNCTIONS = tuple(name for name in NAMES if callable(named(name)) and not inspect.isclass(named(name)))
CLASSES = tuple(name for name in NAMES if inspect.isclass(named(name)))
