"""measure_mixing against loops over a dense Jacobian."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows

import sinklens as sl
from sinklens.mixing.indices import indices
from sinklens.mixing.jacobians import Stream, fitting_chunk, needed_memory
from sinklens.mixing.mixing import _drawn

LENGTH = 7


def naive(stream: Stream, sinks: set[int], causal: bool) -> dict[str, list[float]]:
    """The definitions, as loops."""
    whole: torch.Tensor = torch.autograd.functional.jacobian(stream, stream.start, vectorize=True)
    found: dict[str, list[float]] = {"mix": [], "via_sink": [], "spread": []}
    for layer in range(whole.shape[0]):
        sums: dict[str, list[float]] = {name: [] for name in found}
        for i in range(1, LENGTH):
            if i in sinks:
                continue
            square = [float(whole[layer, i, :, j].double().square().sum()) for j in range(LENGTH)]
            others = [j for j in range(LENGTH) if j not in sinks and j != i and (j < i or not causal)]
            mixed, through = sum(square[j] for j in others), sum(square[j] for j in sinks)
            sums["mix"].append(mixed / (mixed + square[i]))
            sums["via_sink"].append(through / (through + mixed + square[i]))
            weighed = sum(square[j] * float(stream.start[j].double().square().sum()) for j in others)
            sums["spread"].append(math.sqrt(weighed) / float(stream.outputs[layer, i].double().norm()))
        for name in found:
            found[name].append(sum(sums[name]) / len(sums[name]))
    return found


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert"])
def test_indices_are_those_of_the_dense_jacobian(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH, LENGTH)))
    edited = sl.ablate_sinks(model, [0, 3])
    found = sl.compare_mixing(model, ids, {"without": edited}, sinks=[0, 3], exact=True, progress=False)
    assert list(found.conditions) == ["base", "without"]
    for label, hooks in (("base", []), ("without", edited)):
        for b in range(2):
            expected = naive(Stream(model, ids[b : b + 1], hooks), {0, 3}, sl.models.capabilities(model).causal)
            for index, values in expected.items():
                assert getattr(found[label], index)[b].tolist() == pytest.approx(values, rel=1e-4), (index, label, b)
    assert not torch.allclose(found["base"].mix, found["without"].mix)
    alone = sl.measure_mixing(model, ids, sinks=[0, 3], hooks=edited, exact=True, progress=False)
    assert torch.equal(alone.mix, found["without"].mix)


def test_probes_estimate_what_is_exact_and_are_paired() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    exact = sl.measure_mixing(model, ids, exact=True, progress=False)
    many = sl.measure_mixing(model, ids, probes=400, chunk=200, progress=False)
    for name in ("mix", "via_sink", "spread"):
        assert torch.allclose(getattr(many, name), getattr(exact, name), rtol=0.1), name
    low, high = many.interval(0)
    inside = ((low <= exact.maps[0]) & (exact.maps[0] <= high))[:, torch.ones(LENGTH, LENGTH).tril().bool()]
    assert 0.85 <= float(inside.float().mean()) <= 1.0
    assert float((high - low).max()) > 0
    assert torch.equal(exact.interval(0)[0], exact.maps[0])
    paired = sl.compare_mixing(model, ids, {"nothing": []}, probes=2, progress=False)  # an edit that does nothing
    assert torch.equal(paired["base"].mix, paired["nothing"].mix)
    again = sl.measure_mixing(model, ids, probes=2, progress=False)
    assert torch.equal(paired["base"].mix, again.mix)
    other = sl.measure_mixing(model, ids, probes=2, seed=1, progress=False)
    assert not torch.equal(again.mix, other.mix)


def test_only_the_columns_of_sinks_may_be_exact() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    whole, some, probed = (
        sl.measure_mixing(model, ids, sinks=[0, 3], exact=exact, probes=3, progress=False)
        for exact in (True, "sinks", False)
    )
    assert torch.allclose(some.maps[0][..., [0, 3]], whole.maps[0][..., [0, 3]])
    assert torch.equal(some.maps[0][..., [1, 2, 4, 5, 6]], probed.maps[0][..., [1, 2, 4, 5, 6]])
    assert float(some.errors[0][..., [0, 3]].abs().max()) == 0.0
    assert float(some.errors[0][..., 1].max()) > 0


def test_the_reverse_route_gives_the_same_map() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((LENGTH,)))
    exact = sl.measure_mixing(model, ids, exact=True, progress=False)
    back = sl.measure_mixing(model, ids, probes=300, route="reverse", progress=False)
    assert torch.allclose(back.mix, exact.mix, rtol=0.1)
    assert torch.allclose(back.via_sink, exact.via_sink, rtol=0.1)
    assert "reverse mode" in back.info["definition"]


@pytest.mark.parametrize("name", ["gpt-oss", "bloom", "mixtral"])
def test_hosts_without_forward_mode_take_the_reverse_route_and_say_so(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    with pytest.warns(sl.SinklensWarning, match="reverse"):
        found = sl.measure_mixing(model, ids, probes=2, progress=False)
    assert "reverse mode" in found.info["definition"]
    assert bool(found.mix.isfinite().all())
    stream = Stream(model, ids)
    eps, j = 1e-2, 2
    start = torch.eye(stream.start.shape[1])
    total = 0.0
    for v in start:
        moved = torch.zeros_like(stream.start)
        moved[j] = eps * v
        with torch.no_grad():
            total += float(
                ((stream(stream.start + moved) - stream(stream.start - moved))[1, 5] / (2 * eps)).square().sum()
            )
    many = sl.measure_mixing(model, ids, probes=200, route="reverse", progress=False)
    assert float(many.maps[0][1, 5, j]) == pytest.approx(total, rel=0.25)
    with pytest.raises(sl.UnsupportedModelError, match="forward-mode"):
        sl.measure_mixing(model, ids, probes=2, route="forward", progress=False)


def test_sinks_are_found_where_none_are_given() -> None:
    _, model = build_pair("llama")
    short = sl.measure_mixing(model, torch.stack(random_rows((LENGTH,))), probes=2, progress=False)
    assert short.sinks == ((0,),)
    assert "find_sinks" in short.info["S"]
    ids = torch.stack(random_rows((60,)))
    known = sl.find_sinks(model, ids)
    found = sl.measure_mixing(model, ids, probes=2, most=8, progress=False)
    assert found.sinks == (tuple(known.positions(0)),)
    _, encoder = build_pair("bert")
    some = sl.measure_mixing(encoder, torch.stack(random_rows((LENGTH,))), probes=2, progress=False)
    special = sl.Tokens.trim(some.tokens).special[0].nonzero().flatten().tolist()
    assert list(some.sinks[0]) == special


def test_a_sample_of_tokens_is_scaled_to_the_whole() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((30,)))
    whole = sl.measure_mixing(model, ids, sinks=[0], exact=True, progress=False)
    some = sl.measure_mixing(model, ids, sinks=[0], exact=True, most=18, progress=False)
    assert len(some.positions[0]) == 19
    assert {0, 29} <= set(some.positions[0])
    assert torch.allclose(some.mix, whole.mix, rtol=0.15)
    assert torch.allclose(some.spread, whole.spread, rtol=0.15)
    draw = torch.Generator().manual_seed(0)
    assert _drawn(10, (0,), 128, draw) == tuple(range(10))
    stream = Stream(model, ids)
    table = whole.maps[0].double()
    assert float(indices(table, range(30), [0], stream.start, stream.outputs, causal=True)["mix"][-1]) == pytest.approx(
        float(whole.mix[0, -1]), rel=1e-5
    )
    missing = torch.tensor([p for p in range(30) if p not in some.positions[0]])
    assert bool(some.squared_norms[0][:, missing].isnan().all())
    assert bool(some.squared_norms[0][:, :, missing].isnan().all())
    i, j = some.positions[0][-1], some.positions[0][3]
    assert float(some.squared_norms[0, 1, i, j]) == float(some.maps[0][1, -1, 3])


def test_tables_figures_and_files(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,) * 16))
    edits = {"without": sl.ablate_sinks(model, [0])}
    found = sl.compare_mixing(model, ids, edits, probes=2, progress=False)
    table = found.to_dataframe()
    rows = table.to_dict("records")
    row = next(r for r in rows if (r["condition"], r["index"], r["layer"]) == ("without", "mix", 1))
    base, zero = (found[label].mix[:, 1].double() for label in ("base", "without"))
    assert row["low"] < row["mean"] < row["high"]
    assert row["log_ratio"] == pytest.approx(float((zero / base).log().mean()), rel=1e-5)
    assert row["log_ratio_low"] < row["log_ratio"] < row["log_ratio_high"]
    assert row["difference"] == pytest.approx(float((zero - base).mean()), rel=1e-4)
    gone = next(r for r in rows if (r["condition"], r["index"]) == ("without", "via_sink"))
    assert gone["mean"] == 0.0
    assert math.isnan(gone["log_ratio"])
    assert gone["difference"] == pytest.approx(-float(found["base"].via_sink[:, 0].double().mean()), rel=1e-5)
    again = sl.mixing.MixingComparison.load(found.save(tmp_path / "mixing.safetensors"))
    assert again.to_dataframe().equals(table)
    assert repr(again) == repr(found)
    assert again.plot().to_json() == found.plot().to_json()
    one = found["without"]
    alone = sl.mixing.Mixing.load(one.save(tmp_path / "one.safetensors"))
    assert alone.to_dataframe().equals(one.to_dataframe())
    assert torch.equal(alone.interval(3)[1], one.interval(3)[1])
    assert alone.plot_map(2).to_json() == one.plot_map(2).to_json()
    with pytest.raises(sl.BadInputError, match="holds a Mixing,"):
        sl.mixing.MixingComparison.load(tmp_path / "one.safetensors")
    share = found.influence(2)
    assert share[share.condition == "base"].share.sum() == pytest.approx(1)
    near = found.distances()
    assert near.n.sum() == 2 * 16 * (LENGTH - 2) * (LENGTH - 1) // 2
    last = found["base"].distances(1).to_dict("records")[0]
    steps = [float(m[1, i, i - 1]) for m in found["base"].maps for i in range(2, LENGTH)]
    assert last["mean"] == pytest.approx(sum(steps) / len(steps))
    for wrong in (lambda: one.influence(99), lambda: one.distances(9), lambda: found["other"]):
        with pytest.raises(sl.BadInputError, match=r"out of range|no condition"):
            wrong()


def test_bad_requests_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    with pytest.raises(sl.BadInputError, match="taken"):
        sl.compare_mixing(model, ids, {"base": []})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sinks": [40]}, "out of range"),
        ({"sinks": list(range(LENGTH - 1))}, "fewer than two"),
        ({"probes": 1}, "at least 2"),
        ({"route": "sideways"}, "route must be"),
        ({"exact": "some"}, "exact must be"),
        ({"exact": True, "route": "reverse"}, "forward mode"),
        ({"most": 1}, "at least 2"),
        ({"chunk": 0}, "chunk must be 1"),
    ]
    for options, match in wrong:
        with pytest.raises(sl.BadInputError, match=match):
            sl.measure_mixing(model, ids, progress=False, **options)
    monkeypatch.setattr("sinklens.mixing.jacobians._free_memory", lambda device: 1000)
    with pytest.raises(sl.BadInputError, match=r"need about .* GB, and .* GB are free: take shorter"):
        sl.measure_mixing(model, ids, progress=False)
    stream = Stream(model, ids)
    monkeypatch.setattr("sinklens.mixing.jacobians._free_memory", lambda device: 5 * needed_memory(stream, 1))
    assert fitting_chunk(stream) == 2
    with pytest.raises(sl.BadInputError, match="smaller chunk"):
        sl.measure_mixing(model, ids, chunk=8, progress=False)


def test_lengths_are_comparisons_of_prefixes() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((9, 9)))
    edits = {"without": sl.ablate_sinks(model, [0])}
    table = sl.mixing.mixing_by_length(model, ids, [5, 9], edits, sinks=[0], probes=2, progress=False)
    for n in (5, 9):
        alone = sl.compare_mixing(model, ids[:, :n], edits, sinks=[0], probes=2, progress=False)
        expected = alone.to_dataframe([-1])
        mine = table[table.tokens == n].drop(columns="tokens").reset_index(drop=True)
        assert mine.equals(expected)
    found = sl.find_sinks(model, torch.stack(random_rows((60,))), activity=0.0, uniform_factor=1.0)
    cut = sl.mixing.mixing_by_length(model, found.tokens, [6], sinks=found, probes=2, progress=False)
    own = sl.measure_mixing(model, found.tokens.first(6), sinks=found.cut([0], 6), probes=2, progress=False)
    assert cut["mean"].tolist()[0] == pytest.approx(float(own.mix[0, -1]))
    with pytest.raises(sl.BadInputError, match="between 3 and 9"):
        sl.mixing.mixing_by_length(model, ids, [10])


def test_norms_of_pairs_are_those_of_the_dense_blocks() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((LENGTH,)))
    hooks = sl.ablate_sinks(model, [0])
    stream = Stream(model, ids, hooks)
    whole: torch.Tensor = torch.autograd.functional.jacobian(stream, stream.start, vectorize=True)
    table = sl.mixing.jacobian_norms(model, ids, [(0, 4, 2), (1, 6, 6)], hooks=hooks, progress=False).to_dict("records")
    for row in table:
        block = whole[row["layer"], row["row"], :, row["column"]].double()
        assert row["frobenius"] == pytest.approx(float(block.norm()), rel=1e-4)
        top = float(torch.linalg.matrix_norm(block, 2))
        assert row["spectral"] == pytest.approx(top, rel=1e-2)
        assert row["stable_rank"] == pytest.approx((float(block.norm()) / top) ** 2, rel=3e-2)
    for wrong in ([], [(2, 0, 0)], [(0, 7, 0)]):
        with pytest.raises(sl.BadInputError, match="pairs are"):
            sl.mixing.jacobian_norms(model, ids, wrong)
    with pytest.raises(sl.BadInputError, match="one sequence"):
        sl.mixing.jacobian_norms(model, torch.stack(random_rows((5, 5))), [(0, 1, 0)])


def test_an_untrained_twin_stands_beside_as_a_floor() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    found = sl.compare_mixing(model, ids, {}, sinks=[0], probes=2, twin=True, progress=False)
    assert list(found.conditions) == ["base", "untrained twin"]
    assert found["untrained twin"].sinks == found["base"].sinks
    assert not torch.equal(found["untrained twin"].mix, found["base"].mix)
