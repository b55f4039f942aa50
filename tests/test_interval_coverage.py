"""Intervals hold what they promise: coverage on simulated data at the sizes that are used, by Clopper and Pearson.

A 95 % interval that is right covers the truth in 95 % of simulated samples. With ``RUNS`` simulations the observed
share errs by itself, so a claim "covers at least p" is rejected where the observed count would have a probability below
0.001 under p (one-sided binomial bound). Where BCa misses its nominal level the test says so, with the measured share,
so that docs/definitions.md cannot promise more than is true.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binom

from sinklens.jacobians import chi_square_interval
from sinklens.statistics import interval

RUNS = 300
RESAMPLES = 799
Draw = Callable[[np.random.Generator, int], np.ndarray]

DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda g, n: g.normal(size=n), 0.0),
    "uniform": (lambda g, n: g.uniform(size=n), 0.5),
    "exponential": (lambda g, n: g.exponential(size=n), 1.0),
    "lognormal": (lambda g, n: g.lognormal(0.0, 1.0, size=n), float(np.exp(0.5))),
    "zero-inflated": (lambda g, n: np.where(g.uniform(size=n) < 0.5, 0.0, g.exponential(size=n)), 0.5),
    "rate": (lambda g, n: g.binomial(30, 0.9, size=n) / 30, 0.9),
}
# The least coverage that each case must have. 0.95 minus what BCa is known to lose with so few documents; what is
# measured stands in docs/definitions.md, section 7.
LEAST = {
    ("normal", 16): 0.90,
    ("normal", 24): 0.91,
    ("normal", 50): 0.92,
    ("uniform", 16): 0.90,
    ("uniform", 24): 0.91,
    ("uniform", 50): 0.92,
    ("exponential", 16): 0.87,
    ("exponential", 24): 0.89,
    ("exponential", 50): 0.91,
    ("lognormal", 16): 0.80,
    ("lognormal", 24): 0.82,
    ("lognormal", 50): 0.86,
    ("zero-inflated", 16): 0.85,
    ("zero-inflated", 24): 0.87,
    ("zero-inflated", 50): 0.90,
    ("rate", 16): 0.89,
    ("rate", 24): 0.90,
    ("rate", 50): 0.91,
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


@pytest.mark.parametrize(("name", "n"), [("normal", 16), ("exponential", 16), ("rate", 24), ("lognormal", 50)])
def test_intervals_cover_the_mean_as_often_as_the_definitions_say(name: str, n: int) -> None:
    share = coverage(name, n)
    assert not too_low(share, RUNS, LEAST[name, n]), f"{name}, n = {n}: {share:.3f}"


def test_the_test_of_coverage_sees_an_interval_that_is_too_short() -> None:
    """The same simulation with 80 % intervals is rejected: the bound is one that can fail."""
    draw, truth = DISTRIBUTIONS["normal"]
    generator = np.random.default_rng(0)
    hits = 0
    for run in range(RUNS):
        sample = torch.from_numpy(draw(generator, 16))
        found = interval(sample, range(16), seed=run, resamples=RESAMPLES, confidence=0.8)
        assert found is not None
        hits += found[0] <= truth <= found[1]
    assert too_low(hits / RUNS, RUNS, LEAST["normal", 16])


@pytest.mark.parametrize("ranks", [1, 3, 30])
def test_chi_square_intervals_of_jacobian_norms_cover_the_exact_norm(ranks: int) -> None:
    """16 probes ``|J v|^2`` with v ~ N(0, I): sums of ``s_k^2`` chi-square variables, from one singular value to 30."""
    generator = torch.Generator().manual_seed(ranks)
    squared = torch.linspace(1.0, 3.0, ranks, dtype=torch.float64) ** 2
    probes = torch.randn(16, 2000, ranks, generator=generator, dtype=torch.float64).square() @ squared
    low, high = chi_square_interval(probes)
    inside = ((low <= squared.sum()) & (squared.sum() <= high)).double().mean()
    assert not too_low(float(inside), 2000, 0.95), f"{float(inside):.4f}"
