"""Intervals over documents (definitions: BCa bootstrap, at least 16 documents, else values only)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import bootstrap
from torch import Tensor

MIN_DOCUMENTS = 16


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
    """The BCa bootstrap interval of the mean over sequences, resampling documents; None with fewer than 16 of them.

    Source: Efron 1987, by ``scipy.stats.bootstrap``. A constant sample gives the point itself.
    """
    sums, counts = document_sums(values.double().cpu(), documents)
    if len(sums) < MIN_DOCUMENTS:
        return None
    means = sums / counts
    if np.ptp(means) <= 1e-12 * max(float(np.abs(means).max()), 1e-30):  # constant but for rounding
        return float(means[0]), float(means[0])
    found = bootstrap(
        (sums, counts),
        lambda total, number, axis: total.sum(axis=axis) / number.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
