"""The column means as pure maths: published constants, and both sides of every threshold."""

from __future__ import annotations

import pytest
import torch

from sinklens.attention.importance import by_position, column_means, visibility
from sinklens.core.visibility import allowed_keys


def causal_columns(pattern: torch.Tensor):
    mask = torch.ones(1, pattern.shape[-1], dtype=torch.bool)
    return column_means(pattern[None, None], mask, visibility(mask, causal=True, window=None), causal=True, window=None)


def uniform_causal(length: int) -> torch.Tensor:
    ones = torch.ones(length, length).tril()
    return ones / ones.sum(-1, keepdim=True)


def test_uniform_causal_attention_gives_the_harmonic_constants_at_64() -> None:
    alpha = causal_columns(uniform_causal(64)).alpha[0, 0]
    assert float(alpha[0]) == pytest.approx(0.07412, abs=5e-6)
    assert float(alpha[1]) == pytest.approx(0.05943, abs=5e-6)
    assert float(alpha[63]) == pytest.approx(0.01562, abs=5e-6)


def test_a_perfect_sink_has_importance_one() -> None:
    pattern = torch.zeros(64, 64)
    pattern[:, 0] = 1
    assert float(causal_columns(pattern).alpha[0, 0, 0]) == 1.0


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
def test_rows_that_put_s_on_the_first_token_give_s_plus_its_own_row(strength: float) -> None:
    pattern = strength * torch.zeros(64, 64)
    pattern[0, 0] = 1
    for i in range(1, 64):
        pattern[i, 0], pattern[i, i] = strength, 1 - strength
    expected = strength + (1 - strength) / 64
    assert float(causal_columns(pattern).alpha[0, 0, 0]) == pytest.approx(expected, abs=1e-6)


def test_self_attention_makes_false_sinks_in_alpha_and_none_in_beta() -> None:
    found = causal_columns(torch.eye(64))
    assert found.alpha[0, 0, 61:].tolist() == pytest.approx([1 / 3, 1 / 2, 1])
    defined = found.beta[0, 0][~found.beta[0, 0].isnan()]
    assert len(defined) == 17
    assert (defined == 0).all()


def test_beta_needs_32_far_queries_and_is_nan_one_short_of_them() -> None:
    found = causal_columns(uniform_causal(48))
    assert not found.beta[0, 0, 0].isnan(), "48 - 16 = 32 queries see token 0 from far"
    assert found.beta[0, 0, 1:].isnan().all()
    assert causal_columns(uniform_causal(47)).beta.isnan().all()


def test_uniform_share_is_beta_of_uniform_attention() -> None:
    mask = torch.ones(1, 70, dtype=torch.bool)
    torch.testing.assert_close(
        visibility(mask, causal=True, window=None).uniform[0],
        causal_columns(uniform_causal(70)).beta[0, 0],
        equal_nan=True,
    )


def test_attention_outside_the_allowed_keys_is_reported() -> None:
    pattern = torch.full((20, 20), 0.05)
    assert causal_columns(pattern).outside == pytest.approx(0.95)
    assert causal_columns(uniform_causal(20)).outside < 1e-6


def test_half_precision_patterns_are_summed_in_float32() -> None:
    pattern = uniform_causal(512).bfloat16()
    expected = pattern.double().sum(0) / torch.arange(512, 0, -1)
    torch.testing.assert_close(causal_columns(pattern).alpha[0, 0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_allowed_keys_follow_causality_window_and_padding(causal: bool, window: int | None) -> None:
    mask = torch.tensor([[False, True, True, True, True, False]])
    allowed = allowed_keys(mask, slice(0, 6), causal=causal, window=window)[0]
    for i in range(6):
        for k in range(6):
            real = 1 <= i <= 4 and 1 <= k <= 4
            near = window is None or abs(i - k) < window
            assert bool(allowed[i, k]) == (real and near and (k <= i or not causal)), (i, k)


def test_positions_count_from_the_first_unpadded_token() -> None:
    values = torch.arange(10.0).view(2, 5)
    mask = torch.tensor([[False, False, True, True, True], [True, True, False, False, False]])
    moved = by_position(values, mask)
    assert moved[0].tolist() == [2.0, 3.0, 4.0]
    assert moved[1, :2].tolist() == [5.0, 6.0]
    assert moved[1, 2].isnan()
