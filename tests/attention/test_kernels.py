"""The blocked pass, the fused kernel and the compressed sequence against a dense loop-free reference in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from sinklens.attention.importance import FAR, ColumnSums, visibility
from sinklens.attention.kernels import View, blocked, dense_output, dense_scores, fused, fused_takes, without


def dense(q: Tensor, k: Tensor, v: Tensor, view: View, hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse over the keys and pattern, by the formula."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    k, v = (t.repeat_interleave(heads // k.shape[1], 1).double() for t in (k, v))
    s = q.double() @ k.mT * view.scale
    if view.softcap:
        s = view.softcap * (s / view.softcap).tanh()
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if view.causal:
        seen &= j <= i
    if view.window is not None:
        seen &= (i - j < view.window) & (j - i < view.window)
    if view.mask is not None:
        seen &= view.mask[:, None, None] & view.mask[:, None, keys - queries :, None]
    if hidden is not None:
        seen &= ~hidden[:, :, None]
    s = s.masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    full = lse if view.learned is None else torch.logaddexp(lse, view.learned.double()[:, None].expand_as(lse))
    pattern = (s - full[..., None]).exp().nan_to_num(0)
    return pattern @ v, lse, pattern


def random_layer(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = (2, 6, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    return tuple((torch.randn(s, generator=generator) * 2).to(dtype) for s in shapes)  # type: ignore[return-value]


def hidden_kinds(keys: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 1), (2, 1), (1, 6), (2, 6))
    return [None, *(torch.rand(*shape, keys, generator=generator) < 0.1 for shape in shapes)]


SETTINGS = [
    pytest.param(causal, window, softcap, learned, padded, id=f"{causal}-{window}-{softcap}-{learned}-{padded}")
    for causal, window, softcap, learned, padded in itertools.product(
        (True, False), (None, 20, 500), (None, 2.0), (False, True), (False, True)
    )
]


@pytest.mark.parametrize(("causal", "window", "softcap", "learned", "padded"), SETTINGS)
def test_every_path_equals_the_formula(
    causal: bool, window: int | None, softcap: float | None, learned: bool, padded: bool
) -> None:
    for queries in (150, 3, 1) if causal else (150,):
        q, k, v = random_layer(queries, 150)
        mask = torch.ones(2, 150, dtype=torch.bool)
        mask[1, :30] = False
        logit = torch.linspace(-2, 2, 6) if learned else None
        view = View(0.4, causal, window, softcap, logit, mask if padded else None)
        for hidden in hidden_kinds(150):
            for rows in (64, 100):
                out, lse = blocked(q, k, v, view, hidden=hidden, want_lse=True, rows=rows)
                want, want_lse, _ = dense(q, k, v, view, hidden)
                torch.testing.assert_close(out.double(), want, atol=3e-5, rtol=0)
                assert lse is not None
                torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
            plain = dataclasses.replace(view, learned=None)
            if hidden is not None:
                out, lse, path = without(q, k, v, plain, hidden)
                want, want_lse, _ = dense(q, k, v, plain, hidden)
                torch.testing.assert_close(out.double(), want, atol=3e-5, rtol=0)
                torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
                shared = hidden.shape[:2] == (1, 1) and fused_takes(q, k, v, plain) and queries == 150
                assert (path == "compressed") == shared
            elif fused_takes(q, k, v, view):
                out, lse = fused(q, k, v, view)
                want, want_lse, _ = dense(q, k, v, view)
                torch.testing.assert_close(out.double(), want, atol=3e-5, rtol=0)
                torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 20])
def test_column_sums_equal_sums_of_the_pattern(causal: bool, window: int | None) -> None:
    q, k, v = random_layer(150, 150)
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1, :30] = False
    view = View(0.4, causal, window, mask=mask)
    sums = ColumnSums((4, 3, 150), q.device)
    blocked(q, k, v, view, visit=sums.add)
    alpha, beta = sums.means(visibility(mask, causal=causal, window=window))
    pattern = dense(q, k, v, view)[2]
    i, j = torch.arange(150)[:, None], torch.arange(150)
    seen = (j <= i) if causal else torch.ones(150, 150, dtype=torch.bool)
    if window is not None:
        seen = seen & ((i - j).abs() < window)
    for b in range(2):
        both = seen & mask[b] & mask[b][:, None]
        far = both & ((i - j).abs() >= FAR)
        want = (pattern[b] * both).sum(1) / both.sum(0).clamp(min=1)
        torch.testing.assert_close(alpha[b].double(), want, atol=1e-6, rtol=0)
        want = (pattern[b] * far).sum(1) / far.sum(0)
        want[:, far.sum(0) < 32] = torch.nan
        torch.testing.assert_close(beta[b].double(), want, atol=1e-6, rtol=0, equal_nan=True)
        assert want.isfinite().any() == (window is None)


@pytest.mark.parametrize("sigma", [0.87, 0.99987, 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_sink_leaves_is_accurate_however_little_it_is(sigma: float, dtype: torch.dtype) -> None:
    """1 - sigma as sigmoid(lse_R - lse_S), and o_R from a call of its own, at a mass of up to 0.999999."""
    q, k, v = random_layer(256, 256, dtype)
    view = View(8**-0.5, True)
    gone = torch.zeros(1, 1, 256, dtype=torch.bool)
    gone[..., 0] = True
    wanted = torch.logit(torch.tensor(sigma).double())
    raw = dense_scores(q, k, view)[..., 0].double()
    want_rest, lse_rest, _ = dense(q, k, v, view, gone.expand(2, 1, -1))
    shift = (wanted - (raw - lse_rest)[:, :, 1:]).median()  # a sink whose median mass is sigma
    o_rest, lse, _ = without(q, k, v, view, gone)
    left = (lse.double() - raw - shift).sigmoid()[:, :, 1:]
    truth = (lse_rest - raw - shift).sigmoid()[:, :, 1:]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-4
    assert (1 - truth).median() == pytest.approx(sigma, abs=(1 - sigma) * 0.2)
    assert ((left - truth).abs() / truth).max() < tolerance
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (o_rest.double() - want_rest)[:, :, 1:].abs().max() < bound * want_rest.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    q, k, v = random_layer(150, 150, dtype)
    view = View(0.4, True)
    sums = ColumnSums((4, 3, 150), q.device)
    out, _ = blocked(q, k, v, view, visit=sums.add)
    assert out.dtype == dtype
    pattern = dense(q, k, v, view)[2]
    torch.testing.assert_close(sums.near_and_far.view(2, 6, 150).double(), pattern.sum(2), atol=1e-4, rtol=1e-5)


def test_few_columns_need_no_copies_of_kv_heads() -> None:
    q, k, v = random_layer(20, 20)
    view = View(0.4, True, softcap=3.0)
    repeated = [t.repeat_interleave(3, 1) for t in (k, v)]
    scores = 3 * (q @ repeated[0].mT * 0.4 / 3).tanh()
    torch.testing.assert_close(dense_scores(q, k, view), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_output(scores, v), scores @ repeated[1], atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_kernel_equals_the_formula() -> None:
    q, k, v = (t.cuda() for t in random_layer(150, 150))
    view = View(0.4, True)
    out, lse = fused(q, k, v, view)
    want, want_lse, _ = dense(q.cpu(), k.cpu(), v.cpu(), view)
    torch.testing.assert_close(out.cpu().double(), want, atol=3e-5, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-4, rtol=1e-5)
