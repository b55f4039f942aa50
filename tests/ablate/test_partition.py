"""The algebra of the partition against loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from naive_edits import naive_row
from torch import Tensor

from sinklens.ablate.partition import MODES, Partition, edited_pattern, pair

KEYS = 9
ALL: list[tuple[str, dict[str, Any]]] = [(m, {}) for m in MODES if m not in ("scale", "move", "mean_value")]
ALL += [("scale", {"g": g}) for g in (0.0, 0.2, 1.0, 3.0)] + [("move", {"target": 4})]
ALL += [("fixed_key", {"value": "neutral"}), ("fixed_logit", {"value": "neutral"})]


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, allowed keys (causal), values, b_V of one batch of two heads."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 2, KEYS, KEYS, generator=generator, dtype=torch.float64) * 3
    allowed = torch.ones(1, 1, KEYS, KEYS, dtype=torch.bool).tril()
    values = torch.randn(1, 2, KEYS, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return scores.masked_fill(~allowed, torch.finfo(torch.float64).min), allowed, values, bias


def kernel(scores: Tensor, allowed: Tensor, learned: Tensor | None) -> Tensor:
    masked = scores.masked_fill(~allowed, -math.inf)
    if learned is not None:
        masked = torch.cat([masked, learned[:, None, None].expand(*masked.shape[:-1], 1)], -1)
    return masked.softmax(-1)[..., :KEYS]


@pytest.mark.parametrize(
    ("learned_in", "others"),
    [(None, ()), (None, (1, 3)), ("R", ()), ("S", ()), ("S", (1, 3)), ("F", (1, 3))],  # F exists with other sinks only
)
@pytest.mark.parametrize(("mode", "options"), ALL, ids=[f"{m}-{o}" for m, o in ALL])
def test_pair_rendered_on_the_pattern_equals_the_loop(
    mode: str, options: dict[str, Any], others: tuple[int, ...], learned_in: str | None
) -> None:
    scores, allowed, values, bias = problem()
    learned = None if learned_in is None else torch.tensor([0.7, -1.2], dtype=torch.float64)
    pattern = kernel(scores, allowed, learned)
    at = torch.zeros(1, 1, KEYS, KEYS, dtype=torch.bool)
    at[..., [0, 2]] = True
    kept = torch.zeros_like(at)
    kept[..., list(others)] = True
    sinks = at & allowed
    apart = kept & allowed
    part = Partition(scores, pattern, sinks, allowed & ~sinks & ~apart, learned, learned_in or "R", apart=bool(others))
    margin = torch.full((1, 2, KEYS), 0.4, dtype=torch.float64)
    weights = pair(mode, part, margin=margin, g=options.get("g"), value=options.get("value", "kept"))
    target = None
    rows = part.editable.expand(1, 2, KEYS)
    if mode == "move":
        target = (torch.arange(KEYS) == options["target"])[None, None] & allowed[:, 0]
        rows = rows & target.any(-1)[:, None]
    if mode == "uniform":
        rows = rows & part.rest.any(-1)
    new = edited_pattern(part, weights, rows, target=target)
    z = new @ values
    if weights.bias is not None:
        z = z + torch.where(rows, weights.bias, 0)[..., None] * bias[:, None]
    for h in range(2):
        for i in range(KEYS):
            want = naive_row(
                scores[0, h, i],
                values[0, h],
                list(range(i + 1)),
                {0, 2},
                mode,
                others=frozenset(others),
                learned=None if learned is None else float(learned[h]),
                learned_is_sink=learned_in == "S",
                b_v=bias[h],
                margin=0.4,
                **options,
            )
            assert (z[0, h, i] - want).abs().max() < 1e-9, (h, i)


def test_the_rest_stays_exact_where_the_sink_has_nearly_everything() -> None:
    """sigma = 1 - 1e-9: o_R by subtraction would be noise in float32."""
    scores, allowed, values, _ = problem(1)
    scores[..., 0] += 30
    at = torch.zeros(1, 1, KEYS, KEYS, dtype=torch.bool)
    at[..., 0] = True
    found = []
    for dtype in (torch.float64, torch.float32):
        s = scores.to(dtype)
        part = Partition(s, kernel(s, allowed, None), at & allowed, allowed & ~at)
        new = edited_pattern(part, pair("renormalize", part), part.editable)
        found.append((new @ values.to(dtype)).double())
        assert part.margin[..., 1:].median() > 20  # 1 - sigma below 2e-9
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert new[..., 1:, 0].abs().max() == 0


def test_identities_between_modes() -> None:
    scores, allowed, values, _ = problem(2)
    at = torch.zeros(1, 1, KEYS, KEYS, dtype=torch.bool)
    at[..., [0, 3]] = True
    part = Partition(scores, kernel(scores, allowed, None), at & allowed, allowed & ~at)

    def z(mode: str, **options: Any) -> Tensor:
        return edited_pattern(part, pair(mode, part, **options), part.editable) @ values

    base = part.pattern @ values
    rows = part.editable.expand(1, 2, KEYS)
    renormalize, zero, value_only = z("renormalize"), z("zero"), z("value_only")
    assert (
        torch.equal(z("scale", g=0.0)[rows], renormalize[rows]) or (z("scale", g=0.0) - renormalize).abs().max() < 1e-12
    )
    assert (z("scale", g=1.0) - base).abs().max() < 1e-12
    # o(1,1) + o(0,0) = o(1,0) + o(0,1): the 2x2 is additive in z, so the interaction is the network's.
    assert (base + renormalize - zero - value_only)[rows].abs().max() < 1e-12
    assert (z("fixed_logit", margin=part.margin) - base)[rows].abs().max() < 1e-12
    assert (z("scale", g=1e12) @ torch.ones(4, 1, dtype=torch.float64)).isfinite().all()


def test_rows_without_rest_or_without_sinks_are_the_kernels_own() -> None:
    scores, allowed, _, _ = problem(3)
    at = torch.zeros(1, 1, KEYS, KEYS, dtype=torch.bool)
    at[..., [0, 1]] = True
    part = Partition(scores, kernel(scores, allowed, None), at & allowed, allowed & ~at)
    assert part.editable[0, 0].tolist() == [False, False] + [True] * (KEYS - 2)
    for mode in ("renormalize", "zero", "null", "uniform", "value_only"):
        new = edited_pattern(part, pair(mode, part), part.editable)
        assert torch.equal(new[:, :, :2], part.pattern[:, :, :2])
        assert new.isfinite().all()
