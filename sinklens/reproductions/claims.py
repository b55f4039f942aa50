"""What a paper claims, and when a measurement reproduces it: rules that are code, never judgement by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinklens.core.intervals import summary
from sinklens.core.validation import public
from sinklens.inputs.load import load_tokens
from sinklens.reproductions.originals import Subject

REPRODUCED, DIFFERS, NOT_COMPARABLE = "reproduced", "differs", "not comparable"


@dataclass(frozen=True)
class Quantity:
    """A measured number with its 95 % interval over documents (NaN where there is none).

    ``exact``: there is nothing to sample, as for the one text that a paper shows, so the value itself is judged.
    ``reason``: why the value is NaN.
    """

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    documents: int = 1
    exact: bool = False
    reason: str = ""

    @property
    def span(self) -> tuple[float, float]:
        """What is compared with a bound: the interval, or the value where it is exact."""
        return (self.value, self.value) if self.exact else (self.low, self.high)


def measured(name: str, values: Tensor, documents: Sequence[int]) -> Quantity:
    """The mean over sequences of what is finite, with its interval over documents (16 or more)."""
    found = summary(values, documents)
    known = {d for d, finite in zip(documents, values.isfinite().tolist(), strict=True) if finite}
    return Quantity(name, found["mean"], found["low"], found["high"], len(known))


def missing(name: str, reason: str) -> Quantity:
    """A number that a model cannot give."""
    return Quantity(name, math.nan, documents=0, reason=reason)


def exactly(name: str, value: float) -> Quantity:
    """A number without sampling error."""
    return Quantity(name, value, exact=True)


@dataclass(frozen=True)
class Above:
    """The quantity exceeds a bound: its whole interval does."""

    bound: float

    def __str__(self) -> str:
        return f"above {self.bound:g}"

    def judge(self, quantity: Quantity) -> bool | None:
        """True, False, or None where the interval holds the bound or is missing."""
        low, high = quantity.span
        return True if low > self.bound else False if high <= self.bound else None


@dataclass(frozen=True)
class Below:
    """The quantity stays below a bound: its whole interval does."""

    bound: float

    def __str__(self) -> str:
        return f"below {self.bound:g}"

    def judge(self, quantity: Quantity) -> bool | None:
        """True, False, or None where the interval holds the bound or is missing."""
        low, high = quantity.span
        return True if high < self.bound else False if low >= self.bound else None


@dataclass(frozen=True)
class Equals:
    """The quantity is the published number of this very model, to a tolerance that holds its whole interval.

    The tolerance is ``max(absolute, relative |published|)``.
    """

    values: Mapping[str, float]
    absolute: float
    relative: float = 0.0

    def __str__(self) -> str:
        share = f" or {self.relative:.0%} of it" if self.relative else ""
        return f"within {self.absolute:g}{share}"

    def judge(self, quantity: Quantity, original: str) -> bool | None:
        """True, False, or None where the interval reaches across the tolerance's edge or is missing."""
        published = self.values[original]
        tolerance = max(self.absolute, self.relative * abs(published))
        low, high = quantity.span
        if published - tolerance <= low and high <= published + tolerance:
            return True
        return False if high < published - tolerance or low > published + tolerance else None


Rule = Above | Below | Equals


@dataclass(frozen=True)
class Claim:
    """One thing that a paper says of one quantity.

    Attributes:
        quantity: the name of the measured :class:`Quantity`.
        statement: what the paper says.
        rule: when a measurement reproduces it. ``Above`` and ``Below`` stand for directions and orders, which the
            papers claim of models in general; ``Equals`` for a printed number, which belongs to the model it was
            printed for.
        published: the numbers as printed.
        grade: where they were seen: A official code or result files, B the paper's text, C third-party notes, D the
            abstract.
        only: why the claim says nothing about a model, or "".
    """

    quantity: str
    statement: str
    rule: Rule
    published: str
    grade: str
    only: Callable[[Subject], str] | None = None

    def shown(self, subject: Subject) -> str:
        """The published figure to print beside a measurement: the model's own where there is one."""
        if isinstance(self.rule, Equals):
            if subject.original in self.rule.values:
                return f"{self.rule.values[subject.original]:.4g}"
            return "; ".join(f"{name} {value:.4g}" for name, value in self.rule.values.items())
        return self.published


@public
def verdict(claim: Claim, quantity: Quantity | None, subject: Subject, reason: str = "") -> tuple[str, str]:
    """The verdict on a claim and, where it is "not comparable", why.

    Args:
        claim: what is judged.
        quantity: what was measured, None where nothing could be.
        subject: the model.
        reason: why nothing could be measured.
    """
    if quantity is None:
        return NOT_COMPARABLE, reason or f"{claim.quantity} could not be measured"
    why = "" if claim.only is None else claim.only(subject)
    if why:
        return NOT_COMPARABLE, why
    if isinstance(claim.rule, Equals) and subject.original not in claim.rule.values:
        return NOT_COMPARABLE, f"printed for {', '.join(claim.rule.values)}, measured on {subject.name}{subject.doubt}"
    if not math.isfinite(quantity.value):
        return NOT_COMPARABLE, quantity.reason or f"{quantity.name} is not defined here"
    if not all(map(math.isfinite, quantity.span)):
        return NOT_COMPARABLE, f"{quantity.documents} document(s) carry no interval; 16 do"
    if isinstance(claim.rule, Equals):
        answer = claim.rule.judge(quantity, subject.original)
    else:
        answer = claim.rule.judge(quantity)
    if answer is None:
        low, high = quantity.span
        return NOT_COMPARABLE, f"the interval [{low:.3g}, {high:.3g}] leaves '{claim.rule}' undecided; more documents"
    return (REPRODUCED if answer else DIFFERS), ""


@dataclass(frozen=True)
class Setting:
    """What all entries share: the natural text, a number of sequences in the place of each entry's own, the seed."""

    source: str = "python-docs"
    n_seqs: int | None = None
    seed: int = 0

    def text(self, model: Any, n_seqs: int, seq_len: int, **options: Any) -> Any:
        """The natural text, ``n_seqs`` sequences of exactly ``seq_len`` tokens."""
        return load_tokens(model, self.source, n_seqs=self.n_seqs or n_seqs, seq_len=seq_len, seed=self.seed, **options)


@dataclass(frozen=True)
class Entry:
    """One published result.

    Attributes:
        name, title: how it is called.
        source: the paper, its table or figure.
        protocol: what the paper measures, and on which models.
        deviations: where our measurement is another.
        originals: keys of :data:`sinklens.reproductions.originals.ORIGINALS`: the models of the paper.
        stand_ins: the embedded models on which it is measured where no original is at hand.
        claims: what is judged.
        unfit: why a model cannot run the protocol, or "".
        measure: runs the protocol: quantities by which the claims are judged, and others worth showing.
    """

    name: str
    title: str
    source: str
    protocol: str
    deviations: tuple[str, ...]
    originals: tuple[str, ...]
    stand_ins: tuple[str, ...]
    claims: tuple[Claim, ...]
    unfit: Callable[[Subject], str]
    measure: Callable[[Any, Setting], list[Quantity]]


def any_decoder(subject: Subject) -> str:
    """Decoders fit."""
    return "" if subject.facts.causal else "the model is no decoder"


def torch_ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b`` in float64, NaN where b is 0."""
    return torch.where(b == 0, torch.nan, a.double() / b.double())
