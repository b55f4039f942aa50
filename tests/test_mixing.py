"""measure_mixing against loops over a dense Jacobian."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from architectures import build_pair, random_rows

import sinklens as sl
from sinklens.jacobians import Stream
from sinklens.mixing import _drawn, indices

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
    found = sl.measure_mixing(model, ids, {"without": edited}, sinks=[0, 3], exact=True, progress=False)
    assert found.labels == ("base", "without")
    for c, hooks in enumerate(([], edited)):
        for b in range(2):
            expected = naive(Stream(model, ids[b : b + 1], hooks), {0, 3}, sl.capabilities(model).causal)
            for index, values in expected.items():
                assert getattr(found, index)[c, b].tolist() == pytest.approx(values, rel=1e-4), (index, c, b)
    assert not torch.allclose(found.mix[0], found.mix[1])


def test_probes_estimate_what_is_exact_and_are_paired() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    exact = sl.measure_mixing(model, ids, exact=True, progress=False)
    many = sl.measure_mixing(model, ids, n_probes=400, chunk=200, progress=False)
    for name in ("mix", "via_sink", "spread"):
        assert torch.allclose(getattr(many, name), getattr(exact, name), rtol=0.1), name
    paired = sl.measure_mixing(model, ids, [], n_probes=2, progress=False)  # an edit that does nothing
    assert torch.equal(paired.mix[0], paired.mix[1])
    again = sl.measure_mixing(model, ids, n_probes=2, progress=False)
    assert torch.equal(paired.mix[0], again.mix[0])
    other = sl.measure_mixing(model, ids, n_probes=2, seed=1, progress=False)
    assert not torch.equal(again.mix, other.mix)


def test_a_sample_of_tokens_is_scaled_to_the_whole() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((30,)))
    whole = sl.measure_mixing(model, ids, exact=True, progress=False)
    some = sl.measure_mixing(model, ids, exact=True, most_columns=18, progress=False)
    assert len(some.positions[0]) == 19
    assert {0, 29} <= set(some.positions[0])
    assert torch.allclose(some.mix, whole.mix, rtol=0.15)
    assert torch.allclose(some.spread, whole.spread, rtol=0.15)
    draw = torch.Generator().manual_seed(0)
    assert _drawn(10, (0,), 128, draw) == tuple(range(10))
    stream = Stream(model, ids)
    table = whole.maps[0, 0].double()
    assert float(indices(stream, table, range(30), [0], causal=True)["mix"][-1]) == pytest.approx(
        float(whole.mix[0, 0, -1]), rel=1e-5
    )


def test_tables_figures_and_files(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,) * 16))
    found = sl.measure_mixing(model, ids, {"zero": sl.ablate_sinks(model, [0], "zero")}, n_probes=2, progress=False)
    table = found.to_dataframe()
    rows = table.to_dict("records")
    row = next(r for r in rows if (r["condition"], r["index"], r["layer"]) == ("zero", "mix", 1))
    assert row["low"] < row["mean"] < row["high"]
    assert row["log_ratio"] == pytest.approx(float((found.mix[1, :, 1] / found.mix[0, :, 1]).log().mean()), rel=1e-5)
    assert row["log_ratio_low"] < row["log_ratio"] < row["log_ratio_high"]
    again = sl.Mixing.load(found.save(tmp_path / "mixing.safetensors"))
    assert again.to_dataframe().equals(table)
    assert repr(again) == repr(found)
    assert again.plot().to_json() == found.plot().to_json()
    share = found.influence(2)
    assert share[share.condition == "base"].share.sum() == pytest.approx(1)
    near = found.distances()
    assert near.n.sum() == 2 * 16 * (LENGTH - 2) * (LENGTH - 1) // 2
    with pytest.raises(sl.BadInputError, match="out of range"):
        found.influence(99)


def test_bad_requests_say_what_to_do() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,)))
    with pytest.raises(sl.BadInputError, match="taken"):
        sl.measure_mixing(model, ids, {"base": []})
    with pytest.raises(sl.BadInputError, match="out of range"):
        sl.measure_mixing(model, ids, sinks=[40])
    with pytest.raises(sl.BadInputError, match="fewer than two"):
        sl.measure_mixing(model, ids, sinks=list(range(LENGTH - 1)))
    with pytest.raises(sl.BadInputError, match="at least 2"):
        sl.measure_mixing(model, ids, n_probes=1)
    with pytest.raises(sl.UnsupportedModelError, match="forward-mode"):
        sl.measure_mixing(build_pair("gpt-oss")[1], ids, n_probes=2)
