"""attention_statistics against loops over the scores of a plain Hugging Face model, on both backends."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows
from batches import batch_of, planted_map
from editing import learned_of
from naive_edits import SEEN, naive_logits, plain_row
from torch import Tensor

import sinklens as sl
from sinklens.bridge.adapters import value_bias

NAMES = ("gpt2", "llama", "qwen2", "neox", "gemma3", "gpt-oss", "gemma2", "opt", "bert")
SINKS = (0, 7)


def naive_statistics(hf: Any, model: Any, ids: Tensor) -> dict[str, dict[tuple[int, ...], float]]:
    """Every statistic by its formula, from raw scores."""
    found: dict[str, dict[tuple[int, ...], float]] = {"mass": {}, "margin": {}, "entropy": {}, "value_norm": {}}
    free: dict[tuple[int, int, int], list[float]] = {}

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, values: Tensor, visible: list[int]) -> Tensor:
        learned = learned_of(model, layer, h)
        everything = [float(scores[k]) for k in visible] + ([] if learned is None else [learned])
        total = torch.tensor(everything).double().logsumexp(0).item()
        s_s = [float(scores[k]) for k in visible if k in SINKS]
        tokens = [float(scores[k]) for k in visible if k not in SINKS]
        s_r = tokens + ([] if learned is None else [learned])
        lse = [torch.tensor(s).double().logsumexp(0).item() if s else -math.inf for s in (s_s, s_r, tokens)]
        found["mass"][layer, h, i] = math.exp(lse[0] - total)
        found["margin"][layer, h, i] = lse[0] - lse[1]
        weights = [math.exp(float(scores[k]) - total) for k in visible]
        found["entropy"][layer, h, i] = -sum(w * math.log(w) for w in weights if w > 0)
        for n, k in enumerate(SINKS):
            if i - k >= 16 and k in visible and tokens:
                free.setdefault((layer, h, n), []).append(float(scores[k]) - lse[2])
        if learned is None:
            return plain_row(scores, values, visible)
        return sum(w * values[k].double() for w, k in zip(weights, visible, strict=True))  # type: ignore[return-value]

    naive_logits(hf, ids[None], row)
    for layer, (_, _, v, _) in SEEN.items():
        bias = value_bias(model, layer, v.shape[1])
        for h in range(v.shape[1]):
            for i in range(len(ids)):
                own = v[0, h, i].double() - (0 if bias is None else bias[h].double())
                found["value_norm"][layer, h, i] = float(own.norm())
    found["free_margin"] = {at: sum(values) / len(values) for at, values in free.items()}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_statistics_equal_loops_on_both_backends(name: str) -> None:
    hf, model = build_pair(name)
    rows = random_rows((60, 40))
    tokens = batch_of(model, rows)
    want = [naive_statistics(hf, model, ids) for ids in rows]
    for backend in ("hooks", "flash"):
        found = sl.heads.attention_statistics(model, tokens, list(SINKS), entropy=True, backend=backend)
        assert found.info["backend"] == backend
        assert found.sinks == (SINKS, SINKS)
        assert found.mass[1, :, :, 40:].isnan().all()
        for b, formulas in enumerate(want):
            for quantity, numbers in formulas.items():
                tensor = getattr(found, quantity)[b]
                groups = 4 // tensor.shape[1]
                for (layer, h, n), value in numbers.items():
                    where = f"{name} {backend} {quantity} layer {layer} head {h} at {n}"
                    mine = float(tensor[layer, h // groups, n])
                    assert mine == pytest.approx(value, abs=2e-5, rel=1e-5), where


def test_the_margin_holds_where_the_mass_is_one() -> None:
    """Queries eight times as long: sigma is 1.0 in float32 in some rows, and the margin is still right there."""
    hf: Any = build("llama")
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
    model = sl.load_model(copy.deepcopy(hf))
    ids = random_rows((40,))[0]
    want = naive_statistics(hf, model, ids)["margin"]
    for backend in ("hooks", "flash"):
        found = sl.heads.attention_statistics(model, ids[None], list(SINKS), backend=backend)
        certain = (found.mass[0] == 1) & found.margin[0].isfinite()
        assert certain.any()
        for layer, h, i in certain.nonzero().tolist():
            assert float(found.margin[0, layer, h, i]) == pytest.approx(want[layer, h, i], abs=1e-3)
            assert want[layer, h, i] > 15


def test_maps_predicates_and_a_round_trip(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    rows = random_rows((60, 40))
    tokens = batch_of(model, rows)
    sinks = planted_map(
        model, rows, {(0, 0): ("primary", range(2)), (0, 5): ("secondary", range(1)), (1, 3): ("primary", range(2))}
    )
    found = sl.heads.attention_statistics(model, tokens, sinks)
    assert found.sinks == ((0, 5), (3,))
    assert found.free_margin.shape == (2, 2, 4, 2)
    assert found.free_margin[1, :, :, 1].isnan().all()
    by_id = sl.heads.attention_statistics(model, tokens, lambda ids: ids == int(rows[0][5]))
    assert 5 in by_id.sinks[0]
    table = found.to_dataframe()
    assert len(table) == 2 * 2 * 4
    first = table[(table.sequence == 0) & (table.layer == 1) & (table["head"] == 2)].iloc[0]
    usable = found.margin[0, 1, 2].isfinite()
    assert first["mass"] == pytest.approx(float(found.mass[0, 1, 2][usable].mean()))
    back = sl.heads.AttentionStatistics.load(found.save(tmp_path / "statistics.safetensors"))
    assert back.sinks == found.sinks
    assert torch.equal(back.margin.nan_to_num(), found.margin.nan_to_num())
    assert "mass" in back.plot().layout.title.text


def test_bad_requests_say_what_to_do() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    with pytest.raises(sl.BadInputError, match="out of range"):
        sl.heads.attention_statistics(model, ids, [20])
    with pytest.raises(sl.BadInputError, match="is about tokens"):
        sl.heads.attention_statistics(build_pair("gpt-oss")[1], ids, "learned")
    other = planted_map(model, random_rows((30,), seed=3), {(0, 0): ("primary", range(2))})
    with pytest.raises(sl.BadInputError, match="other tokens"):
        sl.heads.attention_statistics(model, ids, other)
    with pytest.raises(sl.BadInputError, match="positions must lie"):
        sl.sink_scores(model, ids, positions=[20])
    few = sl.sink_scores(model, random_rows((90,))[0][None], positions=0)
    with pytest.raises(sl.BadInputError, match="only some positions"):
        sl.find_sinks(model, random_rows((90,))[0][None], scores=few)
