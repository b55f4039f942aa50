"""The published algorithms, written again from their descriptions, on plain Hugging Face outputs: do we agree?

Nothing here is shared with sinklens: patterns, hidden states and values come from transformers' eager code, and each
measure is a loop over them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from planted import D_MODEL, X, Y, planted_model, row
from torch import Tensor

import sinklens as sl
from sinklens.find.residual_detectors import wong_sequences
from sinklens.inputs.load import as_tokens
from sinklens.mixing.collapse import MEASURES, ROWS

DECODERS = ("gpt2", "llama", "qwen2", "neox")
EVERYWHERE = (*DECODERS, "bert", "gemma2")


def look(hf: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Patterns [head, query, key], hidden states [pos, d_model] and values [head, pos, d_head] of one sequence."""
    hf.set_attn_implementation("eager")
    projected: dict[int, Tensor] = {}
    handles = []
    for layer, block in enumerate(blocks(hf)):
        module = value_module(hf, block)
        if module is not None:
            handles.append(module.register_forward_hook(lambda m, i, o, layer=layer: projected.update({layer: o[0]})))
    with torch.no_grad():
        out = hf(ids[None], output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    patterns = [a[0].double() for a in out.attentions]
    values = []
    for layer, pattern in enumerate(patterns):
        heads = pattern.shape[0]
        flat = values_of(hf, projected[layer], heads)
        values.append(torch.stack([flat[h * flat.shape[0] // heads] for h in range(heads)]).double())
    return patterns, [h[0].double() for h in out.hidden_states], values


def blocks(hf: Any) -> Any:
    if hasattr(hf, "transformer"):
        return hf.transformer.h
    if hasattr(hf, "gpt_neox"):
        return hf.gpt_neox.layers
    return hf.bert.encoder.layer if hasattr(hf, "bert") else hf.model.layers


def value_module(hf: Any, block: Any) -> Any:
    """The module whose output holds the values of a block."""
    if hasattr(hf, "transformer"):
        return block.attn.c_attn
    if hasattr(hf, "gpt_neox"):
        return block.attention.query_key_value
    return block.attention.self.value if hasattr(hf, "bert") else block.self_attn.v_proj


def values_of(hf: Any, projected: Tensor, heads: int) -> Tensor:
    """[KV head, pos, d_head] from that output."""
    length = projected.shape[0]
    if hasattr(hf, "transformer"):
        return projected[:, -projected.shape[1] // 3 :].view(length, heads, -1).transpose(0, 1)
    if hasattr(hf, "gpt_neox"):
        return projected.view(length, heads, 3, -1)[:, :, 2].transpose(0, 1)
    size = getattr(hf.config, "head_dim", None) or hf.config.hidden_size // heads
    return projected.view(length, -1, size).transpose(0, 1)


def output_matrix(hf: Any, layer: int) -> Tensor:
    """W_O, [head * d_head, d_model]."""
    block = blocks(hf)[layer]
    if hasattr(hf, "transformer"):
        return block.attn.c_proj.weight.detach().double()
    if hasattr(hf, "gpt_neox"):
        return block.attention.dense.weight.detach().double().T
    if hasattr(hf, "bert"):
        return block.attention.output.dense.weight.detach().double().T
    return block.self_attn.o_proj.weight.detach().double().T


def gu_importance(pattern: Tensor) -> Tensor:
    """Gu et al. 2025, section 3.2: the mean over the T - k + 1 queries that can see k, [head, key]."""
    length = pattern.shape[-1]
    found = torch.zeros(pattern.shape[0], length, dtype=torch.float64)
    for head in range(pattern.shape[0]):
        for k in range(length):
            found[head, k] = sum(float(pattern[head, t, k]) for t in range(k, length)) / (length - k)
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_importance_and_sink_rate_are_gus(name: str) -> None:
    hf, model = build_pair(name)
    rows = random_rows((40, 40, 40))
    alpha = torch.stack([torch.stack([gu_importance(p) for p in look(hf, ids)[0]]) for ids in rows])
    scores = sl.sink_scores(model, torch.stack(rows))
    assert float((scores.alpha - alpha).abs().max()) < 1e-6
    for position in (0, 3, 20):
        for epsilon in (0.05, 0.1, 0.3):
            hits = [float(a > epsilon) for a in alpha[..., position].flatten()]
            assert scores.sink_rate(position, epsilon) == pytest.approx(sum(hits) / len(hits), abs=1e-9)


def wong_published(hidden: list[Tensor], candidates: list[int]) -> list[tuple[int, int, int, str]]:
    """``hidden_state_norm_detection`` of the released code: (position, first layer, lifetime, label)."""
    states = hidden[1:]  # the embedding is dropped
    n_layers = len(states)
    average = [sum(float(s[c].norm()) for s in states) / n_layers for c in candidates]
    bos = average.index(max(average))
    jumps = [float(states[n + 1][bos].norm() - states[n][bos].norm()) for n in range(n_layers - 1)]
    start = jumps.index(max(jumps)) + 1
    rest = jumps[start:]
    end = (rest.index(min(rest)) if rest else 0) + start + 1
    layers: dict[int, list[int]] = {bos: list(range(start, end))}
    for layer in range(start, min(end, n_layers)):
        for t in range(bos + 1, states[layer].shape[0]):
            a, b = states[layer][t], states[layer][bos]
            if abs(float(a @ b / (a.norm() * b.norm()))) > 0.9:
                layers.setdefault(t, []).append(layer)
    found = []
    for position, mine in sorted(layers.items()):
        life = len(mine)
        label = "secondary" if 4 < life < n_layers - 15 else "bos_sink" if life >= n_layers - 15 else "noise"
        found.append((position, mine[0], life, label))
    return found


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_direction_detector_is_the_published_one(name: str) -> None:
    hf, model = build_pair(name)
    for ids in random_rows((30, 24)):
        ids = torch.cat([ids, ids[:6], ids[:1].repeat(4)])  # repeated tokens lie along one direction
        ours = wong_sequences(model, as_tokens(model, ids), False)[0]
        found = [(s.position, *s.level, s.label) for s in ours]
        assert found == wong_published(look(hf, ids)[1], [0, 1])


@pytest.mark.parametrize("name", EVERYWHERE)
def test_dormant_heads_are_those_of_ahon_ln(name: str) -> None:
    """Sandoval-Segura et al. 2025: mean norm of (A V)_t over the mean of the layer's heads; first-token weight."""
    hf, model = build_pair(name)
    ids = random_rows((20,))[0]
    patterns, _, values = look(hf, ids)
    activity = sl.heads.head_activity(model, ids, progress=False)
    for layer, (pattern, v) in enumerate(zip(patterns, values, strict=True)):
        outputs = []
        for h in range(pattern.shape[0]):
            norms = [
                float(sum((pattern[h, t, k] * v[h, k] for k in range(20)), torch.zeros(())).norm()) for t in range(20)
            ]
            outputs.append(sum(norms) / 20)
            weight = sum(float(pattern[h, t, 0]) for t in range(20)) / 20
            assert float(activity.first_token[0, layer, h]) == pytest.approx(weight, abs=1e-6)
        mean = sum(outputs) / len(outputs)
        for h, norm in enumerate(outputs):
            assert float(activity.ahon[0, layer, h]) == pytest.approx(norm, rel=1e-5)
            assert float(activity.ahon_ln[0, layer, h]) == pytest.approx(norm / mean, rel=1e-5)
            for threshold in (0.5, 0.9, 1.0):
                if abs(norm / mean - threshold) > 1e-4:
                    assert bool(activity.dormant(threshold)[layer, h]) == (norm / mean < threshold)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_contributions_are_kobayashis(name: str) -> None:
    """Kobayashi et al. 2020: |a_ij f(x_j)|, f(x) = (x W_V + b_V) W_O, averaged over the queries that see j."""
    hf, model = build_pair(name)
    ids = random_rows((18,))[0]
    patterns, _, values = look(hf, ids)
    got = sl.heads.head_activity(model, ids, progress=False).contribution[0]
    causal = name != "bert"
    for layer, (pattern, v) in enumerate(zip(patterns, values, strict=True)):
        w_o = output_matrix(hf, layer)
        size = v.shape[-1]
        for h in range(pattern.shape[0]):
            for j in range(18):
                f = v[h, j] @ w_o[h * size : (h + 1) * size]
                queries = range(j, 18) if causal else range(18)
                mean = sum(float((pattern[h, i, j] * f).norm()) for i in queries) / len(queries)
                assert float(got[layer, h, j]) == pytest.approx(mean, rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_rank_collapse_measure_is_dongs(name: str) -> None:
    """Their released code: sqrt(sum (X - mean)^2 / sum X^2) of every layer's output."""
    hf, model = build_pair(name)
    ids = random_rows((20,))[0]
    hidden = look(hf, ids)[1]
    found = sl.mixing.measure_collapse(model, ids, progress=False).values[
        0, 0, :, ROWS.index("all"), MEASURES.index("residual")
    ]
    for layer in range(len(hidden) - 2):  # transformers returns the last block's output after the final norm
        x = hidden[layer + 1]
        mean = [sum(float(x[t, d]) for t in range(20)) / 20 for d in range(x.shape[1])]
        apart = sum((float(x[t, d]) - mean[d]) ** 2 for t in range(20) for d in range(x.shape[1]))
        whole = sum(float(x[t, d]) ** 2 for t in range(20) for d in range(x.shape[1]))
        assert float(found[layer]) == pytest.approx(math.sqrt(apart / whole), rel=1e-5)


def sun_massive(state: Tensor) -> tuple[bool, list[int]]:
    """Sun et al. 2024: above 100 and above 1000 times the median magnitude; and the entries above 100 times it."""
    sizes = [abs(float(v)) for v in state]
    median = sorted(sizes)[(len(sizes) - 1) // 2]
    strict = any(s > 100 and s > 1000 * median for s in sizes)
    return strict, [d for d, s in enumerate(sizes) if s > 100 * median]


def test_the_massive_activation_criterion_is_suns() -> None:
    """Two planted sinks: one meets both parts of the criterion, the other only the ratio."""
    model = planted_model(6, {X: 8.0, Y: 8.0}, {X: range(6), Y: range(6)})
    hf: Any = model.original_model
    with torch.no_grad():
        hf.transformer.wpe.weight.copy_(0.01 * torch.randn(512, D_MODEL, generator=torch.Generator().manual_seed(0)))
        hf.transformer.wte.weight[X] *= 3000
        hf.transformer.wte.weight[Y] *= 50
    ids = row(96, {0: X, 20: Y})
    sinks = sl.find_sinks(model, ids)
    assert {s.position for s in sinks} == {0, 20}
    table = sl.sink_anatomy(model, sinks, progress=False).layers
    with torch.no_grad():
        hidden = hf(ids[None], output_hidden_states=True).hidden_states
    flags = set()
    for record in table.to_dict("records"):
        state = hidden[record["layer"]][0, record["position"]]
        strict, dims = sun_massive(state)
        assert record["strict"] == strict
        assert record["massive_dims"].split() == [str(d) for d in dims]
        flags.add((record["position"], strict))
    assert flags == {(0, True), (20, False)}


@pytest.mark.real
def test_a_real_model_agrees_with_every_published_measure(smollm2: Any, text_a: str) -> None:
    from transformers import AutoModelForCausalLM

    from sinklens.models.fetch import fetch

    hf = AutoModelForCausalLM.from_pretrained(fetch("smollm2-135m"), dtype=torch.float32).eval()
    tokens = as_tokens(smollm2, text_a)
    ids = tokens.row(0).cpu()[:64]
    one = as_tokens(smollm2, ids)
    patterns, hidden, values = look(hf, ids)
    scores = sl.sink_scores(smollm2, one)
    alpha = torch.stack([gu_importance(p) for p in patterns])
    assert float((scores.alpha[0] - alpha).abs().max()) < 1e-5
    ours = [(s.position, *s.level, s.label) for s in wong_sequences(smollm2, one, False)[0]]
    assert ours == wong_published(hidden, [0, 1])
    activity = sl.heads.head_activity(smollm2, one, progress=False)
    for layer in (0, 12, 29):
        z = patterns[layer] @ values[layer]
        assert torch.allclose(activity.ahon[0, layer].double(), z.norm(dim=-1).mean(-1), rtol=1e-4)
    table = sl.sink_anatomy(smollm2, sl.find_sinks(smollm2, one), progress=False).layers
    for record in [r for r in table.to_dict("records") if r["layer"] > 0]:
        strict, dims = sun_massive(hidden[record["layer"]][record["position"]])
        assert (record["strict"], record["massive_dims"].split()) == (strict, [str(d) for d in dims])
