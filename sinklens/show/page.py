"""What every written page shares: the manifest, the template, plotly's script exactly once."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader

_PACKAGES = ("sinklens", "transformer-lens", "transformers", "torch", "numpy")


@runtime_checkable
class Read(Protocol):
    """What a model read (``Tokens``), as a manifest names it."""

    @property
    def digest(self) -> Any:  # a str; kept once computed, which no protocol of a str allows
        """A hash of the ids."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Where each sequence came from."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """How the batch was made."""
        ...


def manifest(
    model: dict[str, Any], tokens: Read, result: dict[str, Any], command: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything needed to run it again: versions, hashes, seed, command; and the result in short."""
    return {
        "command": list(command),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "model": model,
        "tokens": {"sha256": tokens.digest, **tokens.info},
        "sources": list(tokens.sources),
        "result": result,
    }


def render(template: str, figures: Sequence[tuple[go.Figure, str]], **content: Any) -> str:
    """A self-contained page: the template filled, each figure with its caption, text escaped."""
    plots = [
        (figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False}), caption)
        for i, (figure, caption) in enumerate(figures)
    ]
    environment = Environment(loader=PackageLoader("sinklens.show"), autoescape=True)
    return environment.get_template(template).render(figures=plots, **content)


def html_table(frame: pd.DataFrame) -> str:
    """An HTML table with short numbers, without empty columns; text escaped by pandas."""
    known = frame.dropna(axis=1, how="all")
    return known.to_html(index=False, border=0, na_rep="", float_format=lambda value: f"{value:.4f}")
