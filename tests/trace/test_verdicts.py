"""The numbers and the verdicts about secondary sinks, on traces written down by hand, against sums by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from made_traces import COMPONENTS, DOCUMENTS, LAYERS, sink, tokens, trace_of, traced, weakened

import sinklens as sl
from sinklens.core.intervals import interval
from sinklens.find.sinkmap import Sink
from sinklens.residual.components import Component
from sinklens.trace.doses import dose_table
from sinklens.trace.phases import Phase, Traced
from sinklens.trace.verdicts import above, every, quantity


def at(values: dict[Component, float]) -> torch.Tensor:
    return torch.tensor([values.get(c, 0.5) for c in COMPONENTS])


def naive_mean(found: sl.trace.Verdict, name: str, values: Sequence[float], documents: Sequence[int]) -> None:
    known = [(v, d) for v, d in zip(values, documents, strict=True) if not math.isnan(v)]
    row = found.number(name)
    assert row["mean"] == pytest.approx(sum(v for v, _ in known) / len(known), rel=1e-5, abs=1e-9)
    assert (row["n"], row["documents"]) == (len(known), len({d for _, d in known}))
    span = interval(torch.tensor([v for v, _ in known], dtype=torch.float64), [d for _, d in known])
    assert span is not None
    assert (row["low"], row["high"]) == pytest.approx(span, rel=1e-5, abs=1e-9)


def aligned(cosine: float, same: float, noise: float = 0.02) -> sl.trace.SinkTrace:
    """MLP 3 writes most of what MLPs write; others write more, and MLP 8 too, but behind the reference layer."""
    draw = torch.Generator().manual_seed(0)
    shares: dict[Component, float] = {
        ("embed", -1): 0.6,
        ("attn", 5): 0.5,
        ("mlp", 3): 0.35,
        ("mlp", 4): 0.15,
        ("mlp", 8): 0.9,
    }
    found = []
    for n in range(2 * DOCUMENTS):
        a, b = (noise * torch.randn(2, generator=draw)).tolist()
        found.append(
            traced(
                n % DOCUMENTS, shares, document=n % DOCUMENTS, position=n // DOCUMENTS,
                cosines=at({("mlp", 3): cosine + a}), norms=at({("mlp", 3): 20 + n}),
                same_cosines=at({("mlp", 3): same + b if n % 3 else math.nan}),
                same_norms=at({("mlp", 3): 5 + 100 * b}),
            )
        )  # fmt: skip
    other = traced(0, {("mlp", 2): 1.0}, kind="primary", cosines=at({("mlp", 2): -1.0}))
    return trace_of([*found, other])


def test_alignment_compares_the_largest_mlp_with_itself_at_the_same_id() -> None:
    trace = aligned(0.91, 0.2)
    found = sl.trace.writer_alignment(trace)
    index = COMPONENTS.index(("mlp", 3))
    mine = [t for t in trace.traced if t.kind == "secondary"]
    documents = [t.document for t in mine]
    assert set(found.details.writer) == {"mlp 3"}
    own = [float(t.cosines[index]) for t in mine]
    same = [float(t.same_cosines[index]) for t in mine]
    naive_mean(found, "cosine", own, documents)
    naive_mean(found, "same_id_cosine", same, documents)
    naive_mean(found, "difference", [a - b for a, b in zip(own, same, strict=True)], documents)
    naive_mean(found, "norm", [20.0 + n for n in range(2 * DOCUMENTS)], documents)
    naive_mean(found, "same_id_norm", [float(t.same_norms[index]) for t in mine], documents)
    naive_mean(found, "share", [0.35] * len(mine), documents)
    naive_mean(found, "cosines above 0.9", [float(c > 0.9) for c in own], documents)
    assert 0 < found.number("cosines above 0.9")["mean"] < 1


@pytest.mark.parametrize(
    ("cosine", "same", "noise", "holds"),
    [
        (0.8, 0.2, 0.02, True), (0.8, 0.6, 0.02, True), (0.8, 0.8, 0.02, None), (0.6, 0.9, 0.02, False),
        (0.4, 0.1, 0.02, False), (0.5, 0.1, 0.02, None), (0.8, math.nan, 0.02, None),
    ],
)  # fmt: skip
def test_alignment_holds_above_a_half_and_above_the_same_id(
    cosine: float, same: float, noise: float, holds: Any
) -> None:
    assert sl.trace.writer_alignment(aligned(cosine, same, noise)).holds is holds


def test_what_no_mlp_writes_has_no_alignment() -> None:
    with pytest.raises(sl.BadInputError, match="no MLP writes"):
        sl.trace.writer_alignment(trace_of([traced(0, {("attn", 3): 1.0, ("mlp", 2): -0.1})]))


def masses(trend: Sequence[int]) -> tuple[list[Traced], tuple[Sink, ...]]:
    """Two writers; within each, mass, life and rho follow the norm as ``trend`` says, between them all are turned.

    Attention is far larger outside the phase, where it must not count.
    """
    chosen, sinks = [], []
    for n in range(DOCUMENTS):
        late, rank = divmod(n, DOCUMENTS // 2)
        writer: Component = ("mlp", 2 if late else 3)
        size = rank + 20 * late
        onset, end = 1, 1 + (5 - rank // 2 if trend[1] < 0 else 1 + rank // 2) + 4 * (1 - late)
        mass = 0.1 + 0.01 * trend[0] * rank - 0.05 * late
        inside = [0.9] + [mass - 0.005] + [mass] * (end - onset - 1) + [mass + 0.005] + [0.9] * (LAYERS - 1 - end)
        sinks.append(sink(n, onset, end - onset + 1, masses=tuple(inside)))
        chosen.append(
            traced(
                n, {writer: 0.9}, phase=Phase(onset, end, end), before=torch.ones(len(COMPONENTS), dtype=torch.bool),
                norms=at({writer: float(size)}), rho=float(trend[2] * rank),
            )
        )  # fmt: skip
    return chosen, tuple(sinks)


@pytest.mark.parametrize(("trend", "holds"), [((1, 1, -1), True), ((1, -1, 1), False), ((-1, 1, 1), False)])
def test_the_norm_is_compared_within_each_writing_layer(trend: tuple[int, int, int], holds: bool) -> None:
    chosen, sinks = masses(trend)
    found = sl.trace.norm_and_mass(trace_of(chosen, sinks=sinks))
    assert found.number("Spearman of norm and mass")["mean"] == pytest.approx(trend[0])
    assert found.number("Spearman of norm and life")["mean"] * trend[1] > 0.9  # lives have ties
    assert found.number("Spearman of rho and mass")["mean"] == pytest.approx(trend[0] * trend[2])
    assert found.holds is holds
    for row, one, of in zip(found.details.to_dict("records"), chosen, sinks, strict=True):
        layers = range(one.phase.onset, one.phase.end + 1)
        assert row["life"] == len(layers)
        assert row["mass"] == pytest.approx(sum(of.masses[n] for n in layers) / len(layers))


def dosed(doses: Sequence[float] = (0.5, 1.0, 2.0)) -> sl.trace.SinkTrace:
    """Two phases of every sink, whose main writer is MLP 3; a lesser writer was rescaled too, as was a control."""
    shares: dict[Component, float] = {("mlp", 2): 0.3, ("mlp", 3): 0.6}
    chosen = [traced(n, shares, number=k) for n in range(DOCUMENTS) for k in (0, 1)]
    alpha = {0.5: 0.1, 1.0: 0.3, 2.0: 0.4}
    causes: list[dict[str, Any]] = []
    for one in chosen:
        for layer, scale in ((2, 3.0), (3, 1.0)):
            own = scale * (1 + one.number) * (1 + 0.01 * one.sink)
            for dose in doses:
                row: dict[str, Any] = {"trace": one.sink, "phase": one.number, "component": "mlp", "layer": layer}
                row |= {"at": "sink", "replacement": f"x {dose:g}"}
                for name, clean in (("alpha", 0.3), ("life", 10.0), ("margin", 5.0), ("rho", 2.0)):
                    value = own * alpha[dose] if name == "alpha" else own * clean * dose
                    row |= {name: value, f"d_{name}": value - own * clean}
                causes.append(row)
    return trace_of(chosen, causes)


@pytest.mark.parametrize("doses", [(0.5, 2.0), (0.5, 1.0, 2.0)])
def test_doses_are_those_of_the_main_writer_of_each_phase_with_the_unedited_one_between(
    doses: tuple[float, ...],
) -> None:
    trace = dosed(doses)
    table = dose_table(trace)
    assert [(r["sequence"], r["phase"], r["dose"]) for r in table] == [
        (n, k, dose) for n in range(DOCUMENTS) for k in (0, 1) for dose in (0.5, 1.0, 2.0)
    ]
    for row in table:
        own = (1 + row["phase"]) * (1 + 0.01 * row["sequence"])
        assert row["writer"] == "mlp 3"
        assert row["alpha"] == pytest.approx(own * {0.5: 0.1, 1.0: 0.3, 2.0: 0.4}[row["dose"]])
        for name, clean in (("life", 10.0), ("margin", 5.0), ("rho", 2.0)):
            assert row[name] == pytest.approx(own * clean * row["dose"])
    found = sl.trace.norm_and_mass(trace)
    documents = [n for n in range(DOCUMENTS) for _ in (0, 1)]
    for dose, size in ((0.5, 0.1), (1.0, 0.3), (2.0, 0.4)):
        values = [size * k * (1 + 0.01 * n) for n in range(DOCUMENTS) for k in (1, 2)]
        naive_mean(found, f"alpha at dose {dose:g}", values, documents)
    row = found.number("saturation")
    assert row["mean"] == pytest.approx((0.4 - 0.3) / (0.3 - 0.1))
    assert (row["n"], row["documents"]) == (2 * DOCUMENTS, DOCUMENTS)


def test_weakening_compares_layers_with_secondary_sinks_and_up_to_three_beside_them() -> None:
    entries = weakened(0.2, 0.1, 0.5)
    found = sl.trace.primary_weakening(trace_of([], primaries=tuple(entries)))
    documents = list(range(DOCUMENTS))
    near = (3, 4, 5, 8, 9)
    inside = [(e["alpha"][6] + e["alpha"][7]) / 2 for e in entries]
    naive_mean(found, "dip_alpha", [x - (0.5 + 0.6 + 0.7 + 0.7 + 0.8) / 5 for x in inside], documents)
    naive_mean(found, "dip_margin", [9.5 - sum(3.0 + n for n in near if n != 9) / 4] * DOCUMENTS, documents)
    back = [(e["alpha_without"][6] + e["alpha_without"][7]) / 2 for e in entries]
    naive_mean(found, "recovered_alpha", [a - b for a, b in zip(back, inside, strict=True)], documents)
    odds = [[math.log(x / (1 - x)) for x in side] for side in (back, inside)]
    naive_mean(found, "recovered_logit", [a - b for a, b in zip(*odds, strict=True)], documents)
    gone = [(e["margin_without"][6] + e["margin_without"][7]) / 2 - 9.5 for e in entries]
    naive_mean(found, "recovered_margin", gone, documents)
    assert found.number("recovered_margin")["mean"] == pytest.approx(0.5, abs=0.01)
    naive_mean(found, "secondary_alpha", [6.5] * DOCUMENTS, documents)
    naive_mean(found, "secondary_alpha_without", [0.65] * DOCUMENTS, documents)
    assert set(found.details.layers) == {2}
    assert set(found.details.near) == {5}


@pytest.mark.parametrize(
    ("dip", "back", "margin", "noise", "holds"),
    [
        (0.2, 0.1, 0.5, 0.001, True),
        (0.2, 0.1, 0.05, 0.001, False),  # competition
        (0.2, 0.1, 0.1, 0.001, None),
        (0.2, 0.1, 0.05, 0.5, None),  # the interval holds both: not decided
        (-0.2, 0.1, 0.5, 0.001, False),
        (0.05, 0.1, 0.5, 0.5, None),
        (0.2, -0.1, 0.5, 0.001, False),
        (0.2, 0.0, 0.5, 0.001, None),
    ],
)
def test_weakening_holds_where_attention_dips_and_recovers_and_the_margin_too(
    dip: float, back: float, margin: float, noise: float, holds: Any
) -> None:
    entries = weakened(dip, back, margin, noise)
    assert sl.trace.primary_weakening(trace_of([], primaries=tuple(entries))).holds is holds


def levels_of(counts: dict[tuple[int, int], int], **changes: Any) -> sl.SinkMap:
    """Sinks of these (onset, lifetime), dealt out over the documents."""
    pairs = [level for level, n in counts.items() for _ in range(n)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    sinks = [sink(i % DOCUMENTS, *pairs[n], token_id=pairs[n][1] % 2) for i, n in enumerate(order)]
    nothing = torch.zeros(DOCUMENTS, LAYERS, 4)
    places = tuple((s.sequence, s.position) for s in sinks)
    return sl.SinkMap(
        tuple(sinks), (0,) * DOCUMENTS, (), nothing, nothing, tokens(), sl.find.Thresholds(), "attention", places=places
    )


def test_levels_are_clusters_of_a_twentieth_of_the_sinks() -> None:
    """One of exactly 5 %, one below; neighbours joined by a chain; the same onset with other lifetimes is apart."""
    counts = {(1, 2): 40, (2, 3): 20, (3, 4): 10, (2, 8): 21, (7, 2): 5, (9, 9): 4}
    found = levels_of(counts)
    primary = sink(0, 5, 5, kind="primary")
    verdict = sl.trace.sink_levels(replace(found, sinks=(*found.sinks, primary)))
    cluster = {(1, 2): 0, (2, 3): 0, (3, 4): 0, (2, 8): 1, (7, 2): 2, (9, 9): 3}
    mine = [(cluster[s.onset, s.lifetime], s.sequence, s.token_id) for s in found.sinks]
    documents = [s.sequence for s in found.sinks]
    naive_mean(verdict, "covered", [float(c != 3) for c, _, _ in mine], documents)
    for name, ids in (("same level", {0, 1}), ("same level, same token", None)):
        values = []
        for c, document, token_id in mine:
            others = [o for o, d, t in mine if d != document and t in (ids or {token_id})]
            values.append(sum(o == c for o in others) / len(others))
        naive_mean(verdict, name, values, documents)
    assert verdict.number("levels")["mean"] == 3
    assert (verdict.number("levels")["n"], verdict.number("levels")["documents"]) == (100, DOCUMENTS)
    rows = {(r["onset"], r["lifetime"]): r for r in verdict.details.to_dict("records")}
    assert {level: r["count"] for level, r in rows.items()} == counts
    groups = {level: r["level"] for level, r in rows.items()}
    assert groups[9, 9] == -1
    assert groups[1, 2] == groups[2, 3] == groups[3, 4]
    assert {groups[1, 2], groups[2, 8], groups[7, 2]} == {0, 1, 2}


def test_levels_of_a_trace_are_those_of_its_traced_sinks() -> None:
    found = levels_of({(1, 2): 30, (7, 2): 30})
    chosen = [traced(n, {}) for n, s in enumerate(found.sinks) if s.onset == 7]
    verdict = sl.trace.sink_levels(trace_of(chosen, sinks=found.sinks))
    assert verdict.details.onset.tolist() == [7]
    assert verdict.number("covered")["n"] == 30


@pytest.mark.parametrize(
    ("counts", "holds"),
    [
        ({(1, 2): 50, (7, 2): 50}, True),
        ({(n, m): 20 for n in (1, 4, 7) for m in (2, 5)}, True),  # six levels
        ({**{(n, m): 20 for n in (1, 4, 7) for m in (2, 5)}, (1, 9): 20}, False),  # seven
        ({(1, 2): 60, **{(n, m): 3 for n in (4, 6, 8, 10) for m in (2, 5, 8)}}, False),  # too many sinks in none
    ],
)
def test_levels_hold_where_at_most_six_cover_the_sinks(counts: dict[tuple[int, int], int], holds: bool) -> None:
    assert sl.trace.sink_levels(levels_of(counts)).holds is holds


def test_an_answer_needs_the_whole_interval_beyond_the_bound() -> None:
    def row(low: float, high: float) -> dict[str, float]:
        return {"mean": (low + high) / 2, "low": low, "high": high}

    assert above(row(0.1, 0.3), 0.0) is True
    assert above(row(-0.3, -0.1), 0.0) is False
    assert above(row(-0.1, 0.3), 0.0) is None
    assert above(row(-0.3, 0.1), 0.0) is None
    assert above(row(0.0, 0.3), 0.0) is None  # at the bound is not above it
    assert above(row(-0.3, 0.0), 0.0) is None
    assert above(row(math.nan, math.nan), 0.0) is None
    assert every([]) is True
    assert every([None, False]) is False
    assert every([True, True]) is True


def test_intervals_are_over_documents_not_over_values() -> None:
    draw = torch.Generator().manual_seed(0)
    documents = [n // 3 for n in range(3 * DOCUMENTS)]
    level = torch.randn(DOCUMENTS, generator=draw)
    values = [float(level[d]) for d in documents] + [math.nan]
    row = quantity("x", values, [*documents, 99])
    span = interval(level.double(), range(DOCUMENTS))
    assert span is not None
    assert (row["low"], row["high"]) == pytest.approx(span)
    assert (row["n"], row["documents"]) == (3 * DOCUMENTS, DOCUMENTS)


def test_a_verdict_is_read_in_words() -> None:
    rows = pd.DataFrame([quantity("x", [float(n) for n in range(20)], range(20)), quantity("y", [1.0], [0])])
    for holds, words in ((True, "c: s: holds (r)"), (False, "does not hold"), (None, "not decided")):
        assert words in repr(sl.trace.Verdict("c", "s", holds, rows, rows, "r"))
    text = repr(sl.trace.Verdict("c", "s", True, rows, rows, "r")).splitlines()
    low, high = rows.low.tolist()[0], rows.high.tolist()[0]
    assert text[1] == f"  x: 9.5 [{low:.3g}, {high:.3g}], n = 20"
    assert text[2] == "  y: 1, n = 1"
