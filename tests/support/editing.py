"""Edits of attention for tests: modes with their options, and what edits do to a model."""

from __future__ import annotations

import copy
from typing import Any

from architectures import build, build_pair
from torch import Tensor

import sinklens as sl
from sinklens.bridge.adapters import learned_sink_logits, value_bias

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
SINKS = {0, 2}


def pair_for(name: str) -> tuple[Any, Any, float]:
    """HF model, bridge, tolerance: float64 where the family keeps it."""
    if name == "gpt2":
        hf = build(name).double()
        return hf, sl.load_model(copy.deepcopy(hf)), 1e-9
    hf, model = build_pair(name)
    return hf, model, 5e-5


def bias_of(model: Any, layer: int, head: int) -> Tensor | None:
    found = value_bias(model, layer, sl.models.capabilities(model).n_heads)
    return None if found is None else found[head].detach()


def learned_of(model: Any, layer: int, head: int) -> float | None:
    found = learned_sink_logits(model, layer)
    return None if found is None else float(found[head])


def patterns(model: Any, ids: Tensor, hooks: Any, mask: Tensor | None = None) -> list[Tensor]:
    found: list[Tensor] = []
    names = [f"blocks.{n}.attn.hook_pattern" for n in range(sl.models.capabilities(model).n_layers)]
    reading = [(name, lambda t, hook: found.append(t.detach().clone())) for name in names]
    model.run_with_hooks(ids, attention_mask=mask, fwd_hooks=[*hooks, *reading], return_type=None)
    return found


def greedy(model: Any, prompt: Tensor, cached: bool) -> Tensor:
    return model.generate(
        prompt, max_new_tokens=64, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, verbose=False,
        return_type="tokens",
    )  # fmt: skip
