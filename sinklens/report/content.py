"""The parts of a report: sections with sentences, figures that say how they are repeated, tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure.

    Attributes:
        name: of its files in ``figures/``.
        figure: with its title.
        caption: how to read it.
        code: the expression that makes it, after the lines of the report's stages.
        narrowest: below this width in pixels the page lets it scroll by itself.
    """

    name: str
    figure: Figure
    caption: str
    code: str
    narrowest: int = 0


@dataclass(frozen=True, eq=False)
class Sheet:
    """A table that is shown, and written to ``tables/`` as ``name``."""

    name: str
    frame: pd.DataFrame
    caption: str


@dataclass(frozen=True, eq=False)
class Section:
    """One part of the story.

    Attributes:
        anchor: its name in addresses.
        title: its heading.
        sentences: what was found.
        plots, sheets: what shows it.
        missing: why (a part of) it could not be done, one sentence each.
        code: the lines that compute its results.
    """

    anchor: str
    title: str
    sentences: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    code: str = ""
