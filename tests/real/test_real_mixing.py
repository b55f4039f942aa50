"""Mixing on the embedded models: short prefixes of Text A."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from command import run
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.mixing.jacobians import Stream, spectral_norm
from sinklens.mixing.path_sum import path_sum_bound

pytestmark = pytest.mark.real


def test_without_its_primary_smollm2_mixes_more_than_damage_explains(smollm2: TransformerBridge, text_a: str) -> None:
    whole = sl.find_sinks(smollm2, text_a)
    sinks = whole.cut([0], 12)
    assert sinks.positions(0) == [0, 10]
    without = sl.ablate_sinks(smollm2, sinks.primary)
    noise = sl.experiment.matched_damage(smollm2, sinks.tokens, without, progress=False)
    assert abs(noise.loss - noise.target) <= 0.02
    found = sl.compare_mixing(
        smollm2, sinks.tokens, {"without": without, "noise": noise.hooks}, sinks=sinks, probes=2, progress=False
    )
    last = {label: float(one.spread[0, -1]) for label, one in found.conditions.items()}
    assert last["without"] > 3 * last["noise"]
    assert last["without"] > 3 * last["base"]


def test_frozen_norms_and_the_path_sum_bound_on_gemma(gemma: TransformerBridge, text_a: str) -> None:
    ids = sl.load_tokens(gemma, [text_a]).first(4).ids
    live, frozen = Stream(gemma, ids), Stream(gemma, ids, frozen_norms=True, frozen_attention=True)
    assert torch.allclose(frozen.outputs, live.outputs, rtol=1e-3, atol=1.0)
    bound = path_sum_bound(gemma, ids)
    held = Stream(gemma, ids, frozen_attention=True)
    norm = spectral_norm(held, 17, 3, 0, steps=3)  # from below, so it may only be too small
    assert 0 < norm <= float(bound[17, 3, 0]) * 1.001


def test_an_encoder_mixes_with_both_sides(minilm: TransformerBridge, text_a: str) -> None:
    tokens = sl.load_tokens(minilm, [text_a])
    found = sl.measure_mixing(minilm, tokens.first(16), sinks=[0], probes=4, progress=False)
    above = found.squared_norms[0, -1].triu(1)
    assert float(above.sum()) > 0
    assert 0 < float(found.mix[0, -1]) < 1


def test_the_command_line_writes_a_page(tmp_path: Path, text_a: str) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "mixing"
    file.write_text(text_a)
    arguments = ["--text", str(file), "--first", "12", "--probes", "2", "--swaps", "4", "--collapse", "--out", str(out)]
    code, shown = run("mix", *arguments)
    assert code == 0, shown
    assert "without primary sinks" in shown
    assert "noise, same loss as without primary sinks" in shown
    names = {"mixing.html", "indices.csv", "distances.csv", "influence.csv", "swaps.csv", "collapse.csv"}
    assert {p.name for p in out.iterdir()} == names | {"mixing.safetensors", "manifest.json"}
    table = pd.read_csv(out / "indices.csv")
    assert set(table.condition) >= {"base", "without primary sinks", "without secondary sinks"}
    again = sl.mixing.MixingComparison.load(out / "mixing.safetensors")
    assert list(again.conditions) == list(dict.fromkeys(table.condition))
    page = (out / "mixing.html").read_text()
    assert page.count("plotly.js v") == 1
    code, shown = run("mix", "--text", str(file), "--first", "2")
    assert code == 2
    assert "--first must be at least 3" in shown
