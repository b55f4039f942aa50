"""run_experiment: the same tokens, honest controls, resumable, nothing scored where something is edited."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from planted import ORDINARY, X, Y, planted_model, row
from torch import Tensor

import sinklens as sl
from sinklens.bridge.capabilities import capabilities
from sinklens.experiment import runs as measuring
from sinklens.experiment.controls import CONTROLS
from sinklens.experiment.plan import Plan
from sinklens.find.locations import Place, Places
from sinklens.forward.predictions import predictions
from sinklens.inputs.load import as_tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return build_pair("llama")[1]


def texts(n: int = 3, length: int = 70) -> Tensor:
    return torch.stack(random_rows((length,) * n))


def naive_change(model: Any, ids: Tensor, hooks: Any, kept: list[int]) -> tuple[Tensor, Tensor]:
    """Loss and KL per kept position, by plain calls and loops."""
    base = model(ids)[0].double().log_softmax(-1)
    edited = model.run_with_hooks(ids, fwd_hooks=hooks)[0].double().log_softmax(-1)
    loss = torch.stack([-edited[p, ids[0, p + 1]] for p in kept])
    kl = torch.stack([sum((base[p].exp() * (base[p] - edited[p])).unbind()) for p in kept])  # type: ignore[arg-type]
    return loss, kl


def test_metrics_of_every_token_equal_plain_forwards(model: Any) -> None:
    ids = texts()
    hooks = sl.ablate_sinks(model, [0, 3], "zero")
    e = sl.run_experiment(model, ids, {"zero": hooks}, controls=())
    for b in range(3):
        values = e.metrics["loss"][1, b]
        kept = (~values.isnan()).nonzero().flatten().tolist()
        assert {0, 3, 69}.isdisjoint(kept)
        assert len(kept) > 60
        loss, kl = naive_change(model, ids[b : b + 1], hooks, kept)
        assert (values[kept] - loss).abs().max() < 1e-5
        assert (e.metrics["kl"][1, b, kept] - kl).abs().max() < 1e-5
    table = e.to_dataframe()
    assert table.label.tolist() == ["base", "zero"]
    assert abs(table.d_loss[1] - (table.loss[1] - table.loss[0])) < 1e-9
    assert table.d_loss_low.isna().all()  # three documents have no interval


def test_a_neutral_edit_scores_exactly_zero(model: Any) -> None:
    e = sl.run_experiment(model, texts(), {"same": sl.ablate_sinks(model, [0], "scale", g=1.0)}, controls=("random",))
    for label, control in (("same", ""), ("same", "random")):
        assert e.change("loss", label, control).abs().max() == 0
        assert e.change("kl", label, control).abs().max() == 0
        assert e.change("top1", label, control).min() == 1


@pytest.fixture(scope="module")
def sunk() -> tuple[Any, sl.Tokens, sl.SinkMap]:
    """Eighteen texts in a planted model: X is a sink from token to token, Y a weaker one."""
    model = planted_model(8, {X: 6.0, Y: 5.0}, {X: range(8), Y: range(2, 5)}, writes=0.02)
    rows = torch.stack([row(120, {n % 5: X, 20 + n: Y}) for n in range(18)])
    return model, sl.find_sinks(model, rows).tokens, sl.find_sinks(model, rows)


def test_controls_never_pick_a_sink_and_have_as_many_places(sunk: Any) -> None:
    model, tokens, sinks = sunk
    assert len(sinks.primary) == 18
    assert len(sinks.secondary) == 18
    seen: dict[str, Any] = {}

    def spy(kind: str, wanted: Any, among: Any, batch: Any, found: Any, seed: int) -> Any:
        places, complete = real(kind, wanted, among, batch, found, seed)
        seen[kind] = (places, complete, wanted)
        return places, complete

    from sinklens.experiment import plan

    real = plan.control_places
    plan.control_places = spy
    try:
        e = sl.run_experiment(model, tokens, {"zero": sl.ablate_sinks(model, sinks, "zero")}, controls=CONTROLS)
    finally:
        plan.control_places = real
    ids = tokens.ids
    sink_places = {(s.sequence, s.position) for s in sinks}
    for kind in ("random", "matched"):
        places, complete, wanted = seen[kind]
        assert all(complete)
        for b in range(18):
            own = [entry for entry in places.entries if entry.sequence == b]
            assert len({entry.position for entry in own}) == len(wanted[b]) == 2
            assert [entry.layers for entry in own] == [entry.layers for entry in wanted[b]]
            assert sink_places.isdisjoint((b, entry.position) for entry in own)
            assert all(ids[b, entry.position] == ORDINARY for entry in own)
    assert not any(seen["same_id"][1])  # X and Y occur once each
    assert any("same_id" in note for note in e.notes)
    assert [r.control for r in e.runs] == ["", "", "random", "recent", "matched"]


def test_nothing_is_scored_at_a_sink_an_edit_or_a_control(sunk: Any) -> None:
    model, tokens, sinks = sunk
    hooks = sl.ablate_sinks(model, sinks.secondary, "zero")
    e = sl.run_experiment(model, tokens, {"zero": hooks}, controls=("random", "matched"), most_scored=40)
    again = sl.run_experiment(model, tokens, {"zero": hooks}, controls=("random", "matched"))
    sink_places = {(s.sequence, s.position) for s in sinks}
    for b in range(18):
        scored = [(~again.metrics["loss"][r, b].isnan()).nonzero().flatten().tolist() for r in range(4)]
        assert scored[0] == scored[1] == scored[2] == scored[3]
        assert sink_places.isdisjoint((b, p) for p in scored[0])
        assert len(scored[0]) == 119 - 2 - 2  # two sinks, two controls' places, no prediction at the end
        few = (~e.metrics["loss"][1, b].isnan()).nonzero().flatten().tolist()
        assert len(few) == 40
        assert set(few) <= set(scored[0])


def test_side_effects_tell_where_attention_went(sunk: Any) -> None:
    model, tokens, sinks = sunk
    e = sl.run_experiment(
        model,
        tokens,
        {
            "renormalize": sl.ablate_sinks(model, sinks.secondary),
            "ordinary": sl.ablate_sinks(model, sinks.secondary, to="ordinary"),
            "zero": sl.ablate_sinks(model, sinks.secondary, "zero"),
            "more": sl.ablate_sinks(model, sinks.secondary, "scale", g=3.0),
        },
        controls=(),
    )
    side = e.side_effects().set_index("label")
    assert side.freed["renormalize"] == pytest.approx(side.freed["zero"], rel=1e-2)
    assert side.to_nothing["zero"] == pytest.approx(side.freed["zero"], rel=1e-2)
    assert side.to_other_sinks["renormalize"] > side.to_ordinary["renormalize"]
    assert side.to_other_sinks["ordinary"] == 0
    assert side.to_ordinary["ordinary"] == pytest.approx(side.freed["ordinary"], rel=1e-2)
    assert side.lost_sinks["renormalize"] == 1
    assert side.to_edited["more"] == pytest.approx(side.freed["more"], rel=1e-2)
    assert side.to_other_sinks["more"] < 1e-6
    assert side.freed["base"] == 0
    assert side.entropy["renormalize"] != side.entropy["base"]


def test_intervals_come_with_sixteen_documents(sunk: Any) -> None:
    model, tokens, sinks = sunk
    e = sl.run_experiment(model, tokens, {"primary": sl.ablate_sinks(model, sinks.primary)}, controls=("random",))
    table = e.to_dataframe()
    assert table.kl_low[1] <= table.kl[1] <= table.kl_high[1]
    assert table.beyond_low.notna()[2]


def test_recent_takes_the_latest_ordinary_tokens_of_every_query() -> None:
    from batches import planted_map
    from editing import patterns

    from sinklens.experiment.controls import control_places, slots

    _, model = build_pair("llama")
    rows = random_rows((12,))
    sinks = planted_map(model, rows, {(0, 0): ("primary", range(2)), (0, 5): ("secondary", range(2))})
    hooks = sl.ablate_sinks(model, sinks, "zero")
    assert hooks.places is not None
    places, _ = control_places("recent", [slots(hooks.places, sinks.tokens, 0)], [], sinks.tokens, sinks, 0)
    found = patterns(model, rows[0][None], hooks.rebuilt(places))[0][0]
    plain = patterns(model, rows[0][None], [])[0][0]
    for i in range(12):
        n = sum(p <= i for p in (0, 5))
        recent = [k for k in range(i - 1, -1, -1) if k not in (0, 5)][:n]
        for k in range(i + 1):
            if k in recent:
                assert found[:, i, k].max() == 0
            else:
                assert torch.equal(found[:, i, k], plain[:, i, k])


def test_resuming_gives_the_same_and_runs_nothing_twice(model: Any, tmp_path: Path) -> None:
    ids = texts()
    calls: list[int] = []

    def counted(tensor: Tensor, hook: Any) -> None:
        calls.append(1)

    def go(seed: int = 0) -> sl.experiment.Experiment:
        hooks = [*sl.ablate_sinks(model, [0]), ("blocks.0.hook_in", counted)]
        return sl.run_experiment(model, ids, {"mine": hooks}, controls=(), resume=tmp_path / "run", seed=seed)

    def stop_at_the_second(tensor: Tensor, hook: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hooks = [*sl.ablate_sinks(model, [0]), ("blocks.0.hook_in", stop_at_the_second)]
    with pytest.raises(KeyboardInterrupt):
        sl.run_experiment(model, ids, {"mine": hooks}, controls=(), resume=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 1
    calls.clear()
    resumed = go()
    assert len(calls) == 2
    whole = sl.run_experiment(model, ids, {"mine": list(sl.ablate_sinks(model, [0]))}, controls=())
    assert torch.equal(resumed.metrics["kl"].nan_to_num(), whole.metrics["kl"].nan_to_num())
    assert resumed.side == whole.side
    with pytest.raises(sl.BadInputError, match="another experiment"):
        go(seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(sl.BadInputError, match="no empty folder"):
        sl.run_experiment(model, ids, {"mine": hooks}, controls=(), resume=tmp_path / "other")


def test_saving_and_loading_keeps_everything(model: Any, tmp_path: Path) -> None:
    e = sl.run_experiment(model, texts(), {"zero": sl.ablate_sinks(model, [0], "zero")}, controls=("random",))
    back = sl.experiment.Experiment.load(e.save(tmp_path / "e.safetensors"))
    assert back.to_dataframe().equals(e.to_dataframe())
    assert back.side_effects().equals(e.side_effects())
    assert back.runs == e.runs
    assert back.notes == e.notes
    assert '"name":"control"' in str(e.plot().to_json())
    assert "zero / random" in repr(e)


def test_own_metrics_own_controls_and_the_twin(model: Any) -> None:
    def surprise(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Tensor:
        return logits.logsumexp(-1)

    mine = list(sl.ablate_sinks(model, [0]))
    e = sl.run_experiment(
        model,
        texts(2),
        {"mine": mine, "ours": sl.ablate_sinks(model, [0], "zero")},
        controls={"mine": {"elsewhere": list(sl.ablate_sinks(model, [9]))}},
        metrics=("loss", surprise),
        twin=True,
    )
    assert ("mine", "elsewhere") in {(r.label, r.control) for r in e.runs}
    assert set(e.metrics) == {"loss", "surprise"}
    table = e.to_dataframe().set_index(["label", "control"])
    assert abs(table.loss[("base", "untrained")] - table.loss[("base", "")]) > 1e-3
    assert abs(table.d_loss[("ours", "untrained")]) < abs(table.d_loss[("ours", "")])
    assert not e.metrics["surprise"][1].isnan().all()

    def bad(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Tensor:
        return logits

    with pytest.raises(sl.BadInputError, match="one value per token"):
        sl.run_experiment(model, texts(1), {"mine": mine}, controls=(), metrics=(bad,))


def test_discovery_and_test_halves_are_apart(model: Any) -> None:
    seen: list[sl.Tokens] = []

    def build(discovery: sl.Tokens) -> sl.ablate.Hooks:
        seen.append(discovery)
        return sl.ablate_sinks(model, [0])

    e = sl.run_experiment(model, texts(6), {"found": build}, controls=(), split=True)
    assert len(seen[0]) == len(e.tokens) == 3
    assert set(seen[0].sources).isdisjoint(e.tokens.sources)
    assert e.discovery == seen[0].sources
    with pytest.raises(sl.BadInputError, match="split=True"):
        sl.run_experiment(model, texts(6), {"found": build}, controls=())


def test_bad_experiments_say_what_to_do(model: Any) -> None:
    ids = texts(2)
    hooks = sl.ablate_sinks(model, [0])
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {}, "no intervention"),
        ({"base": hooks}, {}, "unedited run"),
        ({"x": list(hooks)}, {}, "plain lists"),
        ({"x": hooks}, {"controls": ("middle",)}, "controls must be"),
        ({"x": hooks}, {"controls": {"y": {}}}, "no interventions"),
        ({"x": hooks}, {"metrics": ("accuracy",)}, "metrics must be"),
        ({"x": hooks}, {"metrics": ()}, "must not be empty"),
        ({"x": sl.ablate_sinks(model, [75])}, {}, "out of range"),
    ]
    for interventions, options, message in cases:
        with pytest.raises(sl.BadInputError, match=message):
            sl.run_experiment(model, ids, interventions, **options)
    _, encoder = build_pair("bert")
    with pytest.raises(sl.UnsupportedModelError, match="no next token"):
        sl.run_experiment(encoder, ids, {"x": sl.ablate_residual(encoder, [0], "rescale", g=0.5)})


def test_sequences_that_share_forwards_are_measured_as_if_alone(sunk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, sinks = sunk
    edits = {mode: sl.ablate_sinks(model, sinks, mode) for mode in ("zero", "renormalize")}
    forwards: list[int] = []
    rows = measuring.row_logits

    def counted(model: Any, ids: Tensor, *rest: Any) -> Any:
        forwards.append(len(ids))
        return rows(model, ids, *rest)

    def go() -> sl.experiment.Experiment:
        forwards.clear()
        return sl.run_experiment(model, tokens, edits, controls=("random", "recent"), sinks=sinks)

    monkeypatch.setattr(measuring, "row_logits", counted)
    shared = go()
    assert forwards == [8] * 14 + [2] * 7  # 18 texts of 120 tokens, seven runs
    monkeypatch.setattr(measuring, "MOST_TOKENS", 0)
    alone = go()
    assert forwards == [1] * 18 * 7
    for metric in shared.metrics:
        assert torch.allclose(shared.metrics[metric], alone.metrics[metric], atol=1e-6, equal_nan=True)
    assert len(shared.side) == len(alone.side)
    for one, other in zip(shared.side, alone.side, strict=True):
        assert one == pytest.approx(other, abs=1e-5, nan_ok=True)


def test_what_may_not_share_a_forward_runs_alone(sunk: Any) -> None:
    model, tokens, sinks = sunk
    vocabulary = capabilities(model).vocabulary

    def sizes(edits: dict[str, Any], batch: sl.Tokens = tokens, vocabulary: int = vocabulary) -> list[int]:
        found = sinks if batch is tokens else sl.find_sinks(model, batch)
        plan = Plan(batch, found, edits, (), 0, None, predictions(model))
        return [len(group) for group in measuring.groups(plan, vocabulary)]

    ours = {"zero": sl.ablate_sinks(model, sinks, "zero")}
    assert sizes(ours) == [8, 8, 2]
    assert sizes(ours, vocabulary=64_000_000 // 240) == [2] * 9, "their logits would be too large"
    assert sizes({"plain": list(ours["zero"])}) == [1] * 18
    assert sizes({"X": sl.ablate_sinks(model, lambda ids: ids == X, "zero")}) == [1] * 18
    mask = tokens.mask[:4].clone()
    mask[2, 80:] = False
    mixed = replace(tokens[:4], mask=mask)
    assert sizes({"first": sl.ablate_sinks(model, [0], "zero")}, mixed) == [2, 1, 1]


def test_a_group_that_was_interrupted_gives_the_same_bits(sunk: Any, tmp_path: Path) -> None:
    model, tokens, sinks = sunk
    edits = {"zero": sl.ablate_sinks(model, sinks, "zero")}

    def go(folder: Path) -> sl.experiment.Experiment:
        return sl.run_experiment(model, tokens, edits, controls=("random",), sinks=sinks, resume=folder)

    whole = go(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("sequence-*")}
    assert len(kept) == 18
    for b in (3, 4, 17):
        (tmp_path / f"sequence-{b:05d}.safetensors").unlink()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sequence-*")}
    again = go(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("sequence-*")} == kept
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "written again"
    assert again.side == whole.side
    assert torch.equal(again.metrics["kl"].nan_to_num(), whole.metrics["kl"].nan_to_num())


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_an_edit_that_leaves_no_numbers_is_refused_and_not_taken_for_missing_values(model: Any, factor: float) -> None:
    ids, broken = texts(1, 12), [("blocks.0.hook_out", lambda x, hook: x * factor)]
    for run in (
        lambda: sl.token_loss(model, ids, hooks=broken),
        lambda: sl.run_experiment(model, ids, {"broken": broken}, controls=(), progress=False),
        lambda: sl.measure_mixing(model, ids, hooks=broken, sinks=[0], probes=2, progress=False),
        lambda: sl.mixing.jacobian_norms(model, ids, [(1, 5, 2)], hooks=broken),
    ):
        with pytest.raises(sl.BadInputError, match="NaN or infinite"):
            run()


def test_a_text_that_occurs_twice_gets_its_own_edit_whatever_runs_beside_it(model: Any) -> None:
    ids = torch.stack(random_rows((60,) * 19))
    tokens = as_tokens(model, torch.cat([ids, ids[:1]]))  # the copy runs in another forward than its original
    where = [3] * 19 + [31]
    places = Places(tokens=tokens, entries=tuple(Place(b, p, None, "primary") for b, p in enumerate(where)))
    edit = sl.ablate_sinks(model, places)
    e = sl.run_experiment(model, tokens, {"edit": edit}, controls=(), progress=False)
    losses = sl.token_loss(model, tokens, hooks=edit)
    swept = sl.sweep_ablation(model, tokens, places, progress=False)
    few = tokens[[0, 19]].first(12)
    near = Places(tokens=few, entries=(Place(0, 3, None, "primary"), Place(1, 7, None, "primary")))
    mixed = sl.measure_mixing(model, few, hooks=sl.ablate_sinks(model, near), sinks=[], probes=2, progress=False)
    collapsed = sl.mixing.measure_collapse(
        model, few, conditions={"edit": sl.ablate_sinks(model, near)}, progress=False
    )
    for n, (b, there) in enumerate(((0, 3), (19, 31))):
        one, alone = tokens.ids[b : b + 1], sl.ablate_sinks(model, [there])
        naive = sl.token_loss(model, one, hooks=alone)[0]
        scored = e.metrics["loss"][1, b].isfinite()
        assert not scored[there]
        assert float((e.metrics["loss"][1, b] - naive)[scored].abs().max()) < 1e-4
        assert float((losses[b] - naive).nan_to_num().abs().max()) < 1e-4
        layer = sl.sweep_ablation(model, one, [there], progress=False)
        assert float((swept.metrics["loss"][:, b] - layer.metrics["loss"][:, 0]).abs().max()) < 1e-4
        short, at = few.ids[n : n + 1], sl.ablate_sinks(model, [(3, 7)[n]])
        maps = sl.measure_mixing(model, short, hooks=at, sinks=[], probes=2, progress=False).maps[0]
        torch.testing.assert_close(mixed.maps[n], maps, atol=1e-5, rtol=1e-4)
        states = sl.mixing.measure_collapse(model, short, conditions={"edit": at}, progress=False).values
        torch.testing.assert_close(collapsed.values[:, n], states[:, 0], atol=1e-5, rtol=1e-4)
