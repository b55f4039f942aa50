"""find_sinks recovers what was planted, exactly, on either side of each threshold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import build_pair, random_rows
from batches import left_padded
from planted import X, Y, expected_beta, logit_for, planted_model, row

import sinklens as sl

STRONG = 8.0


def places(sinks: sl.SinkMap) -> list[tuple[int, int, str, str, int, int]]:
    return [(s.sequence, s.position, s.kind, s.reason, s.onset, s.end) for s in sinks]


def test_a_planted_primary_and_an_early_ending_secondary_are_recovered_exactly() -> None:
    model = planted_model(20, {X: STRONG, Y: STRONG}, {X: range(3, 20), Y: range(2, 9)})
    sinks = sl.find_sinks(model, row(120, {0: X, 40: Y}))
    assert places(sinks) == [(0, 0, "primary", "", 3, 19), (0, 40, "secondary", "early_end", 2, 8)]
    primary, secondary = sinks
    assert set(primary.heads) == {(layer, head) for layer in range(9, 20) for head in (0, 1)} | {
        place for place in primary.heads if place[0] < 9
    }
    assert {layer for layer, _ in secondary.heads} == set(range(2, 9))
    assert sinks.strongest == (0,)
    assert secondary.residual_onset == 1
    assert [len(sinks.primary), len(sinks.secondary)] == [1, 1]


def test_the_measured_mass_is_the_planted_one() -> None:
    model = planted_model(10, {X: 5.0}, {X: range(2, 10)})
    sinks = sl.find_sinks(model, row(200, {7: X}))
    assert sinks.sinks[0].mass == pytest.approx(expected_beta(5.0, 200, 7), abs=1e-5)
    one_head = planted_model(10, {X: 5.0}, {X: range(2, 10)}, heads=[1])
    found = sl.find_sinks(one_head, row(200, {7: X})).sinks[0]
    half = (expected_beta(5.0, 200, 7) + expected_beta(0.0, 200, 7)) / 2
    assert found.mass == pytest.approx(half, abs=1e-5)
    assert {head for _, head in found.heads} == {1}


@pytest.mark.parametrize(("length", "floor"), [(400, 0.05), (64, None)])
def test_activity_is_found_just_above_its_floor_and_not_just_below(length: int, floor: float | None) -> None:
    """At 400 tokens the floor 0.05 rules, at 64 three times the uniform share does."""
    threshold = floor or 3 * sum(1 / (i + 1) for i in range(16, length)) / (length - 16)
    assert threshold >= 0.05
    for factor, found in ((1.01, True), (0.99, False)):
        model = planted_model(10, {X: logit_for(factor * threshold, length, 0)}, {X: range(10)})
        assert (len(sl.find_sinks(model, row(length, {0: X}))) == 1) == found


def test_a_head_uses_the_sink_just_above_its_threshold() -> None:
    for beta, uses in ((0.303, True), (0.297, False)):
        model = planted_model(10, {X: logit_for(beta, 200, 0)}, {X: range(10)}, heads=[0])
        heads = sl.find_sinks(model, row(200, {0: X})).sinks[0].heads
        assert heads == (tuple((layer, 0) for layer in range(10)) if uses else ())


def test_a_gap_of_two_layers_is_bridged_and_of_three_splits_the_life() -> None:
    bridged = planted_model(20, {X: STRONG}, {X: [*range(2, 8), *range(10, 20)]})
    found = sl.find_sinks(bridged, row(120, {0: X})).sinks[0]
    assert (found.onset, found.end, found.bridged, len(found.episodes)) == (2, 19, 2, 1)
    split = planted_model(20, {X: STRONG}, {X: [*range(2, 8), *range(11, 20)]})
    found = sl.find_sinks(split, row(120, {0: X})).sinks[0]
    assert [episode[:2] for episode in found.episodes] == [(2, 7), (11, 19)]
    assert (found.onset, found.end) == (11, 19)


def test_a_strong_sink_that_ends_early_is_no_primary() -> None:
    model = planted_model(20, {X: STRONG}, {X: range(2, 15)})
    assert places(sl.find_sinks(model, row(120, {0: X}))) == [(0, 0, "secondary", "no_primary", 2, 14)]
    lasting = planted_model(20, {X: STRONG}, {X: range(2, 16)})
    assert places(sl.find_sinks(lasting, row(120, {0: X}))) == [(0, 0, "primary", "", 2, 15)]


def test_a_weak_lasting_sink_is_no_primary() -> None:
    for mass, kind in ((0.101, "primary"), (0.099, "secondary")):
        model = planted_model(20, {X: logit_for(mass, 300, 0)}, {X: range(20)})
        assert sl.find_sinks(model, row(300, {0: X})).sinks[0].kind == kind


@pytest.mark.parametrize("n_layers", [2, 5, 60])
def test_shallow_and_deep_models(n_layers: int) -> None:
    model = planted_model(n_layers, {X: STRONG}, {X: range(n_layers)})
    sinks = sl.find_sinks(model, row(100, {0: X}))
    kind = "primary" if n_layers == 60 else "undetermined"
    assert [(s.kind, s.onset, s.end) for s in sinks] == [(kind, 0, n_layers - 1)]
    assert sinks.strongest == (0,), "P is named also where kinds are not"


def test_several_primaries_one_in_the_middle_of_a_packed_sequence() -> None:
    model = planted_model(12, {X: STRONG}, {X: range(2, 12)})
    sinks = sl.find_sinks(model, row(160, {0: X, 80: X}))
    assert places(sinks) == [(0, 0, "primary", "", 2, 11), (0, 80, "primary", "", 2, 11)]


def test_no_sink_at_all_is_an_empty_map() -> None:
    sinks = sl.find_sinks(planted_model(8, {}, {}), row(100, {}))
    assert len(sinks) == 0
    assert sinks.strongest == (None,)
    assert sinks.levels().empty
    assert list(sinks.to_dataframe().columns)[:3] == ["sequence", "position", "token"]
    with pytest.raises(sl.BadInputError, match="no sinks to draw"):
        sinks.plot()


def test_padding_changes_nothing() -> None:
    model = planted_model(12, {X: STRONG, Y: STRONG}, {X: range(2, 12), Y: range(2, 6)})
    parts = [sl.sink_scores(model, row(n, {0: X, 30: Y})).tokens for n in (100, 140)]
    right = sl.Tokens.concatenate(parts)
    left = left_padded(right)
    assert left.starts.tolist() == [40, 0]
    assert places(sl.find_sinks(model, left)) == places(sl.find_sinks(model, right))
    assert len(sl.find_sinks(model, left)) == 4


def test_too_few_queries_are_nan_with_a_warning_and_never_zero() -> None:
    model = planted_model(8, {X: STRONG}, {X: range(8)})
    with pytest.warns(sl.SinklensWarning, match=r"too few queries in sequence 0 \(47 tokens\)"):
        sinks = sl.find_sinks(model, row(47, {0: X}))
    assert len(sinks) == 0
    assert sinks.mass.isnan().all()
    assert "too few queries" in sinks.notes[0]
    assert len(sl.find_sinks(model, row(48, {0: X}))) == 1


def test_filters() -> None:
    model = planted_model(20, {X: STRONG, Y: STRONG}, {X: range(3, 20), Y: range(2, 9)})
    sinks = sl.find_sinks(model, torch.stack([row(120, {0: X, 40: Y}), row(120, {10: X})]))
    assert [s.position for s in sinks.where(layer=2)] == [40]
    assert [s.position for s in sinks.where(token=str(X))] == [0, 10]
    assert sinks.positions(1) == [10]
    assert [s.kind for s in sinks.where(kind="secondary", sequence=0)] == ["secondary"]
    with pytest.raises(sl.BadInputError, match="layer 20 is out of range"):
        sinks.where(layer=20)
    with pytest.raises(sl.BadInputError, match="sequence 2 is out of range"):
        sinks.where(sequence=2)


def test_levels_count_onsets_and_lifetimes() -> None:
    model = planted_model(20, {X: STRONG, Y: STRONG}, {X: range(3, 20), Y: range(2, 9)})
    levels = sl.find_sinks(model, torch.stack([row(120, {0: X, 40: Y}), row(120, {0: X, 50: Y})])).levels()
    assert levels[["onset", "lifetime", "kind", "count"]].to_numpy().tolist() == [
        [2, 7, "secondary", 2],
        [3, 17, "primary", 2],
    ]


def test_the_sweep_is_find_sinks_at_each_value() -> None:
    model = planted_model(12, {X: STRONG, Y: 3.0}, {X: range(2, 12), Y: range(2)})
    ids = row(200, {0: X, 40: Y})
    sinks = sl.find_sinks(model, ids)
    for name, values in (("activity", (0.01, 0.05, 0.5)), ("gap", (0, 3)), ("uniform_factor", (0.5, 30.0))):
        table = sinks.sweep(name, values)
        for value, count in zip(values, table.sinks, strict=True):
            options: dict[str, Any] = {name: value}
            assert len(sl.find_sinks(model, ids, **options)) == count
    assert sinks.sweep("activity", (0.05, 0.5)).sinks.tolist() == [2, 1]
    with pytest.raises(sl.BadInputError, match="no threshold 'volume'"):
        sinks.sweep("volume")


def test_a_map_survives_saving(tmp_path: Path) -> None:
    model = planted_model(12, {X: STRONG}, {X: range(2, 12)})
    sinks = sl.find_sinks(model, row(120, {0: X}))
    loaded = sl.SinkMap.load(sinks.save(tmp_path / "sinks"))
    assert loaded.sinks[0].heads == sinks.sinks[0].heads
    assert loaded.to_dataframe().equals(sinks.to_dataframe())
    assert loaded.thresholds == sinks.thresholds
    assert loaded.sweep().equals(sinks.sweep())


def test_scores_at_hand_are_used_and_must_fit() -> None:
    model = planted_model(12, {X: STRONG}, {X: range(2, 12)})
    ids = row(120, {0: X})
    scores = sl.sink_scores(model, ids)
    assert places(sl.find_sinks(model, ids, scores=scores)) == places(sl.find_sinks(model, ids))
    with pytest.raises(sl.BadInputError, match="belong to other tokens"):
        sl.find_sinks(model, row(120, {1: X}), scores=scores)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(sl.BadInputError, match="method must be one of attention, direction, wong"):
        sl.find_sinks(planted_model(2, {}, {}), row(60, {}), method=cast(Any, "norm"))


@pytest.mark.parametrize("name", ["bert", "gemma3", "gpt-oss", "opt"])
def test_every_kind_of_attention_is_accepted(name: str) -> None:
    _, model = build_pair(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        sinks = sl.find_sinks(model, random_rows((90,))[0], activity=0.0, uniform_factor=1.0)
        assert len(sinks) > 0
        for method in ("direction", "wong"):
            assert sl.find_sinks(model, random_rows((90,))[0], method=method).method == method


def test_a_filtered_map_remembers_all_sinks(tmp_path: Path) -> None:
    model = planted_model(20, {X: STRONG, Y: STRONG}, {X: range(3, 20), Y: range(2, 9)})
    sinks = sl.find_sinks(model, row(120, {0: X, 40: Y}))
    assert sinks.primary.places == ((0, 0), (0, 40))
    assert sl.SinkMap.load(sinks.primary.save(tmp_path / "map")).places == ((0, 0), (0, 40))


def test_scores_of_another_model_are_refused() -> None:
    ids = row(120, {0: X})
    scores = sl.sink_scores(planted_model(12, {X: STRONG}, {X: range(2, 12)}), ids)
    with pytest.raises(sl.BadInputError, match="belong to another model"):
        sl.find_sinks(planted_model(10, {}, {}), ids, scores=scores)


def test_the_direction_method_cannot_tell_kinds_where_attention_is_unknown() -> None:
    model = planted_model(10, {X: STRONG}, {X: range(10)})

    def massive(residual, hook):
        residual = residual.clone()
        residual[:, 0] *= 100
        return residual

    hooks = [(f"blocks.{layer}.hook_in", massive) for layer in range(10)]
    with model.hooks(fwd_hooks=hooks), pytest.warns(sl.SinklensWarning, match="too few queries"):
        sinks = sl.find_sinks(model, row(30, {0: X}), method="direction")
    assert [(s.position, s.kind, s.reason, s.attended) for s in sinks] == [(0, "undetermined", "too_few_queries", None)]


def test_a_map_may_be_cut_to_the_beginnings_of_some_sequences() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((60, 60, 60)))
    found = sl.find_sinks(model, ids, activity=0.0, uniform_factor=1.0)
    assert len(found.where(sequence=2)) > 1
    cut = found.cut([2, 0], 10)
    assert cut.tokens.ids.tolist() == ids[[2, 0], :10].tolist()
    for n, b in enumerate((2, 0)):
        assert cut.positions(n) == [p for p in found.positions(b) if p < 10]
        assert cut.strongest[n] in (None, found.strongest[b])
    assert set(cut.places or ()) == {(s.sequence, s.position) for s in cut}
    hooks = sl.ablate_sinks(model, cut)
    named = sl.ablate_sinks(model, found)
    short, whole = (
        model.run_with_hooks(i, fwd_hooks=h)[0, :10] for i, h in ((ids[2:3, :10], hooks), (ids[2:3], named))
    )
    late = [s.position for s in found.where(sequence=2) if s.position >= 10]
    assert late
    assert torch.allclose(short, whole, atol=1e-4)  # later sinks cannot reach back
    with pytest.raises(sl.BadInputError, match="out of range"):
        found.cut([3], 10)


@pytest.mark.parametrize("activity", [1.5, 1e300])
def test_a_threshold_that_nothing_reaches_finds_nothing(activity: float) -> None:
    model = planted_model(10, {X: STRONG}, {X: range(10)})
    assert len(sl.find_sinks(model, row(60, {0: X}), activity=activity)) == 0
