"""trace_sinks on models whose writers and erasers are planted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import build_pair, random_rows
from planted_writers import ERASES_X, LENGTH, WRITES_X, WRITES_Y, planted_writers, texts

import sinklens as sl
from sinklens.residual.batched_edits import Row, run_rows
from sinklens.residual.components import component_name
from sinklens.trace.neurons import _Layer


def test_planted_writers_and_erasers_are_named_and_proven() -> None:
    model = planted_writers()
    found = sl.find_sinks(model, texts())
    assert {(s.position, s.kind) for s in found} == {(0, "primary"), (20, "secondary")}
    trace = sl.trace_sinks(model, texts(), found, progress=False)
    writers = {
        (row["position"], row["writer"]): row for row in trace.writers().to_dict("records") if row["sequence"] == 0
    }
    assert set(writers) == {(0, f"mlp {WRITES_Y}"), (20, f"mlp {WRITES_X}")}
    for row in writers.values():
        assert row["share"] == pytest.approx(1.0, abs=0.05)
        assert row["contribution"] == pytest.approx(40.0, rel=0.05)
        assert row["d_margin"] < -1
        assert row["proven"] is True
    erasers = trace.erasers()
    assert set(zip(erasers.position, erasers.eraser, strict=True)) == {(20, f"mlp {ERASES_X}")}
    assert (erasers.share + 1).abs().max() < 0.05
    assert (erasers.d_margin_after > 1).all()
    assert any("always a sink" in note for note in trace.notes)
    assert trace.by_component("secondary").writer.tolist() == [f"mlp {WRITES_X}"]


def test_contributions_sum_to_the_stream_at_the_reference_layer() -> None:
    planted = planted_writers(erase=False)
    trace = sl.trace_sinks(planted, texts(), causal=False, progress=False)
    table = trace.to_dataframe()
    for one in trace.traced:
        early = sum(share for _, share in one.shares())
        assert early == pytest.approx(1.0, abs=1e-4)
        mine = table[(table.sequence == one.sequence) & (table.position == one.position)]
        assert set(mine.component) == {"embed", "attn", "mlp"}
        last = mine.cumulative.tolist()[-1]
        assert last == pytest.approx(float(one.contributions.sum()), rel=1e-5)
    assert trace.writers().proven.isna().all()
    assert len(trace.effects()) == 0


def test_rows_equal_single_runs() -> None:
    """Several edits as rows of one batch, against each by itself, on an architecture with grouped heads."""
    _, model = build_pair("qwen2")
    ids = torch.stack(random_rows((60,)))
    no_sink = torch.ones(60, dtype=torch.bool)
    no_sink[[0, 4]] = False
    generator = torch.Generator().manual_seed(0)
    rows = [Row(None)]
    rows += [Row((kind, layer), (p,), torch.randn(1, 32, generator=generator)) for kind, layer, p in
             (("mlp", 0, 4), ("attn", 0, 4), ("attn", 1, 9), ("mlp", 0, 30))]  # fmt: skip
    scored = torch.arange(5, 50)
    together = run_rows(model, ids, rows, [0, 4], no_sink, scored)
    for r, row in enumerate(rows):
        alone = run_rows(model, ids, [row], [0, 4], no_sink, scored)
        for name in ("margin", "alpha", "beta", "loss"):
            gap = (getattr(together, name)[r] - getattr(alone, name)[0]).nan_to_num().abs().max()
            assert gap < 1e-5, (name, row.component)
    moved = (together.margin[1] - together.margin[0]).abs()
    assert moved[1, 0] == 0.0  # layer 0's attention comes before MLP 0 writes
    assert moved[1, 1] > 1e-3
    assert together.loss[3] != together.loss[0]


def test_margins_and_importance_are_those_of_find_sinks(tmp_path: Path) -> None:
    model = planted_writers()
    ids = texts(1)
    found = sl.find_sinks(model, ids)
    no_sink = torch.ones(LENGTH, dtype=torch.bool)
    no_sink[[0, 20]] = False
    seen = run_rows(model, ids, [Row(None)], [0, 20], no_sink)
    for t, position in enumerate((0, 20)):
        assert (seen.beta[0, t] - found.mass[0, :, position]).abs().max() < 1e-5
    trace = sl.trace_sinks(model, texts(), progress=False)
    again = sl.trace.SinkTrace.load(trace.save(tmp_path / "trace.safetensors"))
    assert again.writers().equals(trace.writers())
    assert again.effects().equals(trace.effects())
    assert again.to_dataframe().equals(trace.to_dataframe())
    assert repr(again) == repr(trace)
    assert again.plot().to_json() == trace.plot().to_json()


def test_a_token_that_is_no_sink_is_not_its_own_competitor() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((60,)))
    no_sink = torch.ones(60, dtype=torch.bool)
    no_sink[0] = False
    seen = run_rows(model, ids, [Row(None)], [9], no_sink)
    shown: list[torch.Tensor] = []
    model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda t, hook: shown.append(t[0].detach()))])
    rest = [j for j in range(60) if j not in (0, 9)]
    naive = [
        math.log(float(shown[0][h, i, 9])) - math.log(float(shown[0][h, i, rest].sum()))
        for h in range(4)
        for i in range(25, 60)
    ]
    assert float(seen.margin[0, 0, 1]) == pytest.approx(sum(naive) / len(naive), abs=1e-4)


def test_replacements_do_what_their_names_say() -> None:
    """Zero and rescaling of a writer's output, against the same done to the host's MLP by hand."""
    model = planted_writers()
    found = sl.find_sinks(model, texts())
    trace = sl.trace_sinks(
        model, texts(), found.secondary, replacements=("same_id", "zero"), doses=(0.5,), progress=False
    )
    rows = {
        (r["sequence"], r["component"], r["layer"], r["at"], r["replacement"]): r
        for r in trace.effects().to_dict("records")
    }
    for replacement, factor in (("zero", 0.0), ("x 0.5", 0.5)):

        def edit(tensor: torch.Tensor, hook: Any, factor: float = factor) -> torch.Tensor:
            new = tensor.clone()
            new[:, 20] *= factor
            return new

        kept: list[torch.Tensor] = []
        hooks: list[Any] = [(f"blocks.{WRITES_X}.hook_mlp_out", edit)]
        hooks.append(("blocks.5.attn.hook_pattern", lambda t, hook, kept=kept: kept.append(t.detach())))
        model.run_with_hooks(texts(1), fwd_hooks=hooks)
        ours = rows[0, "mlp", WRITES_X, "sink", replacement]
        assert ours["beta"] == pytest.approx(float(kept[0][0, :, 36:, 20].mean()), abs=1e-5)


def test_a_planted_output_makes_a_sink_and_its_controls_do_not() -> None:
    model = planted_writers()
    trace = sl.trace_sinks(model, texts(), causal=False, progress=False)
    table = sl.trace.plant_sinks(model, trace, positions=(30,), n_random=4, progress=False)
    by = {(r["sink"], r["added"]): r for r in table.to_dict("records") if r["sequence"] == 0}
    for sink in (0, 20):
        assert by[sink, "writer"]["d_alpha"] > 0.1
        assert by[sink, "flipped"]["d_alpha"] < 0.01
        assert by[sink, "random"]["d_alpha"] < 0.5 * by[sink, "writer"]["d_alpha"]
    with pytest.raises(sl.BadInputError, match="are sinks"):
        sl.trace.plant_sinks(model, trace, positions=(20,))


def test_nothing_to_trace_and_bad_input() -> None:
    model = planted_writers()
    plain = torch.full((2, LENGTH), 6)
    empty = sl.trace_sinks(model, plain, progress=False)
    assert len(empty.to_dataframe()) == 0
    assert len(empty.writers()) == 0
    assert "0 sink(s)" in repr(empty)
    with pytest.raises(sl.BadInputError, match="empty"):
        empty.plot()
    with pytest.raises(sl.BadInputError, match="no writer"):
        sl.trace.plant_sinks(model, empty)
    with pytest.raises(sl.BadInputError, match="replacements"):
        sl.trace_sinks(model, texts(), replacements=cast(Any, ("median",)))
    other = sl.find_sinks(model, texts(2))
    with pytest.raises(sl.BadInputError, match="these very tokens"):
        sl.trace_sinks(model, texts(3), other)


def test_names() -> None:
    assert component_name(("mlp", 3)) == "mlp 3"
    assert component_name(("embed", -1)) == "embed"


def test_planted_neurons_are_named_and_fed_by_the_embedding() -> None:
    model = planted_writers()
    trace = sl.trace_sinks(model, texts(), causal=False, progress=False)
    found = sl.trace.writer_neurons(model, trace, top=(1,), n_random=2, progress=False)
    top = {(r["position"], r["writer"]): r for r in found.to_dataframe().to_dict("records")[::-1]}
    assert top[0, f"mlp {WRITES_Y}"]["neuron"] == 2
    assert top[20, f"mlp {WRITES_X}"]["neuron"] == 5
    for row in found.writers.to_dict("records"):
        assert row["neurons_for_90"] == 1
    for row in found.to_dataframe().to_dict("records"):
        if row["neuron"] in (2, 5) and row["share"] > 0.5:
            assert row["ordinary"] == pytest.approx(0.0, abs=1e-6)
            assert row["activation"] == pytest.approx(1.0, rel=0.05)
    by = {(r["position"], r["neurons"]): r["d_margin"] for r in found.ablations.to_dict("records")}
    assert by[20, "top"] < -1
    assert abs(by[20, "random"]) < abs(by[20, "top"])
    feeds = [r for r in found.feeds.to_dict("records") if r["position"] == 20 and r["neuron"] == 5]
    assert max(feeds, key=lambda r: r["amount"])["component"] == "embed"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "neox", "phi3", "olmo2"])
def test_neurons_sum_to_what_the_mlp_adds_and_feeds_to_the_preactivation(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((40,)))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        split = _Layer(model, layer, ids, 7)
        amounts, bias = split.split(direction)
        written = split.seen.get("ln2_post.hook_out", split.seen["mlp.hook_out"])[7]
        assert float(amounts.sum()) + bias == pytest.approx(float(written @ direction), abs=1e-4)
        rows, note = split.feeds([0, 3])
        if name == "olmo2":  # its MLP reads the stream itself
            assert "does not read the norm" in note
            continue
        assert not note
        shown: dict[str, torch.Tensor] = {}

        def keep(point: str, shown: dict[str, torch.Tensor] = shown) -> Any:
            def hook(tensor: torch.Tensor, hook: Any) -> None:
                shown[point] = tensor[0, 7].detach()

            return hook

        matrices = {row["matrix"] for row in rows}
        points: list[Any] = [(f"blocks.{layer}.mlp.{m}.hook_out", keep(m)) for m in matrices]
        model.run_with_hooks(ids, fwd_hooks=points)
        for matrix in matrices:
            for neuron in (0, 3):
                total = sum(r["amount"] for r in rows if (r["matrix"], r["neuron"]) == (matrix, neuron))
                assert total == pytest.approx(float(shown[matrix][neuron]), abs=1e-4)


def test_mixtures_of_experts_are_refused_in_words() -> None:
    _, model = build_pair("mixtral")
    with pytest.raises(sl.UnsupportedModelError, match="mixture of experts"):
        _Layer(model, 0, torch.stack(random_rows((12,))), 3)
