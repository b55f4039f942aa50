"""measure_collapse against loops over rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from torch import Tensor

import sinklens as sl
from sinklens.inputs.load import as_tokens
from sinklens.mixing.collapse import MEASURES, ROWS, Collapse, collapse_measures, measure_collapse

SINKS = (0, 2)


def naive_measures(x: Tensor) -> list[float]:
    """The definitions, as loops."""
    rows = x.detach().double()
    n, width = rows.shape
    mean = [sum(float(rows[i, d]) for i in range(n)) / n for d in range(width)]
    apart = sum((float(rows[i, d]) - mean[d]) ** 2 for i in range(n) for d in range(width))
    size = sum(float(rows[i, d]) ** 2 for i in range(n) for d in range(width))
    cosines = [float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i in range(n) for j in range(n) if i != j]
    shares = [float(s) ** 2 / size for s in torch.linalg.svdvals(rows)]
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    return [math.sqrt(apart / size), sum(cosines) / len(cosines), entropy]


def naive_outputs(model: Any, ids: Tensor, hooks: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        kept.append(x[0].detach())

    names = [f"blocks.{n}.hook_out" for n in range(model.cfg.n_layers)]
    model.run_with_hooks(ids[None], fwd_hooks=[*hooks, *((name, keep) for name in names)])
    return kept


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert"])
def test_measures_are_those_of_plain_loops(name: str) -> None:
    hf, model = build_pair(name)
    rows = random_rows((9, 6))
    tokens = sl.Tokens.concatenate([as_tokens(model, row) for row in rows])
    edit = sl.ablate_sinks(model, list(SINKS))
    found = measure_collapse(model, tokens, {"without": edit}, sinks=SINKS, progress=False)
    assert found.labels == ("base", "without")
    assert found.sinks == (SINKS, SINKS)
    for b, ids in enumerate(rows):
        for c, hooks in enumerate(([], edit)):
            outputs = naive_outputs(model, ids, hooks)
            for layer, x in enumerate(outputs):
                ordinary = torch.stack([x[i] for i in range(len(ids)) if i not in SINKS])
                unit = torch.stack([row / row.norm() for row in ordinary])
                for r, kept in enumerate((ordinary, unit, x)):
                    expected = naive_measures(kept)
                    assert found.values[c, b, layer, r].tolist() == pytest.approx(expected, abs=1e-5), (c, b, layer, r)
    plain: Any = hf(rows[0][None], output_hidden_states=True)
    first = naive_measures(plain.hidden_states[1][0])
    assert found.values[0, 0, 0, ROWS.index("all")].tolist() == pytest.approx(first, abs=1e-5)
    assert (found.values[0] - found.values[1]).abs().max() > 1e-2


def test_known_rows_have_known_measures() -> None:
    same = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(5, 8)
    assert collapse_measures(same).tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    orthonormal = torch.eye(8)[:5] * 3
    expected = [math.sqrt(1 - 1 / 5), 0, math.log(5)]
    assert collapse_measures(orthonormal).tolist() == pytest.approx(expected, abs=1e-12)
    tall = torch.cat([torch.eye(4), -torch.eye(4)])  # more rows than columns
    assert collapse_measures(tall).tolist() == pytest.approx([1, -1 / 7, math.log(4)], abs=1e-12)
    both = collapse_measures(torch.stack([tall, tall * 7]))
    assert torch.allclose(both[0], both[1])


def test_a_massive_row_swamps_only_the_rows_that_include_it() -> None:
    _, model = build_pair("gpt2")
    ids = torch.stack(random_rows((12,)))

    def blow_up(x: Tensor, hook: Any) -> Tensor:
        new = x.clone()
        new[:, 0] *= 1000
        return new

    last = model.cfg.n_layers - 1
    massive = {"massive": [(f"blocks.{last}.hook_out", blow_up)]}
    values = measure_collapse(model, ids, massive, sinks=[0], progress=False).values[:, 0, last]
    assert torch.equal(values[0, :2], values[1, :2])
    entropy = values[:, ROWS.index("all"), MEASURES.index("entropy")]
    assert entropy[1] < 0.05 < 0.9 < entropy[0]


def test_an_edit_that_does_nothing_is_base_exactly() -> None:
    _, model = build_pair("llama")
    found = measure_collapse(model, torch.stack(random_rows((9, 9))), {"nothing": []}, progress=False)
    assert torch.equal(found.values[0], found.values[1])
    rows = found.to_dataframe().to_dict("records")
    assert {row["difference"] for row in rows if row["condition"] == "nothing"} == {0.0}
    assert found.sinks == ((0,), (0,))  # too short for far importance


def test_tables_figures_and_files(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((7,) * 16))
    edits = {"zero": sl.ablate_sinks(model, [0], "zero")}
    found = measure_collapse(model, ids, edits, sinks=[0], progress=False)
    table = found.to_dataframe()
    rows = table.to_dict("records")
    assert len(rows) == 2 * 2 * len(ROWS) * len(MEASURES)
    key = ("zero", 1, "no_sink_unit", "entropy")
    row = next(r for r in rows if (r["condition"], r["layer"], r["rows"], r["measure"]) == key)
    base, edited = found.values[:, :, 1, 1, 2].tolist()
    assert row["mean"] == pytest.approx(sum(edited) / 16, rel=1e-6)
    assert row["low"] < row["mean"] < row["high"]
    assert row["difference"] == pytest.approx(sum(b - a for a, b in zip(base, edited, strict=True)) / 16, rel=1e-5)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert math.isnan(rows[0]["difference"])
    again = Collapse.load(found.save(tmp_path / "collapse.safetensors"))
    assert again.to_dataframe().equals(table)
    assert repr(again) == repr(found)
    assert again.sinks == found.sinks
    assert len(again.plot().to_dict()["data"]) == 3 * 2 * 2  # a line and a band
    few = measure_collapse(model, ids[:15], edits, sinks=[0], progress=False)
    assert all(math.isnan(r["low"]) and not math.isnan(r["mean"]) for r in few.to_dataframe().to_dict("records"))
    assert len(few.plot().to_dict()["data"]) == 3 * 2


def test_bad_requests_say_what_to_do() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((7,)))
    with pytest.raises(sl.BadInputError, match="taken"):
        measure_collapse(model, ids, {"base": []}, progress=False)
    with pytest.raises(sl.BadInputError, match="out of range"):
        measure_collapse(model, ids, sinks=[40], progress=False)
    with pytest.raises(sl.BadInputError, match="fewer than two"):
        measure_collapse(model, ids, sinks=list(range(6)), progress=False)
