"""Intervals over documents (definitions, section 7: bootstrap-t, at least 16 documents, else values only)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata, t
from torch import Tensor

MIN_DOCUMENTS = 16
PRIOR = 0.5  # of one document, with the sample's variance: what every resample's variance is mixed with
CELLS = 1 << 14  # resampled documents held at once: more of them leave the processor's cache


def document_sums(
    values: Float[Tensor, " sequence"], documents: Sequence[int]
) -> tuple[Float[np.ndarray, " document"], Float[np.ndarray, " document"]]:
    """The sum and the number of each document's sequences: documents are the independent units of an interval."""
    index = torch.tensor(documents, device=values.device)
    groups = [values[index == d] for d in dict.fromkeys(documents)]
    return np.array([float(g.sum()) for g in groups]), np.array([float(len(g)) for g in groups])


def interval(
    values: Float[Tensor, " sequence"],
    documents: Sequence[int],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 4999,
) -> tuple[float, float] | None:
    """The bootstrap-t interval of the mean over sequences, resampling documents; None with fewer than 16 of them.

    ``m = sum S / sum N`` over documents with sums S of N sequences; ``r = S - m N``; ``se^2 = n sum r^2 / ((n - 1)
    (sum N)^2)``, which is the usual one where every document has one sequence. With q the quantiles of
    ``(m* - m) / se*`` over resamples and t Student's quantile with n - 1 degrees of freedom::

        [m - max(q_high, t) se,  m - min(q_low, -t) se]

    Two departures from the textbook, both for few documents (figures: docs/findings/interval_coverage.md). A resample
    that picked (nearly) equal documents has no spread, and its ratio no bound; so half a document of the sample's own
    variance is added to every resample, ``sum r*^2 + s^2 / 2`` over ``n - 1 / 2``. And neither side is shorter than
    Student's: the bootstrap alone is too short under symmetric heavy tails.

    A constant sample gives the point itself: nothing in it says how much documents can differ.
    Source: Hall 1988 for bootstrap-t; the two departures are ours.
    """
    sums, counts = document_sums(values.double().cpu(), documents)
    n = len(sums)
    if n < MIN_DOCUMENTS:
        return None
    means = sums / counts
    if np.ptp(means) <= 1e-12 * max(float(np.abs(means).max()), 1e-30):  # constant but for rounding
        return float(means[0]), float(means[0])
    mean = float(sums.sum() / counts.sum())
    rest = sums - mean * counts
    variance = float((rest**2).sum()) / (n - 1)
    draw = np.random.default_rng(seed)
    columns = max(1, CELLS // n)
    ratios = np.concatenate(
        [
            _ratios(draw.integers(n, size=(n, min(columns, resamples - first))), rest, counts, variance)
            for first in range(0, resamples, columns)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], method="weibull")
    student = float(t.ppf(1 - tail, n - 1))
    error = math.sqrt(variance / n) / float(counts.mean())
    return mean - max(float(high), student) * error, mean - min(float(low), -student) * error


def _ratios(
    drawn: Int[np.ndarray, "document resample"],
    rest: Float[np.ndarray, " document"],
    counts: Float[np.ndarray, " document"],
    variance: float,
) -> Float[np.ndarray, " resample"]:
    """``(m* - m) / se*`` of every resample; ``rest`` sums to 0, so m* - m is its resampled mean over sequences."""
    n = len(rest)
    some, number = rest[drawn], counts[drawn]
    total = number.sum(0)
    shift = some.sum(0) / total
    squares = ((some - shift * number) ** 2).sum(0) + PRIOR * variance
    return shift * total / np.sqrt(n * squares / (n - 1 + PRIOR))


def summary(values: Float[Tensor, " item"], documents: Sequence[int], name: str = "") -> dict[str, float]:
    """The mean of what is finite, and its 95 % interval over documents; NaN where there is none.

    Keys: ``mean, low, high``, or ``name, name_low, name_high``.
    """
    known = values.isfinite()
    kept = [d for d, k in zip(documents, known.tolist(), strict=True) if k]
    low, high = (interval(values[known], kept) if kept else None) or (math.nan, math.nan)
    mean = float(values[known].double().mean()) if kept else math.nan
    start = f"{name}_" if name else ""
    return {name or "mean": mean, f"{start}low": low, f"{start}high": high}


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    groups: Sequence[object],
    documents: Sequence[int],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 999,
) -> tuple[float, float, float]:
    """Spearman's correlation within groups, with a percentile bootstrap interval over documents.

    Ranks are taken within each group and centred, so that what differs between groups does not count; groups of fewer
    than 3 are left out. The interval is NaN with fewer than 16 documents, everything is NaN where x or y is constant.
    """

    def pooled(rows: Int[np.ndarray, " row"]) -> float:
        a, b = values[0, rows], values[1, rows]
        left, right = [np.zeros(0)], [np.zeros(0)]
        for group in np.unique(labels[rows]):
            mine = labels[rows] == group
            left.append(rankdata(a[mine]) - (mine.sum() + 1) / 2)
            right.append(rankdata(b[mine]) - (mine.sum() + 1) / 2)
        p, q = np.concatenate(left), np.concatenate(right)
        size = math.sqrt(float((p * p).sum() * (q * q).sum()))
        return float((p * q).sum()) / size if size > 0 else math.nan

    values = np.array([x, y], dtype=np.float64)
    names = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    labels = np.array([names[group] for group in groups], dtype=np.int64)
    large = np.array([(labels == label).sum() >= 3 for label in labels], dtype=bool)  # of the sample, for all resamples
    found = [np.flatnonzero(large & (np.array(documents) == d)) for d in dict.fromkeys(documents)]
    by_document = [rows for rows in found if len(rows)]
    whole = pooled(np.flatnonzero(large))
    if len(by_document) < MIN_DOCUMENTS or whole != whole:
        return whole, math.nan, math.nan
    draw = np.random.default_rng(seed)
    drawn = [
        pooled(np.concatenate([by_document[n] for n in draw.integers(len(by_document), size=len(by_document))]))
        for _ in range(resamples)
    ]
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return whole, float(low), float(high)
