"""Views that circuitsvis draws, made to work offline and to take no token for HTML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinklens.core.storage import write_text
from sinklens.core.validation import public_methods

LONGEST_VIEW = 128
_JOINER = "\u2060"  # has no width; behind '<' and '&' it lets no tag and no entity begin
_LESS_THAN = "\ue000"  # stands for '<' until the page is written: circuitsvis does not escape it inside its script


@public_methods
@dataclass(frozen=True)
class TokenView:
    """A circuitsvis view that works offline: it shows itself in a notebook, or :meth:`save` it as a page."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the view as a page of its own."""
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{self.html}</body></html>\n')
        return Path(path)


def safe_labels(labels: Sequence[str]) -> list[str]:
    """Tokens as circuitsvis may write them into its script and, as it does with tokens, take them for HTML."""
    shown = (visible_token(label).replace("&", f"&{_JOINER}") for label in labels)
    return [label.replace("<", f"{_LESS_THAN}{_JOINER}") for label in shown]


def offline_view(drawn: Any) -> TokenView:
    """What circuitsvis drew, with its script inside and every '<' of a token escaped."""
    script, call = str(drawn.local_src).rsplit("CircuitsVis.render(", 1)
    escaped = call.replace(r"\ue000", r"\u003c")
    return TokenView(f"{script}CircuitsVis.render({escaped}".replace('margin: 15px 0;"/>', 'margin: 15px 0;"></div>'))


def visible_token(label: str) -> str:
    """A token as a label: line breaks and empty tokens show."""
    return label.replace("\n", "\u21b5") or "\u00b7"
