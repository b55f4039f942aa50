"""Ran-Milo et al. 2026 (2604.14722): the sink circuit of GPT-2 starts at the query bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinklens.attention.run import collect
from sinklens.bridge.adapters import attention_hook, by_head, score_projection, scored_points
from sinklens.bridge.capabilities import capabilities
from sinklens.decompose.decompose import decompose_sinks
from sinklens.find.scores import sink_scores
from sinklens.inputs.tokens import Tokens
from sinklens.reproductions.claims import Above, Claim, Entry, Quantity, Setting, measured
from sinklens.reproductions.gu import EPSILON, LENGTH, per_sequence
from sinklens.reproductions.originals import Subject

PAPER = "Ran-Milo et al. 2026 (2604.14722)"


def bias_logits(model: Any, one: Tokens) -> Tensor:
    """``Delta_j = b_Q . k_j`` of every head and key, [layer, head, pos]: the part of a score that no query changes.

    The paper writes ``b_Q W_K^T x_j``; in GPT-2 k_j holds b_K too, which adds the same to all keys.
    """
    facts = capabilities(model)
    point = (scored_points(facts.fires, facts.rope) or ("hook_q", "hook_k"))[1]
    layers = range(facts.n_layers)
    kept = collect(model, one.ids, [attention_hook(layer, point) for layer in layers])
    rows = []
    for layer in layers:
        keys = by_head(kept[attention_hook(layer, point)][None], facts.heads_first, facts.n_heads).float()
        bias = score_projection(model, layer, "q")[1].to(keys)
        rows.append(torch.einsum("hd,hpd->hp", bias, keys))
    return torch.stack(rows).cpu()


def without_query_bias(model: Any, seed: int | None = None) -> list[tuple[str, Any]]:
    """Hooks that take b_Q out of every query; with a seed, a random vector of the same length per head instead."""
    facts = capabilities(model)
    draw = None if seed is None else torch.Generator().manual_seed(seed)

    def hook_for(bias: Tensor) -> Any:
        def hook(queries: Tensor, hook: Any) -> Tensor:
            return queries - bias.to(queries).reshape(queries.shape[2:] if queries.ndim == 4 else (-1,))

        return hook

    hooks = []
    for layer in range(facts.n_layers):
        bias = score_projection(model, layer, "q")[1]
        if draw is not None:
            other = torch.randn(bias.shape, generator=draw).to(bias)
            bias = other * (bias.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True))
        hooks.append((attention_hook(layer, "hook_q"), hook_for(bias)))
    return hooks


def _circuit(model: Any, setting: Setting) -> list[Quantity]:
    tokens = setting.text(model, 24, LENGTH, prepend_bos=False)
    delta = torch.stack([bias_logits(model, tokens[b].trim()) for b in range(len(tokens))])
    gap = (delta[..., 0] - delta[..., 1:].mean(-1)).double()
    base = per_sequence(sink_scores(model, tokens), 0, EPSILON)
    rates = {}
    for name, hooks in (("b_Q", without_query_bias(model)), ("random", without_query_bias(model, setting.seed))):
        with model.hooks(fwd_hooks=hooks):
            rates[name] = per_sequence(sink_scores(model, tokens, backend="hooks"), 0, EPSILON)
    parts = decompose_sinks(model, tokens, [0], effects=())
    by_bias = parts.number("bq_content").double().flatten(1).nanmean(1)
    whole = parts.number("gap").double().flatten(1).nanmean(1)
    of = [s.document for s in parts.subjects]
    return [
        measured("b_Q . k: first token above the mean of the others", gap.flatten(1).mean(1), tokens.documents),
        measured("gap of the first token's score", whole, of),
        measured("part of the gap that is b_Q times content", by_bias, of),
        measured("part of the gap that is b_Q times content, above half", by_bias - whole / 2, of),
        measured("sink rate", base, tokens.documents),
        measured("sink rate without b_Q", rates["b_Q"], tokens.documents),
        measured("sink rate without b_Q, below half", base / 2 - rates["b_Q"], tokens.documents),
        measured("sink rate without a random vector, above half", rates["random"] - base / 2, tokens.documents),
    ]


def _unfit(subject: Subject) -> str:
    if not subject.facts.causal:
        return "the model is no decoder"
    if not subject.query_bias:
        return "the model's queries have no bias"
    return "" if subject.learned_positions else "the model adds no position vectors, which the circuit starts from"


def _gpt2(subject: Subject) -> str:
    return "" if subject.original.startswith("gpt2") else f"the claim is about trained GPT-2{subject.doubt}"


ENTRY = Entry(
    name="ran-milo-query-bias",
    title="GPT-2: the query bias makes the sink",
    source=f"{PAPER}, abstract and notes",
    protocol="The part of a score that is the same for all queries, Delta_j = b_Q W_K^T x_j, at the first token "
    "against the others; the query bias is necessary: without it GPT-2's sink goes, without matched controls it stays.",
    deviations=(
        "the full text was not at hand (abstract and notes only): effects are judged as directions",
        "control: a random vector of b_Q's length in the place of b_Q",
        "texts of 64 tokens without BOS, epsilon 0.3",
    ),
    originals=("gpt2", "gpt2-large", "gpt2-xl"),
    stand_ins=("smollm2-135m",),
    claims=(
        Claim("b_Q . k: first token above the mean of the others", "b_Q points at it", Above(0.0), "Delta", "D", _gpt2),
        Claim(
            "part of the gap that is b_Q times content, above half",
            "the query bias makes most of the gap",
            Above(0.0),
            "Delta",
            "D",
            _gpt2,
        ),
        Claim("sink rate without b_Q, below half", "it is necessary", Above(0.0), "abstract", "D", _gpt2),
        Claim(
            "sink rate without a random vector, above half",
            "a matched control is harmless",
            Above(0.0),
            "abstract",
            "D",
            _gpt2,
        ),
    ),
    unfit=_unfit,
    measure=_circuit,
)

ENTRIES = (ENTRY,)
