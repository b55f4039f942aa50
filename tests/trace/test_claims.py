"""The claims about secondary sinks on a model whose writers are planted, and their statistics against naive ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import build_pair, random_rows
from planted_writers import ERASES_X, LAYERS, LENGTH, SIZE, WRITES_X, X, planted_writers, texts
from scipy.stats import spearmanr
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.core.intervals import rank_correlation
from sinklens.residual.batched_edits import Row, check_writing, run_rows
from sinklens.residual.contributions import stream_parts
from sinklens.trace.claims import _clusters
from sinklens.trace.subspace import _carried, _Inputs, _judged, _Mlp
from sinklens.trace.verdicts import every, quantity

DOCUMENTS = 18


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return planted_writers()


@pytest.fixture(scope="module")
def trace(model: TransformerBridge) -> sl.trace.SinkTrace:
    """18 documents; a second X far behind the first in every other one."""
    ids = texts(DOCUMENTS)
    ids[::2, 50] = X
    return sl.trace_sinks(model, ids, replacements=("same_id",), doses=(0.0, 0.5, 2.0, 4.0), progress=False)


def test_groups_of_two_count_neither_in_the_correlation_nor_in_its_interval() -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(80, generator=draw).tolist()
    y = [a + 0.8 * b for a, b in zip(x, torch.randn(80, generator=draw).tolist(), strict=True)]
    groups, documents = [n // 4 for n in range(80)], [n % 20 for n in range(80)]
    alone = rank_correlation(x, y, groups, documents)
    pairs = [(d, 100 + d) for d in range(20) for _ in range(2)]  # each falls while the others rise
    more = rank_correlation(
        x + [0.0, 1.0] * 20, y + [1.0, 0.0] * 20, groups + [g for _, g in pairs], documents + [d for d, _ in pairs]
    )
    assert more == alone
    assert alone[1] < alone[0] < alone[2]


def test_rank_correlation_is_spearman_and_ignores_what_differs_between_groups() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=60)
    y = x + draw.normal(size=60)
    documents = [i // 3 for i in range(60)]
    whole, low, high = rank_correlation(x.tolist(), y.tolist(), [0] * 60, documents)
    reference: Any = spearmanr(x, y)
    assert whole == pytest.approx(float(reference[0]), abs=1e-12)
    assert low < whole < high
    groups = [i % 2 for i in range(60)]
    shifted = [v + 100 * g for v, g in zip(y.tolist(), groups, strict=True)]
    assert rank_correlation(x.tolist(), shifted, groups, documents) == rank_correlation(
        x.tolist(), y.tolist(), groups, documents
    )
    assert abs(rank_correlation(x.tolist(), shifted, [0] * 60, documents)[0] - whole) > 0.1
    assert math.isnan(rank_correlation(x.tolist(), y.tolist(), groups, [0] * 60)[1])
    assert math.isnan(rank_correlation([1.0] * 60, y.tolist(), groups, documents)[0])


def test_alignment_is_the_cosine_of_what_the_writer_adds(model: TransformerBridge, trace: sl.trace.SinkTrace) -> None:
    found = sl.trace.writer_alignment(trace)
    assert set(found.details.writer) == {f"mlp {WRITES_X}"}
    kept: list[torch.Tensor] = []
    keep: Any = (f"blocks.{WRITES_X}.hook_mlp_out", lambda t, hook: kept.append(t[0, 20].detach()))
    model.run_with_hooks(trace.tokens.ids[1:2], fwd_hooks=[keep])
    one = next(t for t in trace.traced if (t.sequence, t.position) == (1, 20))
    row = next(r for r in found.details.to_dict("records") if (r["sequence"], r["position"]) == (1, 20))
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(kept[0], one.direction, dim=0)), abs=1e-5)
    assert row["norm"] == pytest.approx(float(kept[0].norm()), rel=1e-5)
    assert row["cosine"] > 0.99
    assert found.holds is None  # X is always a sink here, so there is nothing to compare with
    assert found.number("difference")["n"] == 0


def test_tokens_of_the_same_id_that_are_no_sink_are_compared(model: TransformerBridge) -> None:
    """Y writes wherever it stands; the sink at the end of a text has no queries, so it is no sink there."""
    ids = texts(2)
    ids[1, 95] = X
    ids[1, 20] = 6
    trace = sl.trace_sinks(model, ids, causal=False, progress=False)
    one = next(t for t in trace.traced if t.token_id == X)
    at = one.components.index(("mlp", WRITES_X))
    assert one.same == 1
    assert float(one.same_cosines[at]) == pytest.approx(float(one.cosines[at]), abs=0.05)
    row = next(r for r in trace.to_dataframe().to_dict("records") if r["layer"] == WRITES_X and r["component"] == "mlp")
    assert {"cosine", "same_id_norm"} <= set(row)


def test_mean_shares_sum_to_one(trace: sl.trace.SinkTrace) -> None:
    table = trace.shares("secondary")
    assert table.component.tolist()[0] == f"mlp {WRITES_X}"
    assert table.share.sum() == pytest.approx(1, abs=1e-4)
    assert table.low.tolist()[0] - 1e-6 <= table.share.tolist()[0] <= table.high.tolist()[0] + 1e-6
    assert len(trace.shares("undetermined")) == 0


def test_doses_of_the_norm_move_mass_and_life(trace: sl.trace.SinkTrace) -> None:
    found = sl.trace.norm_and_mass(trace)
    assert all(name in set(found.numbers.quantity) for name in ("Spearman of norm and mass", "alpha at dose 0.5"))
    at = {dose: found.number(f"alpha at dose {dose}")["mean"] for dose in ("0", "0.5", "1", "2")}
    assert at["0"] < at["0.5"] < at["1"] < at["2"]
    rows = [r for r in trace.effects().to_dict("records") if r["at"] == "sink" and r["kind"] == "secondary"]
    zero = next(r for r in rows if r["replacement"] == "x 0" and r["layer"] == WRITES_X)
    assert zero["life"] == 0
    assert zero["d_life"] == -(ERASES_X - WRITES_X)
    assert zero["rho"] == pytest.approx(0.0, abs=0.05)
    assert trace.plot_doses().to_json()
    with pytest.raises(sl.BadInputError, match="no doses"):
        trace.part([]).plot_doses()


def test_lives_are_those_of_find_sinks(model: TransformerBridge, trace: sl.trace.SinkTrace) -> None:
    found = sl.find_sinks(model, trace.tokens)
    clean = {(s.sequence, s.position): s.lifetime for s in found}
    for row in trace.effects().to_dict("records"):
        if row["at"] == "sink" and row["replacement"] == "x 2":
            assert row["life"] - row["d_life"] == clean[row["sequence"], row["position"]]


def test_competition_is_told_from_real_weakening(model: TransformerBridge, trace: sl.trace.SinkTrace) -> None:
    """Here secondary sinks only compete: without them the primary gains attention, and its margin stays."""
    found = sl.trace.primary_weakening(trace)
    assert found.number("recovered_alpha")["low"] > 0.01
    assert abs(found.number("recovered_margin")["mean"]) < 1e-3
    assert found.number("dip_alpha")["high"] < 0
    assert found.number("secondary_alpha_without")["mean"] < 0.2 * found.number("secondary_alpha")["mean"]
    assert found.holds is False
    entry = trace.primaries[0]
    kept: list[torch.Tensor] = []
    layer = WRITES_X + 1
    names: Any = [(f"blocks.{layer}.attn.hook_pattern", lambda t, hook: kept.append(t[0].detach()))]
    model.run_with_hooks(trace.tokens.ids[:1], fwd_hooks=names)
    assert entry["alpha"][layer] == pytest.approx(float(kept[0][:, :, 0].mean()), abs=1e-5)
    assert entry["alive"] == [0] * (WRITES_X + 1) + [2] * (ERASES_X - WRITES_X) + [0] * (LAYERS - ERASES_X - 1)
    with pytest.raises(sl.BadInputError, match="no sequence has"):
        sl.trace.primary_weakening(trace.part([]))


def test_levels_join_neighbours_and_count_them(trace: sl.trace.SinkTrace) -> None:
    assert _clusters([(3, 7), (4, 8), (9, 2), (5, 9), (9, 4)]) == {
        (3, 7): 0,
        (4, 8): 0,
        (5, 9): 0,
        (9, 2): 1,
        (9, 4): 2,
    }
    found = sl.trace.sink_levels(trace)
    assert found.number("levels")["mean"] == 1
    assert found.number("covered")["mean"] == 1
    assert found.number("same level, same token")["mean"] == 1
    assert found.holds is True
    assert found.details.to_dict("records")[0]["lifetime"] == ERASES_X - WRITES_X
    assert sl.trace.sink_levels(trace.part([0, 1])).number("covered")["n"] == 3  # two in the first document
    with pytest.raises(sl.BadInputError, match="no levels"):
        sl.trace.sink_levels(trace, kind="undetermined")


def test_one_direction_of_the_input_carries_a_planted_writer(
    model: TransformerBridge, trace: sl.trace.SinkTrace
) -> None:
    """The planted MLP reads one direction: the sinks' inputs differ along it, and along another that it ignores."""
    owners = [one for one in trace.traced if one.kind == "secondary"]
    draw = torch.Generator().manual_seed(0)
    reads = model.blocks[WRITES_X].mlp.W_in.detach()[:, 5]
    ignored = torch.linalg.qr(torch.stack([reads, torch.randn(SIZE, generator=draw)], 1))[0][:, 1]
    reads = reads / reads.norm()

    def inputs(chosen: list[Any]) -> _Inputs:
        amounts = torch.rand(len(chosen), 2, generator=draw) + torch.tensor([6.0, 2.0])
        sinks = amounts[:, :1] * reads + amounts[:, 1:] * ignored
        return _Inputs(sinks, chosen, 0.01 * torch.randn(40, SIZE, generator=draw))

    first, test = inputs(owners[::2]), inputs(owners[1::2])
    verdict = _judged(_Mlp(model, WRITES_X), first, test, (1, 2, 4), 3, 0)
    assert 0.8 < verdict.number("carried by 1")["mean"] < 1.1  # the first component leans on the ignored direction
    assert verdict.number("carried by 2")["mean"] == pytest.approx(1, abs=0.01)
    assert verdict.number("carried by 2 random")["mean"] < 0.5
    row = verdict.details.to_dict("records")[0]
    assert max(row["sink_plus_cosine"], row["sink_minus_cosine"]) > 0.99
    assert verdict.details.sinks.sum() == pytest.approx(1, abs=1e-3)
    mlp, ours, u = _Mlp(model, WRITES_X), test.sinks[0], owners[1].direction
    centre = first.others.mean(0)
    axis = torch.linalg.svd(first.sinks - centre)[2][0]
    reduced = centre + ((ours - centre) @ axis) * axis
    base = mlp(centre[None])[0]
    naive = float((mlp(reduced[None])[0] - base) @ u / ((mlp(ours[None])[0] - base) @ u))
    assert _carried(mlp, test, centre, axis[None])[0] == pytest.approx(naive, rel=1e-4)


def test_the_subspace_needs_writers_enough_sinks_and_others(
    model: TransformerBridge, trace: sl.trace.SinkTrace
) -> None:
    with pytest.raises(sl.BadInputError, match="no MLP writes"):
        sl.trace.writer_subspace(model, trace.part([]))
    with pytest.raises(sl.BadInputError, match="are needed"):
        sl.trace.writer_subspace(model, trace.part([0, 1]))
    with pytest.raises(sl.BadInputError, match="every token of these ids is a sink"):
        sl.trace.writer_subspace(model, trace, progress=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "neox"])
def test_an_mlp_runs_by_itself_on_given_inputs(name: str) -> None:
    from sinklens.attention.run import collect

    _, model = build_pair(name)
    mlp = _Mlp(model, 1)
    seen = collect(model, torch.stack(random_rows((20,))), [mlp.point, mlp.out])
    assert (mlp(seen[mlp.point]) - seen[mlp.out]).abs().max() < 1e-5
    with pytest.raises(sl.UnsupportedModelError, match="by itself"):
        mlp.check(seen[mlp.point], seen[mlp.out] + 1)


def test_reading_heads_are_those_that_attend_and_no_others(model: TransformerBridge) -> None:
    ids = texts(4)
    scores = sl.sink_scores(model, ids)
    found = sl.find_sinks(model, ids)
    table = sl.heads.reading_heads(scores, found, permutations=199)
    assert set(table.layer) == set(range(WRITES_X + 1, ERASES_X + 1))
    assert table.reads.all()  # every planted head asks for the direction
    row = table.to_dict("records")[0]
    naive = [float(scores.beta[s.sequence, row["layer"], row["head"], s.position]) for s in found.secondary]
    assert row["beta"] == pytest.approx(sum(naive) / len(naive), abs=1e-6)
    assert row["p"] == pytest.approx(1 / 200)
    free = [p for p in range(LENGTH - 48) if p not in (0, 20)]
    null = torch.stack([scores.beta[b, row["layer"], row["head"], free] for b in range(4)]).mean()
    assert row["null"] == pytest.approx(float(null), rel=0.2)
    dull = sl.SinkScores(
        torch.rand_like(scores.alpha), torch.rand_like(scores.beta), scores.uniform, None, scores.tokens, scores.info
    )
    assert sl.heads.reading_heads(dull, found, permutations=199).reads.mean() < 0.2
    with pytest.raises(sl.BadInputError, match="same tokens"):
        sl.heads.reading_heads(sl.sink_scores(model, texts(2)), found)
    with pytest.raises(sl.BadInputError, match="no undetermined"):
        sl.heads.reading_heads(scores, found, kind="undetermined")
    with pytest.raises(sl.BadInputError, match="there is none to draw"):  # this token is always a sink
        sl.heads.reading_heads(scores, found, null="same_id")
    told = [s for s in found.secondary if s.sequence < 2]  # the rest is declared to be no sink
    some = replace(found, sinks=tuple(told), places=tuple((s.sequence, s.position) for s in told))
    same = sl.heads.reading_heads(scores, some, null="same_id", permutations=199).to_dict("records")
    others = [float(scores.beta[b, same[0]["layer"], same[0]["head"], 20]) for b in (2, 3)]
    assert same[0]["null"] == pytest.approx(sum(others) / 2, rel=0.2)
    assert max(row["null"] for row in same) > 10 * max(row["null"] for row in table.to_dict("records"))
    with pytest.raises(sl.BadInputError, match="one of any, same_id"):
        sl.heads.reading_heads(scores, found, null=cast(Any, "other"))


def test_the_circuit_names_neuron_writer_token_eraser_and_readers(
    model: TransformerBridge, trace: sl.trace.SinkTrace
) -> None:
    part = trace.part([0, 1])
    number = next(t.sink for t in part.traced if t.kind == "secondary")
    neurons = sl.trace.writer_neurons(model, part, top=(1,), n_random=1, progress=False)
    graph = part.circuit(number, neurons=neurons, scores=sl.sink_scores(model, trace.tokens))
    token = next(n for n, data in graph.nodes(data=True) if data["kind"] == "token")
    assert graph.edges[f"mlp {WRITES_X}", token]["weight"] == pytest.approx(1, abs=0.05)
    assert graph.edges[f"mlp {ERASES_X}", token]["role"] == "erases"
    assert graph.edges[f"mlp {WRITES_X} neuron 5", f"mlp {WRITES_X}"]["weight"] == pytest.approx(1, abs=0.05)
    feeders = {a: d["weight"] for a, _, d in graph.in_edges(f"mlp {WRITES_X} neuron 5", data=True)}
    assert max(feeders, key=lambda a: feeders[a]) == "embed"
    readers = [b for _, b, d in graph.out_edges(token, data=True) if d["role"] == "is read by"]
    assert len(readers) == 8
    assert part.plot_circuit(number, neurons=neurons).to_json()
    assert neurons.plot().to_json()
    assert neurons.upstream("secondary").component.tolist()[0] == "embed"
    assert len(neurons.upstream("undetermined")) == 0
    for wrong, match in ((lambda: part.circuit(99), "no sink 99"), (lambda: neurons.plot(99), "numbered")):
        with pytest.raises(sl.BadInputError, match=match):
            wrong()


def test_several_edits_of_one_run_and_shorter_runs() -> None:
    _, model = build_pair("qwen2")
    ids = torch.stack(random_rows((60,)))
    no_sink = torch.ones(60, dtype=torch.bool)
    noise = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    parts = [Row(("mlp", 0), (4,), noise[0]), Row(("attn", 1), (9,), noise[1])]
    both = Row(parts[0].component, (4,), noise[0], also=(parts[1],))
    seen = run_rows(model, ids, [Row(None), both, *parts], [4, 9], no_sink, state_layer=1)

    def naive(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        new = tensor.clone()
        at = 4 if "mlp" in hook.name else 9
        new.view(60, -1)[at] += noise[0 if at == 4 else 1, 0]
        return new

    kept: list[torch.Tensor] = []
    hooks: list[Any] = [("blocks.0.hook_mlp_out", naive), ("blocks.1.hook_attn_out", naive)]
    hooks.append(("blocks.1.hook_in", lambda t, hook: kept.append(t[0].detach())))
    hooks.append(("blocks.1.attn.hook_pattern", lambda t, hook: kept.append(t[0].detach())))
    model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.allclose(seen.states[1], kept[0][[4, 9]], atol=1e-5)
    assert float(seen.alpha[1, 0, 1]) == pytest.approx(float(kept[1][:, 4:, 4].mean()), abs=1e-6)
    short = run_rows(model, ids, [Row(None), both], [4, 9], no_sink, last=0)
    assert torch.equal(short.alpha[:, :, 0], seen.alpha[:2, :, 0])
    assert short.alpha[:, :, 1].isnan().all()


def test_traces_with_primaries_are_saved_and_parted(trace: sl.trace.SinkTrace, tmp_path: Path) -> None:
    again = sl.trace.SinkTrace.load(trace.save(tmp_path / "trace.safetensors"))
    assert again.primaries == trace.primaries
    assert repr(sl.trace.primary_weakening(again)) == repr(sl.trace.primary_weakening(trace))
    half = trace.part([0, 2, 4])
    assert {t.document for t in half.traced} == {0, 2, 4}
    assert len(half.primaries) == 3
    assert len(half.effects()) < len(trace.effects())


def test_verdicts_say_what_is_not_decided() -> None:
    assert every([True, None]) is None
    assert every([False, None]) is False
    row = quantity("x", [1.0, math.nan, 3.0], [0, 1, 2])
    assert (row["mean"], row["n"], row["documents"]) == (2.0, 2, 2)
    assert math.isnan(row["low"])
    verdict = sl.trace.Verdict("c", "s", None, pd.DataFrame([row]), pd.DataFrame(), "r")
    assert "not decided" in repr(verdict)
    assert verdict.to_dataframe().equals(verdict.numbers)


def test_an_untrained_model_has_no_writer() -> None:
    _, model = build_pair("llama")
    trace = sl.trace_sinks(model, torch.stack(random_rows((100, 100))), progress=False)
    assert len(trace.writers()) == 0


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "gemma3", "neox", "phi3", "falcon", "olmo2", "opt", "mixtral"]
)
def test_what_components_add_sums_to_the_stream_and_can_be_replaced(name: str) -> None:
    """Post-norms inside the block (Gemma, OLMo 2) and parallel blocks included; an edit arrives as it is."""
    _, model = build_pair(name)
    ids = torch.stack(random_rows((30,)))
    no_sink = torch.ones(30, dtype=torch.bool)
    parts = stream_parts(model, ids, [0, 7], no_sink)
    assert parts.summed
    assert torch.allclose(parts.added.sum(0), parts.states[-1], atol=1e-4)
    kept: list[torch.Tensor] = []
    hooks: Any = [(f"blocks.{model.cfg.n_layers - 1}.hook_out", lambda t, hook: kept.append(t.detach().view(30, -1)))]
    model.run_with_hooks(ids, fwd_hooks=hooks)
    assert torch.allclose(parts.states[-1], kept[0][[0, 7]], atol=1e-5)
    for component in (("mlp", 0), ("attn", 1)):
        check_writing(model, ids, component, 7)


def test_norms_on_the_stream_are_refused_in_words() -> None:
    _, model = build_pair("bert")
    with pytest.raises(sl.UnsupportedModelError, match="norm"):
        check_writing(model, torch.stack(random_rows((30,))), ("mlp", 0), 7)


def test_what_triggers_a_planted_neuron_is_its_tokens_embedding(
    model: TransformerBridge, trace: sl.trace.SinkTrace
) -> None:
    found = sl.trace.writer_neurons(model, trace.part([0]), top=(1,), n_random=1, progress=False)
    row = next(r for r in found.to_dataframe().to_dict("records") if r["kind"] == "secondary" and r["neuron"] == 5)
    assert row["in_cosine"] > 0.6
    assert row["in_cosine"] > 2 * max(
        abs(r["in_cosine"]) for r in found.to_dataframe().to_dict("records") if r["neuron"] not in (2, 5)
    )
    figure = trace.plot()
    assert [t.name for t in figure.data][0] == "mass"  # type: ignore[union-attr]
