"""Intervals hold what they promise: coverage on simulated data at the sizes that are used, by Clopper and Pearson.

A 95 % interval that is right covers the truth in 95 % of simulated samples. With ``RUNS`` simulations the observed
share errs by itself, so a claim "covers at least p" is rejected where the observed count would have a probability below
0.001 under p (one-sided binomial bound). Intervals of means over documents must reach the nominal 0.95; where they do
not, ``LEAST`` says what they reach, so that docs/findings/interval_coverage.md cannot promise more than is true.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributions import DISTRIBUTIONS
from scipy.stats import binom, t

from sinklens.core.intervals import interval
from sinklens.mixing.jacobians import chi_square_interval

RUNS = 600
RESAMPLES = 399

# Where the coverage is below 0.95: very skewed documents, and samples that are often constant (a point holds nothing).
LEAST = {
    ("lognormal", 16): 0.91,
    ("lognormal", 24): 0.93,
    ("lognormal", 50): 0.94,
    ("mostly zero", 16): 0.89,
    ("rare", 16): 0.81,
    ("rare", 24): 0.90,
}


def coverage(name: str, n: int, runs: int = RUNS, resamples: int = RESAMPLES) -> float:
    """The share of simulated samples whose interval holds the true mean."""
    draw, truth = DISTRIBUTIONS[name]
    generator = np.random.default_rng([len(name), n])
    hits = 0
    for run in range(runs):
        found = interval(torch.from_numpy(draw(generator, n)), range(n), seed=run, resamples=resamples)
        assert found is not None
        hits += found[0] <= truth <= found[1]
    return hits / runs


def too_low(share: float, runs: int, least: float) -> bool:
    """Whether so small a share would have a probability below 0.001 if the coverage were ``least``."""
    return float(binom.cdf(round(share * runs), runs, least)) < 0.001


@pytest.mark.parametrize("n", [16, 24, 50])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_intervals_cover_the_mean_as_often_as_they_say(name: str, n: int) -> None:
    share = coverage(name, n)
    assert not too_low(share, RUNS, LEAST.get((name, n), 0.95)), f"{name}, n = {n}: {share:.3f}"


def test_intervals_cover_where_documents_hold_unequal_numbers_of_sequences() -> None:
    """What a document adds is shared by its one to five sequences: documents are the units, not sequences."""
    generator = np.random.default_rng(5)
    hits = 0
    for run in range(RUNS):
        documents = np.repeat(np.arange(16), generator.integers(1, 6, size=16))
        values = generator.exponential(size=16)[documents] + generator.normal(size=len(documents))
        found = interval(torch.from_numpy(values), documents.tolist(), seed=run, resamples=RESAMPLES)
        assert found is not None
        hits += found[0] <= 1.0 <= found[1]
    assert not too_low(hits / RUNS, RUNS, 0.94), f"{hits / RUNS:.3f}"


@pytest.mark.parametrize("name", ["mostly zero", "rare", "lognormal", "contaminated"])
def test_no_sample_gives_an_absurdly_wide_interval(name: str) -> None:
    """Plain bootstrap-t divides by the spread of resamples that may have none: its widths have no bound."""
    draw, _ = DISTRIBUTIONS[name]
    generator = np.random.default_rng(0)
    for run in range(RUNS):
        sample = draw(generator, 16)
        found = interval(torch.from_numpy(sample), range(16), seed=run, resamples=RESAMPLES)
        assert found is not None
        assert found[1] - found[0] <= 3.5 * 2 * float(t.ppf(0.975, 15)) * sample.std(ddof=1) / 4


def test_the_test_of_coverage_sees_an_interval_that_is_too_short() -> None:
    """The same simulation with 85 % intervals is rejected: the bound is one that can fail."""
    draw, truth = DISTRIBUTIONS["normal"]
    generator = np.random.default_rng(0)
    hits = 0
    for run in range(RUNS):
        sample = torch.from_numpy(draw(generator, 16))
        found = interval(sample, range(16), seed=run, resamples=RESAMPLES, confidence=0.85)
        assert found is not None
        hits += found[0] <= truth <= found[1]
    assert too_low(hits / RUNS, RUNS, 0.95)


@pytest.mark.parametrize("ranks", [1, 3, 30])
def test_chi_square_intervals_of_jacobian_norms_cover_the_exact_norm(ranks: int) -> None:
    """16 probes ``|J v|^2`` with v ~ N(0, I): sums of ``s_k^2`` chi-square variables, from one singular value to 30."""
    generator = torch.Generator().manual_seed(ranks)
    squared = torch.linspace(1.0, 3.0, ranks, dtype=torch.float64) ** 2
    probes = torch.randn(16, 2000, ranks, generator=generator, dtype=torch.float64).square() @ squared
    low, high = chi_square_interval(probes)
    inside = ((low <= squared.sum()) & (squared.sum() <= high)).double().mean()
    assert not too_low(float(inside), 2000, 0.95), f"{float(inside):.4f}"
