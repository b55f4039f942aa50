"""perturbation_spread against sequences that are really another, run alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SCORED, build_pair, random_rows
from batches import planted_map
from torch import Tensor

import sinklens as sl
from sinklens.inputs.load import as_tokens
from sinklens.mixing.perturbation import perturbation_spread, swap_changes
from sinklens.mixing.perturbation_result import Perturbation, Swap

LENGTH = 9
SINKS = (0, 3)


def outputs(model: Any, ids: Tensor, hooks: Any = ()) -> list[Tensor]:
    """Block outputs of one sequence."""
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        kept.append(x[0].detach().double())

    names = [f"blocks.{n}.hook_out" for n in range(model.cfg.n_layers)]
    model.run_with_hooks(ids[None], fwd_hooks=[*hooks, *((name, keep) for name in names)])
    return kept


def swapped(ids: Tensor, position: int, token: int) -> Tensor:
    return torch.tensor([token if i == position else int(old) for i, old in enumerate(ids)])


def naive(
    model: Any, ids: Tensor, hooks: Any, position: int, token: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Absolute and relative changes by layer and token, as loops over two separate runs."""
    before, after = outputs(model, ids, hooks), outputs(model, swapped(ids, position, token), hooks)
    absolute = [[float((y[i] - x[i]).norm()) for i in range(len(ids))] for x, y in zip(before, after, strict=True)]
    relative = [[a / float(x[i].norm()) for i, a in enumerate(row)] for x, row in zip(before, absolute, strict=True)]
    return absolute, relative


def other_id(ids: Tensor, position: int) -> int:
    return 5 if int(ids[position]) != 5 else 6


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert"])
def test_changes_are_those_of_two_separate_runs(name: str) -> None:
    _, model = build_pair(name)
    causal = sl.models.capabilities(model).causal
    rows = random_rows((LENGTH, 7))
    tokens = sl.Tokens.concatenate([as_tokens(model, row) for row in rows])
    swaps = [(0, 2, other_id(rows[0], 2)), (1, 5, other_id(rows[1], 5)), (0, 6, other_id(rows[0], 6))]
    edit = sl.ablate_sinks(model, list(SINKS))
    found = perturbation_spread(model, tokens, {"without": edit}, sinks=SINKS, swaps=swaps, progress=False)
    assert found.labels == ("base", "without")
    assert found.swaps == tuple((b, p, int(rows[b][p]), new) for b, p, new in swaps)
    for c, hooks in enumerate(([], edit)):
        for n, (b, p, new) in enumerate(swaps):
            absolute, relative = naive(model, rows[b], hooks, p, new)
            for layer in range(model.cfg.n_layers):
                for i in range(LENGTH):
                    measured = i < len(rows[b]) and (i >= p or not causal)
                    pair = [float(t[c, n, layer, i]) for t in (found.absolute, found.relative)]
                    if measured:
                        expected = [absolute[layer][i], relative[layer][i]]
                        assert pair == pytest.approx(expected, rel=1e-4, abs=1e-5), (c, n, layer, i)
                    else:
                        assert all(math.isnan(x) for x in pair), (c, n, layer, i)
                others = [i for i in range(len(rows[b])) if i not in SINKS and (i > p if causal else i != p)]
                expected = sum(relative[layer][i] for i in others) / len(others)
                assert float(found.by_swap(found.relative)[c, n, layer]) == pytest.approx(expected, rel=1e-4)
    assert not torch.allclose(found.by_swap(found.relative)[0], found.by_swap(found.relative)[1], rtol=0.01)


@pytest.mark.parametrize("name", [n for n in SCORED if n != "bert"])
def test_a_swap_leaves_earlier_tokens_exactly_as_they_are(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    swaps: list[Swap] = [(0, p, int(ids[0, p]), other_id(ids[0], p)) for p in (2, 4, 7)]
    for hooks in ([], sl.ablate_sinks(model, [0])):
        changes, norms = swap_changes(model, ids, hooks, swaps)
        for n, (_, p, _, _) in enumerate(swaps):
            assert (changes[n, :, :p] == 0).all()
            assert (changes[n, :, p:] > 1e-3 * norms[:, p:].min()).all()


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert"])
def test_a_sink_maps_edit_acts_where_and_when_its_sinks_live(name: str) -> None:
    _, model = build_pair(name)
    rows = random_rows((LENGTH, 8))
    lives = {(0, 0): range(2), (1, 0): range(1, 2), (1, 3): range(1, 2)}
    found = planted_map(model, rows, {place: ("primary", layers) for place, layers in lives.items()})
    edit = sl.ablate_sinks(model, found)
    swaps = [(0, 4, other_id(rows[0], 4)), (1, 4, other_id(rows[1], 4))]
    result = perturbation_spread(model, found.tokens, {"map": edit}, sinks=found, swaps=swaps, progress=False)
    assert result.sinks == ((0,), (0, 3))
    by_hand = [sl.ablate_sinks(model, [0], layers=[0, 1]), sl.ablate_sinks(model, [0, 3], layers=[1])]
    for n, (b, p, new) in enumerate(swaps):
        expected = torch.tensor(naive(model, rows[b], by_hand[b], p, new)[1])[:, p:]
        assert torch.allclose(result.relative[1, n, :, p : len(rows[b])], expected.float(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(result.relative[0, n, :, p : len(rows[b])], expected.float(), rtol=1e-2)
    elsewhere = perturbation_spread(
        model, found.tokens[1], {"at": edit.at([0, 3])}, sinks=[0, 3], swaps=[(0, *swaps[1][1:])], progress=False
    )  # in all layers of the edit: another one, which is why hooks are not built anew for a swap
    assert not torch.allclose(elsewhere.relative[1, 0, 0, 4:8], result.relative[1, 1, 0, 4:8], rtol=1e-2)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("mean_value", {}), ("fixed_key", {}), ("renormalize", {"to": "ordinary"}), ("move", {"target": 2})],
)
def test_every_edit_of_a_sink_map_is_the_same_before_and_after_a_swap(mode: Any, options: dict[str, Any]) -> None:
    _, model = build_pair("llama")
    rows = random_rows((LENGTH, LENGTH, LENGTH))
    kinds = {0: "primary", 3: "secondary"}
    found = planted_map(model, rows, {(b, p): (kinds[p], range(2)) for b in range(3) for p in SINKS})
    edit = sl.ablate_sinks(model, found.primary, mode, **options)
    row = rows[1]
    changes, _ = swap_changes(model, row[None], edit, [(1, 5, int(row[5]), other_id(row, 5))])
    plain, _ = swap_changes(model, row[None], [], [(1, 5, int(row[5]), other_id(row, 5))])
    assert (changes[0, :, :5].abs() < 1e-5).all()  # kernels of some processors round by what stands beside
    assert not torch.allclose(changes[0, :, 6:], plain[0, :, 6:], rtol=1e-2)


def test_many_swaps_of_a_sequence_are_those_made_one_by_one() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    together = perturbation_spread(model, ids, n_swaps=9, progress=False)  # in two forwards
    for n, (b, p, _, new) in enumerate(together.swaps):
        alone = perturbation_spread(model, ids, swaps=[(b, p, new)], progress=False)
        assert torch.allclose(together.relative[:, n], alone.relative[:, 0], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_an_edit_that_does_nothing_is_base_exactly() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((LENGTH, LENGTH)))
    found = perturbation_spread(model, ids, {"nothing": []}, n_swaps=6, progress=False)
    assert torch.equal(found.absolute[0].nan_to_num(-1), found.absolute[1].nan_to_num(-1))
    rows = [row for row in found.to_dataframe().to_dict("records") if row["condition"] == "nothing"]
    assert {(row["log_ratio"], row["median_ratio"], row["absolute_ratio_95"]) for row in rows} == {(0.0, 1.0, 1.0)}


def test_random_swaps_are_balanced_ordinary_and_reproducible() -> None:
    _, model = build_pair("llama")
    tokens = as_tokens(model, torch.stack(random_rows((12,) * 3)))
    special = tokens.special.clone()
    special[:, 5] = True
    tokens = dataclasses.replace(tokens, special=special)
    found = perturbation_spread(model, tokens, sinks=SINKS, n_swaps=50, progress=False)
    assert sorted(Counter(b for b, _, _, _ in found.swaps).values()) == [16, 17, 17]
    allowed = {p for p in range(1, 11) if p not in (3, 5)}
    pool = {int(tokens.ids[b, p]) for b in range(3) for p in range(12) if p not in (0, 3, 5)}
    for b in range(3):
        places = [p for s, p, _, _ in found.swaps if s == b]
        assert set(places[: len(allowed)]) == allowed  # each once before any twice
    for b, p, old, new in found.swaps:
        assert p in allowed
        assert int(tokens.ids[b, p]) == old != new
        assert new in pool
    assert perturbation_spread(model, tokens, sinks=SINKS, n_swaps=50, progress=False).swaps == found.swaps
    assert perturbation_spread(model, tokens, sinks=SINKS, n_swaps=50, seed=1, progress=False).swaps != found.swaps


def test_tables_figures_and_files(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,) * 16))
    edits = {"zero <b>": sl.ablate_sinks(model, [0], "zero")}
    found = perturbation_spread(model, ids, edits, sinks=[0], n_swaps=40, progress=False)
    table = found.to_dataframe()
    rows = table.to_dict("records")
    assert len(rows) == 2 * 2
    row = next(r for r in rows if (r["condition"], r["layer"]) == ("zero <b>", 1))
    for start, changes in (("", found.relative), ("absolute_", found.absolute)):
        means = []
        for c in range(2):
            later = [(n, range(p + 1, LENGTH)) for n, (_, p, _, _) in enumerate(found.swaps)]
            means.append([sum(float(changes[c, n, 1, i]) for i in at) / len(at) for n, at in later])
        ratios = sorted(b / a for a, b in zip(*means, strict=True))
        assert row[f"{start}mean"] == pytest.approx(sum(means[1]) / 40, rel=1e-5)
        assert row[f"{start}low"] < row[f"{start}mean"] < row[f"{start}high"]
        assert row[f"{start}log_ratio"] == pytest.approx(sum(map(math.log, ratios)) / 40, rel=1e-4)
        assert row[f"{start}log_ratio_low"] < row[f"{start}log_ratio"] < row[f"{start}log_ratio_high"]
        assert row[f"{start}median_ratio"] == pytest.approx((ratios[19] + ratios[20]) / 2, rel=1e-4)
        assert ratios[1] <= row[f"{start}ratio_5"] <= ratios[2]
        assert ratios[37] <= row[f"{start}ratio_95"] <= ratios[38]
    assert math.isnan(rows[0]["log_ratio"])
    again = Perturbation.load(found.save(tmp_path / "perturbation.safetensors"))
    assert again.to_dataframe().equals(table)
    assert (repr(again), again.swaps, again.sinks) == (repr(found), found.swaps, found.sinks)
    assert len(again.plot().to_dict()["data"]) == 2 + 1 + 3 * 1  # per panel a line and a band; one ratio
    assert again.plot_swap(3).to_json() == found.plot_swap(3).to_json()
    swap = found.plot_swap(3).to_dict()
    assert [note["text"] for note in swap["layout"]["annotations"]] == ["base", "zero &lt;b&gt;"]
    assert [len(trace["z"][0]) for trace in swap["data"]] == [LENGTH, LENGTH]
    few = perturbation_spread(model, ids[:15], edits, sinks=[0], n_swaps=15, progress=False).to_dataframe()
    assert few.low.isna().all()
    assert few.log_ratio_low.isna().all()
    assert not few["mean"].isna().any()
    gone = dataclasses.replace(found, relative=torch.where(found.relative.isnan(), math.nan, 0.0))
    assert gone.to_dataframe().median_ratio.isna().all()  # no effect: no ratio
    base = perturbation_spread(model, ids[:2], n_swaps=2, progress=False)
    assert len(base.plot().to_dict()["data"]) == 1


def test_a_host_that_embeds_ids_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    monkeypatch.setattr("sinklens.mixing.perturbation.EMBED", "embed.hook_out")  # not where ids are exchanged
    with pytest.raises(sl.UnsupportedModelError, match="not exchanged everywhere"):
        perturbation_spread(model, ids, n_swaps=1, progress=False)


def test_bad_requests_say_what_to_do() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH, LENGTH)))
    batch = as_tokens(model, ids)
    own = int(ids[0, 4])
    marked = dataclasses.replace(batch, special=batch.special | (torch.arange(LENGTH) == 5))
    wrong: list[tuple[Any, str]] = [
        ({"n_swaps": 0}, "at least 1"),
        ({"swaps": []}, "at least one"),
        ({"swaps": [(2, 4, 5)]}, "sequence 2 is out of range"),
        ({"swaps": [(0, 0, 5)]}, "positions 1 to 7"),
        ({"swaps": [(0, 8, 5)]}, "positions 1 to 7"),
        ({"swaps": [(0, 4, 5)], "sinks": [4]}, "is a sink"),
        ({"swaps": [(0, 5, 5)]}, "special token"),
        ({"swaps": [(0, 6, 5)], "sinks": [7, 8]}, "no token after it"),
        ({"swaps": [(0, 4, own)]}, "already"),
        ({"swaps": [(0, 4, 97)]}, "outside the vocabulary"),
        ({"conditions": {"base": []}}, "taken"),
        ({"sinks": [1, 2, 3, 4, 6, 7]}, "too short"),
    ]
    for arguments, match in wrong:
        with pytest.raises(sl.BadInputError, match=match):
            perturbation_spread(model, marked, **arguments, progress=False)
    with pytest.raises(sl.BadInputError, match="too short"):
        perturbation_spread(model, ids[:, :2], sinks=[], progress=False)
    with pytest.raises(sl.BadInputError, match="are the same"):
        perturbation_spread(model, torch.full((1, 5), 7), sinks=[0], progress=False)
    found = perturbation_spread(model, ids, n_swaps=2, progress=False)
    with pytest.raises(sl.BadInputError, match="numbered from 0"):
        found.plot_swap(2)
