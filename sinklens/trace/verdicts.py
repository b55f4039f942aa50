"""``Verdict``: what one claim of a paper comes to on a model, with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.validation import public_methods
from sinklens.show.notebook import ShownInJupyter


@public_methods
@dataclass(frozen=True, eq=False)
class Verdict(ShownInJupyter):
    """One claim, tested.

    Attributes:
        claim: its short name.
        statement: what the paper says.
        holds: True or False where the intervals decide it, else None.
        numbers: one row per quantity: mean, 95 % interval over documents (NaN with fewer than 16), how many values and
            documents.
        details: one row per sink, sequence, level or component, whatever the numbers are means of.
        rule: when it holds and when not.
    """

    claim: str
    statement: str
    holds: bool | None
    numbers: pd.DataFrame
    details: pd.DataFrame
    rule: str

    def __repr__(self) -> str:
        words = {True: "holds", False: "does not hold", None: "not decided"}[self.holds]
        lines = [f"{self.claim}: {self.statement}: {words} ({self.rule})"]
        for row in self.numbers.to_dict("records"):
            span = "" if row["low"] != row["low"] else f" [{row['low']:.3g}, {row['high']:.3g}]"
            lines.append(f"  {row['quantity']}: {row['mean']:.3g}{span}, n = {row['n']}")
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """The numbers."""
        return self.numbers

    def number(self, quantity: str) -> dict[str, Any]:
        """One row of the numbers.

        Raises:
            BadInputError: no such quantity.
        """
        rows = {row["quantity"]: row for row in self.numbers.to_dict("records")}
        if quantity not in rows:
            raise BadInputError(f"no quantity {quantity!r}; there are {', '.join(rows)}")
        return rows[quantity]


def quantity(name: str, values: Sequence[float], documents: Sequence[int]) -> dict[str, Any]:
    """A mean over values, NaN left out, with its interval over documents."""
    kept = [(v, d) for v, d in zip(values, documents, strict=True) if v == v]
    known = [d for _, d in kept]
    row: dict[str, Any] = {"quantity": name, "mean": math.nan, "low": math.nan, "high": math.nan}
    if kept:
        tensor = torch.tensor([v for v, _ in kept], dtype=torch.float64)
        row["mean"] = float(tensor.mean())
        row["low"], row["high"] = interval(tensor, known) or (math.nan, math.nan)
    return row | {"n": len(kept), "documents": len(set(known))}


def above(row: dict[str, Any], bound: float) -> bool | None:
    """Whether the whole interval lies above a bound (True), or below it (False); None where it holds the bound."""
    return True if row["low"] > bound else False if row["high"] < bound else None


def every(answers: Sequence[bool | None]) -> bool | None:
    """True where all are True, False where any is False, else None."""
    return False if any(a is False for a in answers) else None if any(a is None for a in answers) else True
