"""Replacements, and primaries without secondary sinks, against the host run once per edit with plain hooks.

The model of planted_writers, made restless: attention writes a little, so that secondary sinks do move the primary's
margin; a second MLP writes a little of the secondary sinks and a third takes a little away; late in a text what MLPs
read is drowned, so that there the same tokens are written less, and are no sinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from batches import batch_of
from made_traces import traced
from planted_writers import HELPS_X, LAYERS, WRITES_X, X, Y, planted_writers, restless, texts
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.residual.components import Component
from sinklens.trace.replacement import PART, _writing

REPLACEMENTS = ("same_id", "zero", "mean", "project")


@dataclass
class Run:
    """What the host shows of one sequence."""

    patterns: list[Tensor]
    streams: list[Tensor]
    wrote: dict[Component, Tensor]
    loss: Tensor


def run(model: TransformerBridge, ids: Tensor, edits: Mapping[Component, Mapping[int, Tensor]] | None = None) -> Run:
    """One forward; ``edits[component][position]`` stands where that component would have written."""
    patterns: list[Tensor] = []
    streams: list[Tensor] = []
    wrote: dict[Component, Tensor] = {}

    def write(component: Component) -> Any:
        def hook(tensor: Tensor, hook: Any) -> Tensor:
            new = tensor.clone()
            for position, vector in (edits or {}).get(component, {}).items():
                new[0, position] = vector
            wrote[component] = new[0].detach()
            return new

        return hook

    hooks: list[Any] = []
    for n in range(LAYERS):
        hooks.append((f"blocks.{n}.hook_in", lambda t, hook: streams.append(t[0].detach())))
        hooks.append((f"blocks.{n}.attn.hook_pattern", lambda t, hook: patterns.append(t[0].detach())))
        hooks += [(f"blocks.{n}.hook_{kind}_out", write((kind, n))) for kind in ("attn", "mlp")]
    with torch.no_grad():
        logits = model.run_with_hooks(ids[None], fwd_hooks=hooks)
    loss = -logits[0, :-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return Run(patterns, streams, wrote, loss)


def alpha(run: Run, layer: int, key: int) -> float:
    return float(run.patterns[layer][:, key:, key].mean())


def beta(run: Run, layer: int, key: int) -> float:
    return float(run.patterns[layer][:, key + 16 :, key].mean())


def margin(run: Run, layer: int, key: int, rest: Sequence[int]) -> float:
    far = run.patterns[layer][:, key + 16 :]
    return float((far[:, :, key].log() - far[:, :, list(rest)].sum(-1).log()).mean())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return planted_writers(change=restless)


@pytest.fixture(scope="module")
def found(model: TransformerBridge) -> sl.SinkMap:
    """Four sequences of three documents. One X lives in two phases, one primary skips a layer, one text has no X."""
    rows = [row.clone() for row in texts(4)]
    rows[0][50] = X
    rows[1][[3, 20, 30, 88]] = torch.tensor([Y, 6, X, X])
    rows[2][[0, 2]] = torch.tensor([X, Y])
    rows[3][20] = 9
    batch = batch_of(model, [rows[0], rows[1][:95], rows[2], rows[3]])
    found = sl.find_sinks(model, replace(batch, documents=(0, 0, 1, 2)))
    assert {(s.sequence, s.position, s.kind) for s in found} == {
        (0, 0, "primary"), (0, 20, "secondary"), (0, 50, "secondary"), (1, 0, "primary"),
        (1, 3, "primary"), (1, 30, "secondary"),
        (2, 0, "secondary"), (2, 2, "primary"), (2, 20, "secondary"), (3, 0, "primary"),
    }  # fmt: skip
    uniform = found.uniform.clone()
    uniform[0, 5, 20] = uniform[2, 8, 2] = 0.9  # not active there
    return replace(found, uniform=uniform)


@pytest.fixture(scope="module")
def trace(model: TransformerBridge, found: sl.SinkMap) -> sl.trace.SinkTrace:
    return sl.trace_sinks(
        model, found.tokens, found, replacements=REPLACEMENTS, doses=(0.5,), loss=True, progress=False
    )


@pytest.fixture(scope="module")
def clean(model: TransformerBridge, found: sl.SinkMap) -> list[Run]:
    return [run(model, found.tokens.row(b)) for b in range(4)]


def no_sinks(found: sl.SinkMap, sequence: int) -> list[int]:
    return [p for p in range(int(found.tokens.lengths[sequence])) if (sequence, p) not in (found.places or ())]


def elsewhere(found: sl.SinkMap, clean: list[Run], component: Component, token_id: int | None) -> Tensor:
    """What a component writes at tokens of an id that are no sink; without an id, or any, at ordinary tokens."""
    wrote, texts = [run.wrote[component] for run in clean], range(len(clean))
    same = [wrote[b][p] for b in texts for p in no_sinks(found, b) if int(found.tokens.row(b)[p]) == token_id]
    return torch.stack(same or [wrote[b][no_sinks(found, b)].mean(0) for b in texts]).mean(0)


def test_every_replacement_is_the_host_run_with_that_output_put_there(
    model: TransformerBridge, found: sl.SinkMap, trace: sl.trace.SinkTrace, clean: list[Run]
) -> None:
    """Margin, alpha, beta, life, rho and loss of every row; so the windows of layers that they are means over, too."""
    table = trace.effects().to_dict("records")
    assert {r["at"] for r in table} == {"sink", "all sinks", "random layer", "random token"}
    assert {r["replacement"] for r in table if r["at"] == "sink"} == {*REPLACEMENTS, "x 0.5"}
    for row in table:
        b, p = row["sequence"], row["position"]
        one = next(t for t in trace.traced if (t.sequence, t.position, t.number) == (b, p, row["phase"]))
        rest, u, component = no_sinks(found, b), one.direction, (row["component"], row["layer"])
        old = clean[b].wrote[component]
        at = {p: one.token_id}
        if row["at"] == "all sinks":
            at = {s.position: s.token_id for s in found if s.sequence == b}
        if row["at"] == "random token":
            at = {88: -1}  # the only other token that was looked at
        put = {q: elsewhere(found, clean, component, token_id) for q, token_id in at.items()}
        if row["replacement"] in ("zero", "mean", "project", "x 0.5"):
            ordinary, along = elsewhere(found, clean, component, None), (old[p] @ u) * u
            other = {"zero": 0 * u, "mean": ordinary, "project": old[p] - along, "x 0.5": old[p] / 2}
            put = {q: other[row["replacement"]] for q in at}
        edited = run(model, found.tokens.row(b), {component: put})
        first = min(max(one.phase.onset, row["layer"] + 1), one.phase.end)
        inside = range(first, one.phase.end + 1)
        for name, of in (("alpha", alpha), ("beta", beta), ("margin", partial(margin, rest=rest))):
            new, before = (mean([of(r, n, p) for n in inside]) for r in (edited, clean[b]))
            assert row[name] == pytest.approx(new, abs=1e-4), (row, name)
            assert row[f"d_{name}"] == pytest.approx(new - before, abs=1e-4), (row, name)
        behind = range(one.phase.end + 1, min(one.phase.end + 4, LAYERS))
        after = mean([margin(edited, n, p, rest) - margin(clean[b], n, p, rest) for n in behind])
        assert row["d_margin_after"] == pytest.approx(after, abs=1e-4, nan_ok=True)
        lives = [
            sum(beta(r, n, p) >= max(0.05, 3 * float(found.uniform[b, n, p])) for n in range(one.phase.onset, LAYERS))
            for r in (edited, clean[b])
        ]
        assert (row["life"], row["d_life"]) == (lives[0], lives[0] - lives[1])
        x = edited.streams[one.phase.reference][p]
        assert row["rho"] == pytest.approx(float((x @ u) / (x - (x @ u) * u).norm()), rel=1e-3, abs=1e-4)
        kept = [q for q in rest if q < len(edited.loss)]
        assert row["loss"] == pytest.approx(float(edited.loss[kept].mean()), abs=1e-4)
        assert row["d_loss"] == pytest.approx(float((edited.loss - clean[b].loss)[kept].mean()), abs=1e-4)


def test_which_replacements_there_are(found: sl.SinkMap, trace: sl.trace.SinkTrace) -> None:
    """Writers and erasers in every way, what feeds the last writer by tokens of its id, controls apart from these."""
    table = trace.effects().to_dict("records")
    for one in trace.traced:
        mine = [
            r for r in table if (r["sequence"], r["position"], r["phase"]) == (one.sequence, one.position, one.number)
        ]
        writers = one.writers()
        at_sink = [((r["component"], r["layer"]), r["replacement"]) for r in mine if r["at"] == "sink"]
        expected = [(c, name) for c in [*writers, *one.erasers()] for name in REPLACEMENTS]
        expected += [(c, "x 0.5") for c in writers]
        early = one.components[: one.components.index(writers[-1])]
        expected += [(c, "same_id") for c in early if c not in writers and c[0] in ("attn", "mlp")]
        assert sorted(at_sink) == sorted(expected)
        alone = sum(s.sequence == one.sequence for s in found) == 1
        assert sum(r["at"] == "all sinks" for r in mine) == (0 if alone else len(writers))
        assert sum(r["at"] == "random token" for r in mine) == (len(writers) if one.sequence == 1 else 0)
        for row in mine:
            assert row["writer"] == ((row["component"], row["layer"]) in writers)
            if row["at"] == "random layer":
                control = (row["component"], row["layer"])
                writer = next(w for w in writers if row["replacement"].endswith(f" {w[0]} {w[1]}"))
                assert control[0] == writer[0]
                assert writer[1] < control[1] < one.phase.end
                assert abs(one.share(control)) < 0.05
    shown = [r for r in table if r["at"] == "random layer"]
    assert len(shown) > 3


def test_replacements_alone_run_three_layers_behind_the_phase(
    model: TransformerBridge, found: sl.SinkMap, trace: sl.trace.SinkTrace
) -> None:
    """Without doses or a loss later layers are not run; what is shown of the earlier ones is the same."""
    short = sl.trace_sinks(model, found.tokens, found, replacements=("same_id",), progress=False)
    names = ["sequence", "position", "phase", "component", "layer", "at", "replacement"]
    key = [[row[n] for n in names] for row in trace.effects().to_dict("records")]
    whole = dict(zip(map(tuple, key), trace.effects().to_dict("records"), strict=True))
    for row in short.effects().to_dict("records"):
        if row["at"] in ("sink", "all sinks"):
            same = whole[tuple(row[n] for n in names)]
            for name in ("margin", "alpha", "beta", "d_margin_after", "rho"):
                assert row[name] == pytest.approx(same[name], abs=1e-5, nan_ok=True)
            assert math.isnan(row["loss"])


@pytest.mark.parametrize("late", [False, True])
def test_the_reference_gives_tokens_of_an_id_only_where_the_sequences_have_none(
    model: TransformerBridge, late: bool
) -> None:
    own, reference = texts(2), texts(3)
    own[0, 88] = X if late else 9
    reference[:, 90] = X
    trace = sl.trace_sinks(model, own, replacements=("same_id",), reference=reference, progress=False)
    shown = own if late else reference
    elsewhere_found, elsewhere_clean = sl.find_sinks(model, shown), [run(model, row) for row in shown]
    component = ("mlp", WRITES_X)
    edited = run(model, own[1], {component: {20: elsewhere(elsewhere_found, elsewhere_clean, component, X)}})
    row = next(
        r for r in trace.effects().to_dict("records")
        if (r["sequence"], r["position"], r["component"], r["layer"], r["at"]) == (1, 20, *component, "sink")
    )  # fmt: skip
    one = next(t for t in trace.traced if (t.sequence, t.position) == (1, 20))
    assert row["beta"] == pytest.approx(mean([beta(edited, n, 20) for n in range(4, one.phase.end + 1)]), abs=1e-5)


def test_what_writes_a_twentieth_is_a_layer_before_the_reference_one() -> None:
    shares = {("embed", -1): 0.5, ("attn", 2): 0.05, ("mlp", 3): 0.3, ("mlp", 4): 0.04, ("mlp", 8): 0.9}
    assert _writing(traced(0, shares), PART) == [("attn", 2), ("mlp", 3)]


def test_the_primary_without_secondary_sinks_is_the_host_run_without_what_writes_them(
    model: TransformerBridge, found: sl.SinkMap, trace: sl.trace.SinkTrace, clean: list[Run]
) -> None:
    """Whatever writes 5 % of them in any of their phases is put at its value at the same id, once and all at a time."""
    assert [entry["sequence"] for entry in trace.primaries] == [0, 1, 2]
    for entry in trace.primaries:
        b = entry["sequence"]
        places = sorted(s.position for s in found if s.sequence == b and s.kind == "secondary")
        traced = [t for t in trace.traced if t.sequence == b and t.position in places]
        put: dict[Component, dict[int, Tensor]] = {}
        for one in traced:
            for component, share in one.shares():
                if component[0] in ("attn", "mlp") and share >= 0.05:
                    put.setdefault(component, {})[one.position] = elsewhere(found, clean, component, one.token_id)
        assert {("mlp", HELPS_X), ("mlp", WRITES_X)} <= set(put)
        edited = run(model, found.tokens.row(b), put)
        top, rest = {0: 0, 1: 0, 2: 2}[b], no_sinks(found, b)
        assert entry["position"] == top
        assert entry["document"] == (0, 0, 1)[b]
        assert entry["secondary"] == len(places)
        assert entry["alive"] == [sum(t.phase.onset <= n <= t.phase.end for t in traced) for n in range(LAYERS)]
        floor = (3 * found.uniform[b, :, top]).clamp(min=0.05)
        assert entry["active"] == (found.mass[b, :, top] >= floor).tolist()
        for name, r in (("", clean[b]), ("_without", edited)):
            for n in range(LAYERS):
                assert entry[f"alpha{name}"][n] == pytest.approx(alpha(r, n, top), abs=1e-5)
                assert entry[f"margin{name}"][n] == pytest.approx(margin(r, n, top, rest), abs=1e-4)
                others = sum(alpha(r, n, p) for p in places)
                assert entry[f"secondary_alpha{name}"][n] == pytest.approx(others, abs=1e-5)
    moved = max(abs(a - b) for e in trace.primaries for a, b in zip(e["margin"], e["margin_without"], strict=True))
    assert moved > 1e-2  # or the margins above would agree whatever was run


def test_primaries_alone_may_be_run() -> None:
    model = planted_writers()
    whole, alone = (sl.trace_sinks(model, texts(3), most_proven=n, progress=False) for n in (1, 0))
    assert not alone.causes
    assert whole.causes
    assert alone.primaries
    assert list(alone.primaries) == list(whole.primaries)
    with pytest.raises(sl.BadInputError, match="at least 0"):
        sl.trace_sinks(model, texts(3), most_proven=-1)
