"""Published results about attention sinks, measured again: the catalogue, the rules, ``sinklens.reproduce``."""

from __future__ import annotations

from sinklens.reproductions.catalogue import CATALOGUE
from sinklens.reproductions.claims import Above, Below, Claim, Entry, Equals, Quantity, Setting, verdict
from sinklens.reproductions.originals import ORIGINALS, Original, Subject
from sinklens.reproductions.result import Reproductions
from sinklens.reproductions.run import reproduce

__all__ = [
    "CATALOGUE",
    "ORIGINALS",
    "Above",
    "Below",
    "Claim",
    "Entry",
    "Equals",
    "Original",
    "Quantity",
    "Reproductions",
    "Setting",
    "Subject",
    "reproduce",
    "verdict",
]
