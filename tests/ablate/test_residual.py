"""Edits of the residual stream at sinks, against what they say they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from batches import left, planted_map
from editing import greedy
from torch import Tensor

import sinklens as sl
from sinklens.forward.states import typical_mean


def stream(model: Any, ids: Tensor, layer: int, hooks: Any = (), mask: Tensor | None = None) -> Tensor:
    """resid_pre of a layer after the given hooks."""
    found: list[Tensor] = []
    reading = (f"blocks.{layer}.hook_in", lambda t, hook: found.append(t.detach().clone()))
    model.run_with_hooks(ids, attention_mask=mask, fwd_hooks=[*hooks, reading], return_type=None)
    return found[0]


@pytest.fixture
def massive() -> Any:
    """A tiny Llama in which token 90 has one dimension of 500 in its embedding."""
    _, model = build_pair("llama")
    with torch.no_grad():
        hf: Any = model.original_model
        hf.get_input_embeddings().weight[90, 7] = 500.0
    return model


def rows_with_90() -> list[Tensor]:
    rows = random_rows((12, 13, 14))
    for n, row in enumerate(rows):
        row[row == 90] = 3
        row[2 + n] = 90
        row[0] = 10 + n
    return rows


def sinks_at_90(model: Any) -> sl.SinkMap:
    places = {(n, 2 + n): ("secondary", range(1)) for n in range(3)}
    return planted_map(model, rows_with_90(), places)


def test_massive_dimensions_are_set_to_zero_and_nothing_else(massive: Any) -> None:
    ids = rows_with_90()[0][None]
    plain = stream(massive, ids, 0)
    edited = stream(massive, ids, 0, sl.ablate_residual(massive, sinks_at_90(massive), "massive_zero"))
    assert plain[0, 2, 7] == 500
    assert edited[0, 2, 7] == 0
    edited[0, 2, 7] = 500
    assert torch.equal(plain, edited)


def test_massive_dimensions_are_set_to_their_mean_elsewhere(massive: Any) -> None:
    rows = rows_with_90()
    hooks = sl.ablate_residual(massive, [2], "massive_mean", layers=0, reference=torch.stack([r[:12] for r in rows]))
    edited = stream(massive, rows[0][None], 0, hooks)
    elsewhere = [float(stream(massive, row[None, :12], 0)[0, 2, 7]) for row in rows]
    assert abs(float(edited[0, 2, 7]) - sum(elsewhere) / 3) < 1e-3
    with pytest.raises(sl.BadInputError, match="change nothing"):  # the same embedding everywhere: an identity
        stream(massive, rows[0][None], 0, sl.ablate_residual(massive, sinks_at_90(massive), "massive_mean"))
    allowed = sl.ablate_residual(massive, sinks_at_90(massive), "massive_mean", allow_identity=True)
    assert torch.equal(massive.run_with_hooks(rows[0][None], fwd_hooks=allowed), massive(rows[0][None]))


def test_the_sink_direction_is_projected_out() -> None:
    _, model = build_pair("llama")
    rows = random_rows((12, 13, 14))
    sinks = planted_map(model, rows, {(b, 3): ("primary", range(2)) for b in range(3)})
    states = [stream(model, row[None], 1)[0] for row in rows]
    mu = torch.stack([typical_mean(x, 3.0)[0] for x in states[1:]]).mean(0)
    u = torch.nn.functional.normalize(torch.stack([x[3] for x in states[1:]]).mean(0) - mu, dim=0)
    edited = stream(model, rows[0][None], 1, sl.ablate_residual(model, sinks, "project", layers=1))[0]
    assert abs(float((edited[3] - mu) @ u)) < 1e-5
    assert abs(float((states[0][3] - mu) @ u)) > 1e-2
    kept = edited[3] - states[0][3]
    assert (kept - (kept @ u) * u).abs().max() < 1e-5
    assert torch.equal(edited[[0, 1, 2, 4]], states[0][[0, 1, 2, 4]])


def test_the_norm_is_rescaled() -> None:
    _, model = build_pair("opt")  # delegated attention: the stream can be edited all the same
    rows = random_rows((12, 13))
    ids = rows[0][None]
    plain = stream(model, ids, 1)[0]
    half = stream(model, ids, 1, sl.ablate_residual(model, [4], "rescale", g=0.5, layers=1))[0]
    assert (half[4] - plain[4] / 2).abs().max() < 1e-6
    assert torch.equal(
        model.run_with_hooks(ids, fwd_hooks=sl.ablate_residual(model, [4], "rescale", g=1.0)), model(ids)
    )
    typical = sl.ablate_residual(model, [4], "rescale", layers=1, reference=rows[1][None])
    median = stream(model, rows[1][None], 1)[0].norm(dim=-1).median()
    assert abs(float(stream(model, ids, 1, typical)[0, 4].norm() - median)) < 1e-4


def test_padding_and_generation_agree() -> None:
    _, model = build_pair("llama")
    rows = random_rows((9, 13))
    sinks = planted_map(model, rows, {(0, 1): ("primary", range(2)), (1, 2): ("primary", range(2))})
    hooks = sl.ablate_residual(model, sinks, "rescale", g=0.3)
    padded = left(sinks.tokens)
    got = model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
    for i, row in enumerate(rows):
        alone = model.run_with_hooks(row[None], fwd_hooks=hooks)[0]
        assert (got[i, -len(row) :] - alone).abs().max() < 1e-4
    by_position = sl.ablate_residual(model, [1], "rescale", g=0.3)
    with pytest.raises(sl.BadInputError, match="padded on the left"):
        model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=by_position)
    found = []
    for cached in (True, False):
        with model.hooks(fwd_hooks=hooks):
            found.append(greedy(model, rows[0][None], cached))
    assert torch.equal(*found)


def test_bad_residual_edits_say_what_to_do(massive: Any) -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ([0], "erase", {}, "mode must be"),
        ([0], "project", {"g": 0.5}, "belongs to mode"),
        ([0], "rescale", {"g": -1.0}, "belongs to mode"),
        (["learned"], "rescale", {"g": 0.5}, "have none"),
    ]
    for sinks, mode, options, message in cases:
        with pytest.raises(sl.BadInputError, match=message):
            sl.ablate_residual(massive, sinks, mode, **options)
    with pytest.raises(sl.BadInputError, match="no dimension"):
        massive.run_with_hooks(
            rows_with_90()[0][None], fwd_hooks=sl.ablate_residual(massive, [5], "massive_zero", layers=0)
        )
