"""trace_sinks on SmolLM2's Text A: the writers and erasers that are known, and planting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from command import run
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.models.load import untrained_twin

pytestmark = pytest.mark.real


def test_smollm2_writers_and_erasers_of_text_a(smollm2: TransformerBridge, text_a: str) -> None:
    reference = sl.load_tokens(smollm2, n_seqs=2, seq_len=160)
    trace = sl.trace_sinks(smollm2, text_a, reference=reference, replacements=("same_id", "zero"), loss=True)
    rows = {(r["position"], r["phase"]): r for r in trace.writers().to_dict("records")}
    assert {key: row["writer"] for key, row in rows.items()} == {
        (0, 0): "mlp 2", (0, 1): "mlp 11", (10, 0): "mlp 2", (46, 0): "mlp 2",
    }  # fmt: skip
    for key, contribution in (((0, 0), 627), ((0, 1), 23665), ((10, 0), 607), ((46, 0), 444)):
        assert rows[key]["contribution"] == pytest.approx(contribution, rel=0.1)
        assert rows[key]["d_margin"] < -1
    assert rows[0, 1]["share"] == pytest.approx(1.0, abs=0.02)
    erasers = trace.erasers()
    at = {p: set(erasers[erasers.position == p].eraser) for p in (10, 46)}
    assert at[10] == {"mlp 8", "mlp 9", "mlp 10"}
    assert at[46] == {"mlp 8", "mlp 9", "mlp 10"}
    assert {"mlp 28", "mlp 29"} <= set(erasers[(erasers.position == 0) & (erasers.phase == 1)].eraser)
    effects = [row for row in trace.effects().to_dict("records") if row["component"] == "mlp"]

    def effect(position: int, layer: int, replacement: str) -> dict[str, Any]:
        wanted = (position, layer, replacement, "sink")
        return next(r for r in effects if (r["position"], r["layer"], r["replacement"], r["at"]) == wanted)

    ten = effect(10, 2, "zero")
    assert ten["alpha"] < 0.2
    assert ten["d_alpha"] < -0.15
    assert ten["d_loss"] < 0.1  # the model hardly misses it
    assert effect(10, 1, "same_id")["d_margin"] < -1.5  # MLP 1 matters as much: it feeds MLP 2
    gone = effect(0, 11, "zero")
    assert gone["d_loss"] == pytest.approx(5.47 - 3.93, abs=0.35)
    assert max(abs(row["d_margin"]) for row in effects if row["at"] == "random token") < 0.1


def test_smollm2_planting_mlp_2_makes_a_sink(smollm2: TransformerBridge, text_a: str) -> None:
    reference = sl.load_tokens(smollm2, n_seqs=2, seq_len=160)
    secondary = sl.find_sinks(smollm2, text_a).secondary
    trace = sl.trace_sinks(smollm2, text_a, secondary, reference=reference, causal=False)
    table = sl.trace.plant_sinks(smollm2, trace, positions=(30, 60), n_random=2)
    alpha = {(r["position"], r["added"]): r["alpha"] for r in table.to_dict("records") if r["sink"] == 10}
    assert alpha[30, "writer"] > 0.1
    assert alpha[60, "writer"] > 0.1
    assert max(alpha[p, "random"] for p in (30, 60)) < 0.03
    assert max(alpha[p, "flipped"] for p in (30, 60)) < 0.03

    found = sl.trace.writer_neurons(smollm2, trace, top=(5,), n_random=1)
    for row in found.writers.to_dict("records"):
        assert row["neurons_for_90"] == 2  # of 1536
    named = {row["neuron"] for row in found.to_dataframe().to_dict("records") if row["share"] > 0.2}
    assert named == {90, 430}
    gate = [r for r in found.feeds.to_dict("records") if (r["position"], r["neuron"], r["matrix"]) == (10, 90, "gate")]
    assert max(gate, key=lambda row: row["amount"])["component"] == "mlp 1"  # why MLP 1 matters as much as MLP 2
    by = {(r["position"], r["neurons"]): r["d_margin"] for r in found.ablations.to_dict("records")}
    assert by[46, "top"] < -1
    assert abs(by[46, "random"]) < 0.1


def test_an_untrained_twin_has_no_writer(smollm2: TransformerBridge, text_a: str) -> None:
    ids = sl.load_tokens(smollm2, [text_a]).ids
    trace = sl.trace_sinks(untrained_twin(smollm2), ids, progress=False)
    assert len(trace.writers()) == 0
    assert len(trace.to_dataframe()) == 0


def test_command_line_names_the_writer_and_writes_the_page(tmp_path: Path, text_a: str) -> None:
    out, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (text_a, text_a + " Again.")))
    arguments = ["trace", "--text", str(texts), "--kind", "secondary", "--plant", "--neurons", "--out", str(out)]
    arguments += ["--doses", "0,2", "--most", "1"]
    code, shown = run(*arguments)
    assert code == 0, shown
    assert "0:10" in shown
    assert "mlp 2" in shown
    assert "mlp 9 erases" in shown
    assert "2 of 1536 neurons carry 90 % of mlp 2" in shown
    names = {
        "trace.html",
        "writers.csv",
        "erasers.csv",
        "contributions.csv",
        "effects.csv",
        "planted.csv",
        "claims.csv",
    }
    names |= {"neurons.csv", "circuit.json"}
    assert {p.name for p in out.iterdir()} == names | {"trace.safetensors", "manifest.json"}
    graph = json.loads((out / "circuit.json").read_text())
    assert {"mlp 2 neuron 90", "mlp 2"} <= {node["id"] for node in graph["nodes"]}
    assert all(edge["weight"] == edge["weight"] for edge in graph["edges"])
    assert (out / "trace.html").read_text().count("plotly.js v") == 1
    writers = pd.read_csv(out / "writers.csv")
    assert set(writers.writer) == {"mlp 2"}
    assert writers.d_margin.max() < -1
    assert writers.proven.any()  # not all: a random layer of the phase may move a margin by more than 0.1 nat
