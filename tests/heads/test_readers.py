"""Reading heads against a null that is known exactly, and the circuit of a trace that is written down by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from made_traces import sink, trace_of, traced

import sinklens as sl
from sinklens.trace.circuit import layout
from sinklens.trace.neurons import Neurons
from sinklens.trace.phases import Phase

LAYERS, HEADS = 5, 4
A, B, OTHER = 7, 8, 9


def batch() -> sl.Tokens:
    """In every text a primary, two places for sinks, one token that is never one, and a last without far queries."""
    ids = torch.tensor([[3, A, B, OTHER, A], [3, A, B, A, B], [3, A, OTHER, B, A]])
    whole = torch.ones(3, 5, dtype=torch.bool)
    return sl.Tokens(ids, whole, (tuple("pabcd"),) * 3, ("x", "y", "z"), (0, 1, 2), ~whole)


def scored(tokens: sl.Tokens) -> sl.SinkScores:
    beta = torch.rand(3, LAYERS, HEADS, 5, generator=torch.Generator().manual_seed(0))
    beta[..., 4] = math.nan
    return sl.SinkScores(torch.rand(3, LAYERS, HEADS, 5), beta, torch.zeros(3, LAYERS, 5), None, tokens, {})


def mapped(tokens: sl.Tokens) -> sl.SinkMap:
    """Two lives of (0, 1), a sink in text 2, and one of another kind in text 1; all others but column 3 are taken."""
    sinks = (
        sink(0, 1, 2, position=1, token_id=A, episodes=((1, 2, 0.2), (4, 4, 0.2))),
        sink(1, 0, 5, position=2, token_id=B, kind="undetermined", episodes=((0, 4, 0.2),)),
        sink(2, 2, 2, position=1, token_id=A, episodes=((2, 3, 0.2),)),
    )
    places = tuple((b, p) for b in range(3) for p in (0, 1, 2))
    nothing = torch.zeros(3, LAYERS, 5)
    return sl.SinkMap(sinks, (0,) * 3, (), nothing, nothing, tokens, sl.find.Thresholds(), "attention", places=places)


ALIVE = {1: [(0, 1)], 2: [(0, 1), (2, 1)], 3: [(2, 1)], 4: [(0, 1)]}


@pytest.mark.parametrize("null", ["any", "same_id"])
def test_reading_heads_are_compared_with_the_one_token_that_can_be_drawn(null: Any) -> None:
    """Any other token of the text: column 3. The same id: (1, 3) alone, since the last column has no far queries."""
    tokens = batch()
    scores, sinks = scored(tokens), mapped(tokens)
    table = sl.heads.reading_heads(scores, sinks, null=null, permutations=19, level=0.6)
    rows = {(r["layer"], r["head"]): r for r in table.to_dict("records")}
    assert set(rows) == {(layer, head) for layer in ALIVE for head in range(HEADS)}
    for (layer, head), row in rows.items():
        own = [float(scores.beta[b, layer, head, p]) for b, p in ALIVE[layer]]
        drawn = [float(scores.beta[b if null == "any" else 1, layer, head, 3]) for b, _ in ALIVE[layer]]
        assert row["sinks"] == len(own)
        assert row["beta"] == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert row["null"] == pytest.approx(sum(drawn) / len(drawn), abs=1e-6)
        assert row["p"] == pytest.approx(1.0 if sum(drawn) >= sum(own) else 1 / 20)
    assert 0 < (table.p < 1).mean() < 1
    share = (table.p < 1).mean()  # Benjamini and Hochberg: the smallest p, over its share of all
    assert table.q.tolist() == pytest.approx([min(p / share, 1.0) if p < 1 else 1.0 for p in table.p])
    assert table.reads.tolist() == ((table.p < 1) & (0.05 / share <= 0.6)).tolist()
    for level, reads in ((0.99 * 0.05 / share, 0), (1.01 * 0.05 / share, share)):
        found = sl.heads.reading_heads(scores, sinks, null=null, permutations=19, level=level)
        assert found.reads.mean() == pytest.approx(reads)


def test_equal_importance_does_not_count_as_reading() -> None:
    tokens = batch()
    scores = replace(scored(tokens), beta=torch.full((3, LAYERS, HEADS, 5), 0.25))
    table = sl.heads.reading_heads(scores, mapped(tokens), permutations=19, level=0.5)
    assert set(table.p) == {1.0}
    assert not table.reads.any()


def test_the_smallest_p_at_the_level_reads() -> None:
    tokens = batch()
    scores = scored(tokens)
    scores.beta[..., 1], scores.beta[..., 3] = 0.9, 0.1
    table = sl.heads.reading_heads(scores, mapped(tokens), permutations=19, level=0.05)
    assert table.p.tolist() == pytest.approx([1 / 20] * len(table))
    assert table.reads.all()


def test_layers_without_a_far_importance_say_nothing() -> None:
    """A window shorter than the far queries in layer 3, and a sink whose own importance is not known in layer 2."""
    tokens = batch()
    scores = scored(tokens)
    whole = sl.heads.reading_heads(scores, mapped(tokens), permutations=19)
    scores.beta[:, 3] = math.nan
    scores.beta[2, 2, :, 1] = math.nan
    table = sl.heads.reading_heads(scores, mapped(tokens), permutations=19)
    assert set(table.layer) == {1, 2, 4}
    assert set(table[table.layer == 2].sinks) == {1}
    assert table[table.layer == 2].beta.tolist() == pytest.approx(scores.beta[0, 2, :, 1].tolist())
    assert table[table.layer == 4].p.tolist() == whole[whole.layer == 4].p.tolist()
    scores.beta[:, 0] = math.nan  # that the first layer has such a window says nothing about the others
    again = sl.heads.reading_heads(scores, mapped(tokens), permutations=19)
    assert again.p.tolist() == table.p.tolist()
    scores.beta[:] = math.nan
    with pytest.raises(sl.BadInputError, match="far importance"):
        sl.heads.reading_heads(scores, mapped(tokens))


NAMES = ("sequence", "position", "phase", "writer")


def circuit_of() -> tuple[sl.trace.SinkTrace, Neurons, sl.SinkScores]:
    """A sink in text 1 with two phases, each with a writer and an eraser of its own, and one in text 0."""
    tokens = batch()
    place: dict[str, Any] = {"position": 2, "sink": 1}
    first = traced(1, {("mlp", 0): 0.9, ("attn", 1): -0.2}, phase=Phase(1, 1, 1), **place)
    second = traced(1, {("mlp", 2): 0.7, ("mlp", 4): -0.3}, phase=Phase(3, 4, 3), number=1, **place)
    first = replace(first, before=torch.tensor([layer < 1 for _, layer in first.components]))
    second = replace(second, before=torch.tensor([layer < 3 for _, layer in second.components]))
    other = traced(0, {("mlp", 0): 1.0})
    trace = trace_of(
        [other, first, second], tokens=tokens, sinks=(sink(0, 1, 4), sink(1, 1, 4, heads=((1, 3), (2, 0))))
    )
    listed, feeds = [], []
    for sequence, phase, writer in ((0, 0, "mlp 0"), (1, 0, "mlp 0"), (1, 1, "mlp 2")):
        key = dict(zip(NAMES, (sequence, 2 if sequence else 1, phase, writer), strict=True))
        for neuron in range(5):
            scale = (1 + sequence) * (1 + phase)
            listed.append(key | {"neuron": 10 * scale + neuron, "share": scale * (0.5 - 0.1 * neuron)})
            for matrix, sign in (("in", 1.0), ("gate", -0.6)):
                amounts = {"embed": 1.0, "attn 0": -4.0, "attn 1": 0.5, "mlp 1": 2.0, "bias": 99.0}
                for name, amount in amounts.items():
                    row = {"neuron": 10 * scale + neuron, "matrix": matrix, "component": name, "amount": 7.0}
                    feeds.append(key | row | {"difference": sign * amount * scale * (1 + neuron)})
    nothing = pd.DataFrame()
    return trace, Neurons(pd.DataFrame(listed), nothing, nothing, pd.DataFrame(feeds), ()), scored(tokens)


def test_every_edge_of_a_circuit_says_what_the_tables_say() -> None:
    trace, neurons, scores = circuit_of()
    graph = trace.circuit(1, neurons=neurons, scores=scores)
    edges = {(a, b): d for a, b, d in graph.edges(data=True)}
    token = "2 'b'"
    expected: dict[tuple[str, str], tuple[str, float]] = {
        ("mlp 0", token): ("writes", 0.9), ("mlp 2", token): ("writes", 0.7), ("attn 1", token): ("erases", -0.2),
        ("mlp 4", token): ("erases", -0.3),
    }  # fmt: skip
    for writer, scale in (("mlp 0", 2), ("mlp 2", 4)):
        for n in range(3):  # the largest three of each phase
            neuron = f"{writer} neuron {10 * scale + n}"
            expected[neuron, writer] = ("is part of", scale * (0.5 - 0.1 * n))
            for name, amount in (("attn 0", -4.0), ("mlp 1", 2.0)):  # the gate's part of attn 0 is the third
                expected[name, neuron] = ("feeds", amount * scale * (1 + n))
    heads = [(float(scores.beta[1, n, h, 2]), f"head {n}.{h}") for n in (1, 3, 4) for h in range(HEADS)]
    for weight, name in sorted(heads, reverse=True)[:8]:
        expected[token, name] = ("is read by", weight)
    assert {pair: d["role"] for pair, d in edges.items()} == {pair: role for pair, (role, _) in expected.items()}
    for pair, (_, weight) in expected.items():
        assert edges[pair]["weight"] == pytest.approx(weight), pair
    assert {d["matrix"] for d in edges.values() if d["role"] == "feeds"} == {"in"}
    assert graph.nodes["mlp 2"]["layer"] == 2
    assert "embed" not in graph
    plain = trace.circuit(1)
    assert {b for _, b, d in plain.edges(data=True) if d["role"] == "is read by"} == {"head 1.3", "head 2.0"}


def test_a_circuit_is_laid_out_from_left_to_right_and_by_depth() -> None:
    trace, neurons, scores = circuit_of()
    graph = trace.circuit(1, neurons=neurons, scores=scores)
    places = layout(graph)
    columns = {"attn 0": 0, "mlp 1": 0, "mlp 0 neuron 20": 1, "mlp 0": 2, "mlp 4": 2, "attn 1": 2, "2 'b'": 3}
    for node, column in columns.items():
        assert places[node][0] == column, node
    assert all(places[n][0] == 4 for n in graph if n.startswith("head"))
    depth = [places[n][1] for n in ("mlp 0", "attn 1", "mlp 2", "mlp 4")]
    assert depth == sorted(depth, reverse=True)


def test_upstream_is_the_mean_over_phases_of_a_kind() -> None:
    rows: list[dict[str, Any]] = []
    draw = torch.Generator().manual_seed(0)
    for kind, phases in (("secondary", 3), ("primary", 2)):
        for _ in range(phases):
            for matrix in ("in", "gate"):
                for component, size in (("embed", 1.0), ("mlp 0", -6.0), ("attn 2", 3.0)):
                    amount, rest = (torch.randn(2, generator=draw) + size).tolist()
                    row = {"kind": kind, "writer": "mlp 3", "neuron": 5, "matrix": matrix, "component": component}
                    rows.append(row | {"amount": amount, "elsewhere": rest, "difference": amount * 2})
    nothing = pd.DataFrame()
    neurons = Neurons(nothing, nothing, nothing, pd.DataFrame(rows), ())
    for kind in (None, "secondary", "primary"):
        table = neurons.upstream(kind).to_dict("records")
        assert len(table) == 6
        for row in table:
            same = [
                r
                for r in rows
                if kind in (None, r["kind"]) and (r["matrix"], r["component"]) == (row["matrix"], row["component"])
            ]
            assert row["phases"] == len(same)
            for name in ("amount", "elsewhere", "difference"):
                assert row[name] == pytest.approx(sum(r[name] for r in same) / len(same))
        sizes = [abs(row["difference"]) for row in table]
        assert sizes == sorted(sizes, reverse=True)
        assert table[0]["component"] == "mlp 0"
