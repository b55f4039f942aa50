"""decompose_sinks on the real models: sums, who writes the keys, and the component's removal done on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command import run
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.bridge.adapters import attention_hook
from sinklens.decompose.margin import BEYOND, GEOMETRY, MEANS, PARAMETERS

pytestmark = pytest.mark.real


def check_sums(found: sl.decompose.SinkDecomposition, tolerance: float) -> None:
    gap, beyond = found.number("gap"), sum(found.number(n) for n in BEYOND)
    known = gap.isfinite()
    assert known.any()
    for split in (PARAMETERS, MEANS, GEOMETRY):
        assert (sum(found.number(n) for n in split) + beyond - gap)[known].abs().max() < tolerance
    whole = gap - found.number("log_rest") - found.number("peakedness") - found.number("learned")
    assert (whole - found.number("margin"))[known].abs().max() < tolerance
    for side in (found.key_side + found.rest_side, found.query_side):
        assert (side.nansum(-1) + beyond - gap)[known].abs().max() < 5 * tolerance


def largest(found: sl.decompose.SinkDecomposition, kind: str, layer: int) -> str:
    table = found.component_table("key", kind)
    rows = [row for row in table.to_dict("records") if row["layer"] == layer]
    return max(rows, key=lambda row: row["nats"])["component"]


def test_smollm2_keys_are_written_by_the_known_layers(smollm2: TransformerBridge, text_a: str) -> None:
    reference = sl.load_tokens(smollm2, n_seqs=3, seq_len=128)
    found = sl.decompose_sinks(smollm2, text_a, effects=(), reference=reference)
    assert [(s.position, s.kind) for s in found.subjects] == [(0, "primary"), (10, "secondary"), (46, "secondary")]
    check_sums(found, 1e-3)  # of scores up to 50
    assert {largest(found, "secondary", layer) for layer in range(4, 9)} == {"mlp 2"}
    assert {largest(found, "primary", layer) for layer in (13, 17, 22, 26)} == {"mlp 11"}
    assert abs(found.heads("primary").bias_share.median()) < 0.6
    assert found.number("content_bk").nan_to_num().abs().max() == 0.0  # no b_K, and RMSNorm has no bias
    alive = found.heads("secondary")
    assert (alive.value_ratio < 0.6).mean() > 0.8
    assert (alive.norm < 0).mean() > 0.8  # the sink's key is short,
    assert (alive.angle > 0).mean() > 0.9  # its direction makes the score


def test_smollm2_removing_the_named_layer_moves_the_score_by_what_was_said(
    smollm2: TransformerBridge, text_a: str
) -> None:
    """MLP 2 is taken out of the keys of layer 6 by hand, with the norm's scale kept; the host does the rest."""
    layer, sink = 6, 10
    reference = sl.load_tokens(smollm2, n_seqs=2, seq_len=64)
    found = sl.decompose_sinks(smollm2, text_a, [0, 10, 46], effects=(), reference=reference, layers=[layer])
    ids = sl.load_tokens(smollm2, [text_a]).ids
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor[0].detach().double()

        return hook

    scores_at = attention_hook(layer, "hook_attn_scores")
    names = (f"blocks.{layer}.hook_in", "blocks.2.mlp.hook_out", scores_at)
    smollm2.run_with_hooks(ids, fwd_hooks=[(n, keep(n)) for n in names])
    before, x, part = seen[scores_at], seen[names[0]], seen[names[1]]
    norm: Any = smollm2.blocks[layer].ln1.original_component
    scaled = part / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    attention: Any = smollm2.blocks[layer].attn
    share = torch.einsum("td,hde->the", scaled, attention.W_K.double())

    def remove(tensor: Tensor, hook: Any) -> Tensor:
        return tensor - share[None].to(tensor)

    edits: list[Any] = [(attention_hook(layer, "hook_k"), remove), (scores_at, keep("after"))]
    smollm2.run_with_hooks(ids, fwd_hooks=edits)
    queries = range(sink + 16, ids.shape[1])

    def gap(scores: Tensor, head: int) -> float:
        rest = [[j for j in range(i + 1) if j not in (0, 10, 46)] for i in queries]
        gaps = [scores[head, i, sink] - scores[head, i, keys].mean() for i, keys in zip(queries, rest, strict=True)]
        return float(torch.stack(gaps).mean())

    said = (found.key_side + found.rest_side)[1, 0, :, found.components.index(("mlp", 2))]
    for head in range(9):
        assert gap(before, head) - gap(seen["after"], head) == pytest.approx(float(said[head]), abs=2e-3)
    assert float(said.mean()) > 3  # nats: it is the writer


def test_gemma_bos_with_windows_and_qk_norm(gemma: TransformerBridge, text_a: str) -> None:
    reference = sl.load_tokens(gemma, n_seqs=2, seq_len=64)
    found = sl.decompose_sinks(gemma, text_a, [0], effects=(), reference=reference)
    check_sums(found, 1e-3)
    assert found.number("norm").abs().max() < 40
    assert float(found.number("value_ratio").median()) < 0.5


def test_minilm_has_an_embedding_and_no_loss(minilm: TransformerBridge, text_a: str) -> None:
    found = sl.decompose_sinks(minilm, [text_a, text_a[120:] + text_a[:120]], effects=("all", "layer"))
    check_sums(found, 1e-4)
    assert "embedding" in found.effects["all"].values
    assert float(found.effects["all"].part("embedding", "total").nanmean()) < 0
    assert found.number("bq_bk").nan_to_num().abs().max() < 1e-4  # one constant per query: it cancels
    assert found.number("bq_content").nan_to_num().abs().max() > 0.01
    with pytest.raises(sl.BadInputError, match="no next token"):
        sl.decompose_sinks(minilm, text_a, metrics=("loss",))


def test_command_line_writes_the_page_and_tables(tmp_path: Path, text_a: str) -> None:
    out, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (text_a, text_a + " Again.")))
    arguments = ["decompose", "--text", str(texts), "--kind", "secondary", "--layers", "3-10", "--out", str(out)]
    code, shown = run(*arguments)
    assert code == 0, shown
    assert "undecided" in shown  # two texts decide nothing
    names = {"decomposition.html", "heads.csv", "sinks.csv", "components.csv", "effects.csv", "claims.csv"}
    assert {p.name for p in out.iterdir()} == names | {"decomposition.safetensors", "manifest.json"}
    assert len(pd.read_csv(out / "heads.csv")) == 8 * 9
    page = (out / "decomposition.html").read_text()
    assert page.count("plotly.js v") == 1
    assert "Mass part and value part" in page
    code, shown = run("decompose", "--effects", "everything", "--text", "-", input=text_a)
    assert code == 2
    assert "effects must be a list of all, layer, head" in shown
