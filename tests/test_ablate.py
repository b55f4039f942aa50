"""ablate_sinks against naive edits of Hugging Face models, and what the modes promise."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows
from naive_edits import SEEN, naive_logits, naive_row, plain_row
from torch import Tensor

import sinklens as sl
from sinklens.attention import learned_sink_logits, value_bias

SIMPLE: list[tuple[str, dict[str, Any]]] = [
    ("renormalize", {}),
    ("zero", {}),
    ("zero", {"neutral": "zero"}),
    ("value_only", {}),
    ("value_only", {"neutral": "zero"}),
    ("scale", {"g": 0.3}),
    ("scale", {"g": 4.0}),
    ("scale", {"g": 0.0}),
    ("null", {}),
    ("move", {"target": 3}),
    ("uniform", {}),
]
WITH_REFERENCE: list[tuple[str, dict[str, Any]]] = [
    ("mean_value", {}),
    ("fixed_key", {}),
    ("fixed_key", {"value": "neutral"}),
    ("fixed_key", {"value": "mean"}),
    ("fixed_logit", {}),
    ("fixed_logit", {"value": "neutral"}),
    ("fixed_logit", {"value": "mean"}),
]
EDITABLE = ("gpt2", "llama", "qwen2", "neox", "gemma3", "gpt-oss", "mistral")
SINKS = {0, 2}


def pair_for(name: str) -> tuple[Any, Any, float]:
    """HF model, bridge, tolerance: float64 where the family keeps it."""
    if name == "gpt2":
        hf = build(name).double()
        return hf, sl.load_model(copy.deepcopy(hf)), 1e-9
    hf, model = build_pair(name)
    return hf, model, 5e-5


def bias_of(model: Any, layer: int, head: int) -> Tensor | None:
    found = value_bias(model, layer, sl.capabilities(model).n_heads)
    return None if found is None else found[head].detach()


def learned_of(model: Any, layer: int, head: int) -> float | None:
    found = learned_sink_logits(model, layer)
    return None if found is None else float(found[head])


@pytest.mark.parametrize(("mode", "options"), SIMPLE, ids=[f"{m}-{o}" for m, o in SIMPLE])
@pytest.mark.parametrize("name", EDITABLE)
def test_mode_equals_the_naive_edit_of_the_whole_model(name: str, mode: str, options: dict[str, Any]) -> None:
    hf, model, tolerance = pair_for(name)
    ids = torch.stack(random_rows((53,) if name in ("gemma3", "mistral") else (14, 14)))  # past the windows of 50

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, values: Tensor, visible: list[int]) -> Tensor:
        bias, learned = bias_of(model, layer, h), learned_of(model, layer, h)
        return naive_row(scores, values, visible, SINKS, mode, b_v=bias, learned=learned, **options)

    edited = model.run_with_hooks(ids, fwd_hooks=sl.ablate_sinks(model, sorted(SINKS), mode, **options))
    assert (edited - naive_logits(hf, ids, row)).abs().max() < tolerance
    assert (edited - model(ids)).abs().max() > 0.1


def naive_reference(
    hf: Any, model: Any, rows: list[Tensor]
) -> tuple[dict[Any, Tensor], dict[Any, Tensor], dict[Any, float]]:
    """Mean values, mean (rotated) keys and mean margins at the sinks over reference sequences, by loops."""
    facts = sl.capabilities(model)
    values: dict[Any, list[Tensor]] = {}
    keys: dict[Any, list[Tensor]] = {}
    margins: dict[Any, list[float]] = {}
    unrotated: dict[int, Tensor] = {}
    handles = []
    if facts.rope:
        for n, block in enumerate(hf.model.layers):

            def keep(_: Any, __: Any, out: Tensor, n: int = n) -> None:
                unrotated[n] = out

            normed = getattr(block.self_attn, "k_norm", None) or block.self_attn.k_proj
            handles.append(normed.register_forward_hook(keep))
    for ids in rows:

        def row(layer: int, b: int, h: int, i: int, scores: Tensor, v: Tensor, visible: list[int]) -> Tensor:
            s_s = [float(scores[k]) for k in visible if k in SINKS]
            s_r = [float(scores[k]) for k in visible if k not in SINKS]
            if s_s and s_r:
                m = torch.tensor(s_s).double().logsumexp(0) - torch.tensor(s_r).double().logsumexp(0)
                margins.setdefault((layer, h, int(math.log2(len(visible)))), []).append(float(m))
            return plain_row(scores, v, visible)

        naive_logits(hf, ids[None], row)
        for layer, (_, k, v, _) in SEEN.items():
            for h in range(facts.n_heads):
                for p in SINKS:
                    values.setdefault((layer, h, p), []).append(v[0, h, p].double())
                    if facts.rope:
                        raw = unrotated[layer]
                        raw = raw.view(1, len(ids), facts.n_kv_heads, -1) if raw.ndim == 3 else raw
                        raw = raw.transpose(1, 2) if raw.shape[1] == facts.n_kv_heads else raw
                        kv = h // (facts.n_heads // facts.n_kv_heads)
                        keys.setdefault((layer, h, p), []).append(raw[0, p, kv].double())
                    else:
                        keys.setdefault((layer, h, p), []).append(k[0, h, p].double())
    for handle in handles:
        handle.remove()
    mean_keys = {at: torch.stack(found).mean(0) for at, found in keys.items()}
    if facts.rope:
        for (layer, h, p), key in mean_keys.items():
            kind = getattr(hf.config, "layer_types", None)
            extra = {"layer_type": kind[layer]} if kind and hf.config.model_type.startswith("gemma3") else {}
            cos, sin = hf.model.rotary_emb(key[None, None].float(), torch.tensor([[p]]), **extra)
            half = key.shape[0] // 2
            rotated = torch.cat([-key[half:], key[:half]])
            mean_keys[layer, h, p] = key * cos[0, 0].double() + rotated * sin[0, 0].double()
    means = {at: torch.stack(found).mean(0) for at, found in values.items()}
    return means, mean_keys, {at: sum(found) / len(found) for at, found in margins.items()}


@pytest.mark.parametrize(("mode", "options"), WITH_REFERENCE, ids=[f"{m}-{o}" for m, o in WITH_REFERENCE])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma3"])
def test_modes_with_means_equal_the_naive_edit(name: str, mode: str, options: dict[str, Any]) -> None:
    hf, model, tolerance = pair_for(name)
    reference = random_rows((14, 14, 14), seed=5)
    means, keys, margins = naive_reference(hf, model, reference)
    ids = torch.stack(random_rows((14, 14)))

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, v: Tensor, visible: list[int]) -> Tensor:
        q, _, _, scale = SEEN[layer]
        new = {p: float(q[b, h, i].double() @ keys[layer, h, p]) * scale for p in SINKS}
        return naive_row(
            scores,
            v,
            visible,
            SINKS,
            mode,
            b_v=bias_of(model, layer, h),
            margin=margins.get((layer, h, int(math.log2(len(visible))))),
            mean_values={p: means[layer, h, p] for p in SINKS},
            new_scores=new if mode == "fixed_key" else None,
            **options,
        )

    hooks = sl.ablate_sinks(model, sorted(SINKS), mode, reference=torch.stack(reference), **options)
    edited = model.run_with_hooks(ids, fwd_hooks=hooks)
    assert (edited - naive_logits(hf, ids, row)).abs().max() < max(tolerance, 1e-6 if name == "gpt2" else 0)
    assert (edited - model(ids)).abs().max() > 0.1
