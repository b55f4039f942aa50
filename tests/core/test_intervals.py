"""Intervals: over documents, only from 16 on, bootstrap-t."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from sinklens.core.intervals import document_sums, interval


def test_fifteen_documents_carry_no_interval_and_sixteen_do() -> None:
    values = torch.randn(16, generator=torch.Generator().manual_seed(0))
    assert interval(values[:15], range(15)) is None
    found = interval(values, range(16))
    assert found is not None
    assert found[0] < float(values.mean()) < found[1]


def test_sequences_of_one_document_count_once() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert interval(values, [i // 2 for i in range(30)]) is None
    sums, counts = document_sums(torch.tensor([1.0, 3.0, 5.0]), [7, 7, 2])
    assert (sums.tolist(), counts.tolist()) == ([4.0, 5.0], [2.0, 1.0])


def test_the_interval_is_that_of_the_reported_mean_also_where_documents_have_unequal_numbers() -> None:
    values = torch.tensor([1.0] * 65 + [0.0] * 15 + [0.5] * 10)
    documents = [0] * 65 + list(range(1, 26))
    found = interval(values, documents)
    assert found is not None
    assert found[0] < float(values.mean()) < found[1]


def by_loops(values: list[float], documents: list[int], resamples: int, seed: int = 0) -> tuple[float, float]:
    """The same interval, document by document, from the same draws; ``resamples + 1`` must be a multiple of 40."""
    groups = [[v for v, d in zip(values, documents, strict=True) if d == own] for own in dict.fromkeys(documents)]
    n = len(groups)

    def spread(some: list[list[float]], more: float, prior: float) -> tuple[float, float]:
        sequences = sum(len(group) for group in some)
        mean = sum(sum(group) for group in some) / sequences
        squares = sum((sum(group) - mean * len(group)) ** 2 for group in some) + more
        return mean, math.sqrt(n * squares / (n - 1 + prior)) / sequences

    mean, error = spread(groups, 0.0, 0.0)
    half = (error * len(values)) ** 2 / n / 2  # of the sample's variance
    drawn = np.random.default_rng(seed).integers(n, size=(n, resamples))
    ratios = []
    for r in range(resamples):
        center, own = spread([groups[i] for i in drawn[:, r]], half, 0.5)
        ratios.append((center - mean) / own)
    ratios.sort()
    k = (resamples + 1) // 40
    student = float(scipy.stats.t.ppf(0.975, n - 1))
    return mean - max(ratios[-k], student) * error, mean - min(ratios[k - 1], -student) * error


@pytest.mark.parametrize("kind", ["skewed", "unequal documents", "mostly equal", "symmetric"])
def test_the_interval_is_bootstrap_t_by_loops(kind: str) -> None:
    draw = torch.Generator().manual_seed(2)
    documents = list(range(20)) if kind != "unequal documents" else [i % 17 for i in range(60)] + [3] * 9
    values = torch.randn(len(documents), generator=draw, dtype=torch.float64)
    if kind in ("skewed", "unequal documents"):
        values = values.exp()
    if kind == "mostly equal":  # most resamples have no spread of their own
        values = torch.zeros(20, dtype=torch.float64)
        values[4] = 1.0
    found = interval(values, documents, resamples=399)
    assert found == pytest.approx(by_loops(values.tolist(), documents, 399), rel=1e-12)


def test_a_skewed_sample_gets_the_textbook_interval_of_independent_draws() -> None:
    """Without the half document and Student's bound, which do nothing on the long side here."""
    values = torch.linspace(0.1, 2.2, 60, dtype=torch.float64) ** 4
    found = interval(values, range(60), resamples=20_000)
    assert found is not None
    drawn = values[torch.randint(0, 60, (100_000, 60), generator=torch.Generator().manual_seed(1))]
    ratios = (drawn.mean(1) - values.mean()) / (drawn.std(1) / math.sqrt(60))
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    error, student = float(values.std()) / math.sqrt(60), float(scipy.stats.t.ppf(0.975, 59))
    assert low < -student < -high, "skewed to the right: the textbook's lower side is shorter than Student's"
    assert found[1] - float(values.mean()) == pytest.approx(-low * error, rel=0.02)
    assert float(values.mean()) - found[0] == pytest.approx(student * error, rel=1e-9)


def test_neither_side_is_shorter_than_students() -> None:
    for seed in range(20):
        values = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        found = interval(values, range(16), resamples=399)
        half = float(scipy.stats.t.ppf(0.975, 15)) * float(values.std()) / 4
        assert found is not None
        mean = float(values.mean())
        assert min(mean - found[0], found[1] - mean) >= half * (1 - 1e-12)


def test_a_constant_sample_gives_the_point() -> None:
    assert interval(torch.full((20,), 0.25), range(20)) == (0.25, 0.25)


def test_the_interval_is_reproducible() -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert interval(values, range(20)) == interval(values, range(20))
    assert interval(values, range(20), seed=1) != interval(values, range(20))
    assert not math.isnan(interval(values, range(20), confidence=0.5)[0])  # pyright: ignore[reportOptionalSubscript]
