"""Public names that load at first use (SPEC 1, from a package's ``__init__.pyi``), and old names that moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import lazy_loader


def attach_stub(
    package: str, file: str, *, moved: Mapping[str, str] | None = None, defined: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: ``__name__``.
        file: ``__file__``; the stub lies beside it.
        moved: old names, and the subpackage that has each now: they work, with a FutureWarning, and are not listed.
        defined: names that the package defines itself.
    """
    load, _, listed = lazy_loader.attach_stub(package, file)
    names = sorted([*listed, *defined])
    homes = moved or {}

    def find(name: str) -> Any:
        if name not in homes:
            return load(name)
        place = f"{package}.{homes[name]}"
        warnings.warn(
            f"{package}.{name} is {place}.{name} now; the old name goes with sinklens 0.3", FutureWarning, stacklevel=2
        )
        return getattr(import_module(place), name)

    return find, lambda: list(names), names
