"""The input subspace of a writing MLP, from the trace to the verdict, against loops over sinks and components."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted_writers import HELPS_X, LATE, WRITES_X, X, planted_writers, restless, texts
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.core.intervals import interval
from sinklens.trace.phases import Traced
from sinklens.trace.subspace import _halves, _Inputs, _judged, _Mlp, _mlp_shares

DOCUMENTS = 34
SIZES = (1, 2, 8)


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return planted_writers(change=restless)


@pytest.fixture(scope="module")
def trace(model: TransformerBridge) -> sl.trace.SinkTrace:
    """X is a sink early in every text, twice in some, and no sink late, where there are more than are looked at."""
    ids = texts(DOCUMENTS)
    ids[::3, 35] = X
    ids[:, LATE:] = 8
    ids[:, LATE] = X
    ids[0] = ids[1]
    ids[0, LATE : LATE + 18] = X
    return sl.trace_sinks(model, ids, causal=False, progress=False)


def kept(model: TransformerBridge, ids: Tensor, name: str) -> Tensor:
    found: list[Tensor] = []
    model.run_with_hooks(ids[None], fwd_hooks=[(name, lambda t, hook: found.append(t[0].detach()))])
    return found[0]


def written(model: TransformerBridge, x: Tensor) -> Tensor:
    """The planted MLP of one input, from its weights."""
    mlp: Any = model.blocks[WRITES_X].mlp
    return (x @ mlp.W_in.detach() + mlp.b_in.detach()).relu() @ mlp.W_out.detach() + mlp.b_out.detach()


def fitted(model: TransformerBridge, trace: sl.trace.SinkTrace, half: list[Traced]) -> tuple[Tensor, Tensor]:
    """The inputs at the sinks of some documents, and at the tokens of their id there that are no sink."""
    sinks, others = [], []
    for one in half:
        x = kept(model, trace.tokens.ids[one.sequence], f"blocks.{WRITES_X}.mlp.hook_in")
        sinks.append(x[one.position])
    for b in sorted({one.sequence for one in half}):
        x = kept(model, trace.tokens.ids[b], f"blocks.{WRITES_X}.mlp.hook_in")
        taken = {s.position for s in trace.sinks if s.sequence == b}
        same = [p for p, i in enumerate(trace.tokens.ids[b].tolist()) if i == X and p not in taken]
        others += [x[p] for p in same[:: 1 if len(same) <= 16 else 2]]
    return torch.stack(sinks), torch.stack(others)


def test_components_of_one_half_are_judged_on_the_other(model: TransformerBridge, trace: sl.trace.SinkTrace) -> None:
    verdict = sl.trace.writer_subspace(model, trace, sizes=SIZES, n_random=2, seed=3, progress=False)
    assert f"MLP {WRITES_X}" in verdict.statement  # the helper writes less
    owners = [one for one in trace.traced if one.kind == "secondary" and one.share(("mlp", WRITES_X)) >= 0.1]
    first, test = _halves(owners, 3)
    assert not {o.document for o in first} & {o.document for o in test}
    assert sorted(o.sink for o in [*first, *test]) == sorted(o.sink for o in owners)
    assert len({o.document for o in first}) == DOCUMENTS // 2
    sinks, others = fitted(model, trace, first)
    assert len(others) == DOCUMENTS // 2 + (8 if any(o.sequence == 0 for o in first) else 0)
    held, _ = fitted(model, trace, test)
    centre = others.mean(0)
    axes = torch.linalg.svd(sinks - centre, full_matrices=False)[2]
    base = written(model, centre)

    def carried(directions: Tensor) -> list[float]:
        values = []
        for x, one in zip(held, test, strict=True):
            inside = centre + sum((((x - centre) @ a) * a for a in directions), torch.zeros_like(x))
            part, full = ((written(model, y) - base) @ one.direction for y in (inside, x))
            values.append(float(part / full))
        return values

    draw = torch.Generator().manual_seed(3)
    documents = [one.document for one in test]
    means = {}
    for k in SIZES:
        noise = [torch.linalg.qr(torch.randn(axes.shape[1], k, generator=draw))[0].T for _ in range(2)]
        drawn = [carried(q) for q in noise]
        random = [sum(pair) / 2 for pair in zip(*drawn, strict=True)]
        for name, values in ((f"carried by {k}", carried(axes[:k])), (f"carried by {k} random", random)):
            row = verdict.number(name)
            means[name] = sum(values) / len(values)
            assert row["mean"] == pytest.approx(means[name], abs=1e-3)
            span = interval(torch.tensor(values, dtype=torch.float64), documents)
            assert span is not None
            assert (row["low"], row["high"]) == pytest.approx(span, abs=1e-3)
            assert (row["n"], row["documents"]) == (len(test), len(set(documents)))
    enough = [k for k in SIZES if means[f"carried by {k}"] >= 0.9]
    assert verdict.number("components for 90 %")["mean"] == enough[0]
    details = verdict.details.to_dict("records")
    u = torch.stack([one.direction for one in first]).mean(0)
    spread, elsewhere = (sinks - centre).square().sum(), (others - centre).square().sum()
    for row, axis in zip(details, axes, strict=False):
        length = float(sum(abs((x - centre) @ axis) for x in sinks) / len(sinks))
        assert row["length"] == pytest.approx(length, rel=1e-3, abs=1e-4)
        assert row["sinks"] == pytest.approx(float(((sinks - centre) @ axis).square().sum() / spread), abs=1e-4)
        assert row["same_id"] == pytest.approx(float(((others - centre) @ axis).square().sum() / elsewhere), abs=1e-4)
        for name, size in (("unit", 1.0), ("sink", length)):
            for sign, word in ((1, "plus"), (-1, "minus")):
                out = written(model, sign * size * axis)
                assert row[f"{name}_{word}_norm"] == pytest.approx(float(out.norm()), rel=1e-2, abs=1e-3)
                cosine = torch.cosine_similarity(out, u, dim=0)
                assert row[f"{name}_{word}_cosine"] == pytest.approx(float(cosine), abs=1e-3)
        if row["length"] < 1e-2:  # what is left is rounding, and its sign is anyone's
            break


class Reads(_Mlp):
    """Stands for an MLP that writes a number, read off its input, along the first axis."""

    def __init__(self, number: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.number = 3, number

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, 0] = self.number(x)
        return out


def judged(trace: sl.trace.SinkTrace, number: Callable[[Tensor], Tensor], n: int = 17) -> sl.trace.Verdict:
    """Inputs of either sign along six axes, and small and alike along axis 0; half of the texts each."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0] + [0.0] * 33)
    direction = torch.zeros(40)
    direction[0] = 1.0
    owners = {t.document: replace(t, direction=direction) for t in trace.traced if t.kind == "secondary"}

    def inputs(chosen: list[Traced]) -> _Inputs:
        sinks = scale * torch.randn(len(chosen), 40, generator=draw).sign()
        sinks[:, 0] = sinks[:, 0].abs()
        return _Inputs(sinks + 0.01 * torch.randn(sinks.shape, generator=draw), chosen, torch.zeros(4, 40))

    listed = list(owners.values())
    return _judged(Reads(number), inputs(listed[:n]), inputs(listed[n:]), (6, 7), 2, 0)


def test_the_subspace_holds_where_at_most_six_components_carry_nine_tenths(trace: sl.trace.SinkTrace) -> None:
    """Not where the seventh is needed, not where as many random directions do as well, not without intervals."""
    assert judged(trace, lambda x: x[:, 1].abs()).holds is True
    seventh = judged(trace, lambda x: x[:, 1].abs() + 8 * x[:, 0])
    assert seventh.holds is False
    assert seventh.number("components for 90 %")["mean"] == 7
    assert seventh.number("carried by 6")["low"] > seventh.number("carried by 6 random")["high"]
    assert judged(trace, lambda x: (x.norm(dim=1) > 0.1).float()).holds is False
    assert judged(trace, lambda x: x[:, 1].abs(), n=22).holds is None


def test_the_layer_is_the_one_with_the_largest_share_and_lesser_sinks_are_left_out(
    model: TransformerBridge, trace: sl.trace.SinkTrace
) -> None:
    shares = _mlp_shares(trace, "secondary")
    assert {one.kind for found in shares.values() for one in found} == {"secondary"}
    assert set(shares) <= set(range(10))
    for layer, found in shares.items():
        for one, share in found.items():
            assert share == one.share(("mlp", layer))
    one = next(t for t in trace.traced if t.kind == "secondary")
    mine = [t for t in trace.traced if t.kind == "secondary"]
    weak = [replace(t, contributions=0.05 * t.contributions) for t in mine[: len(mine) - 8]]
    few = replace(trace, traced=(*weak, *mine[len(mine) - 8 :]))
    with pytest.raises(sl.BadInputError, match="are needed"):
        sl.trace.writer_subspace(model, few, layer=WRITES_X)
    assert one.share(("mlp", HELPS_X)) < one.share(("mlp", WRITES_X))


def test_eight_sinks_are_enough_to_fit_on(model: TransformerBridge, trace: sl.trace.SinkTrace) -> None:
    single = {t.document: t for t in trace.traced if t.kind == "secondary"}
    some = replace(trace, traced=tuple(single[d] for d in sorted(single)[:16]))
    verdict = sl.trace.writer_subspace(model, some, layer=WRITES_X, sizes=(1,), n_random=1, progress=False)
    assert verdict.number("carried by 1")["n"] == 8
    assert math.isnan(verdict.number("carried by 1")["low"])
    assert verdict.holds is None
    for sizes in ((), (8, 12), (0, 1)):
        with pytest.raises(sl.BadInputError, match="sizes must begin"):
            sl.trace.writer_subspace(model, some, sizes=sizes)
    fewer = replace(some, traced=some.traced[:14])
    with pytest.raises(sl.BadInputError, match="of 7 secondary sinks"):
        sl.trace.writer_subspace(model, fewer, layer=WRITES_X)
