"""Intervals over documents (definitions: BCa bootstrap, at least 16 documents, else values only)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import bootstrap
from torch import Tensor

MIN_DOCUMENTS = 16


def document_means(values: Float[Tensor, " sequence"], documents: Sequence[int]) -> Float[Tensor, " document"]:
    """The mean of each document's sequences: the independent units of an interval."""
    index = torch.tensor(documents, device=values.device)
    return torch.stack([values[index == d].mean() for d in dict.fromkeys(documents)])


def interval(
    values: Float[Tensor, " sequence"],
    documents: Sequence[int],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 4999,
) -> tuple[float, float] | None:
    """The BCa bootstrap interval of the mean over documents, or None with fewer than 16 of them.

    Source: Efron 1987, by ``scipy.stats.bootstrap``. A constant sample gives the point itself.
    """
    units = document_means(values.double().cpu(), documents).numpy()
    if len(units) < MIN_DOCUMENTS:
        return None
    if np.ptp(units) == 0:
        return float(units[0]), float(units[0])
    found = bootstrap(
        (units,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
