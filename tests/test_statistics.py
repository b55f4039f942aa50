"""Intervals: over documents, only from 16 on, the published BCa formula."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from sinklens.statistics import document_sums, interval


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


def test_the_interval_is_the_published_bca_formula() -> None:
    """Efron 1987: percentiles shifted by the bias z0 and the acceleration of the jackknife."""
    values = torch.linspace(0.1, 2.2, 40) ** 3
    found = interval(values, range(40), resamples=20_000)
    assert found is not None
    normal, n = NormalDist(), len(values)
    draws = values[torch.randint(0, n, (200_000, n), generator=torch.Generator().manual_seed(1))].mean(1)
    z0 = normal.inv_cdf(float((draws < values.mean()).double().mean()))
    jackknife = (values.sum() - values) / (n - 1)
    d = jackknife.mean() - jackknife
    a = float((d**3).sum() / (6 * (d**2).sum() ** 1.5))
    for side, level in enumerate((0.025, 0.975)):
        z = z0 + normal.inv_cdf(level)
        quantile = normal.cdf(z0 + z / (1 - a * z))
        assert found[side] == pytest.approx(float(draws.sort().values[round(quantile * len(draws))]), rel=0.01)


def test_a_constant_sample_gives_the_point() -> None:
    assert interval(torch.full((20,), 0.25), range(20)) == (0.25, 0.25)


def test_the_interval_is_reproducible() -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert interval(values, range(20)) == interval(values, range(20))
    assert interval(values, range(20), seed=1) != interval(values, range(20))
    assert not math.isnan(interval(values, range(20), confidence=0.5)[0])  # pyright: ignore[reportOptionalSubscript]
