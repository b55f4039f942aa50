"""Swapped and restricted attention against loops over Hugging Face models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from editing import greedy, learned_of, patterns
from naive_edits import naive_logits
from torch import Tensor

import sinklens as sl

KINDS: list[tuple[Any, dict[str, Any]]] = [
    ("off-by-one", {}),
    ("learned-logit", {"logit": 1.3}),
    ("clipped", {}),
    ("clipped", {"gamma": -0.1, "zeta": 1.2}),
]


def naive_swap(kind: str, scores: list[float], learned: float | None, options: dict[str, Any]) -> list[float]:
    """The weights of one row by the published formulas."""
    extra = [] if learned is None else [learned]
    if kind == "off-by-one":
        extra = [*extra, 0.0]
    if kind == "learned-logit":
        extra = [*extra, options["logit"]]
    top = max(scores + extra)
    total = sum(math.exp(s - top) for s in scores + extra)
    p = [math.exp(s - top) / total for s in scores]
    if kind == "clipped":
        gamma, zeta = options.get("gamma", -0.03), options.get("zeta", 1.0)
        p = [min(max((zeta - gamma) * x + gamma, 0.0), 1.0) for x in p]
    return p


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[f"{k}-{o}" for k, o in KINDS])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt-oss", "gemma2"])
def test_swapped_softmax_equals_the_formula(name: str, kind: Any, options: dict[str, Any]) -> None:
    hf, model = build_pair(name)
    ids = torch.stack(random_rows((13, 13)))

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, v: Tensor, visible: list[int]) -> Tensor:
        weights = naive_swap(kind, [float(scores[k]) for k in visible], learned_of(model, layer, h), options)
        return sum(
            (w * v[k].double() for w, k in zip(weights, visible, strict=True)), torch.zeros(v.shape[-1]).double()
        )

    edited = model.run_with_hooks(ids, fwd_hooks=sl.swap_attention(model, kind, **options))
    assert (edited - naive_logits(hf, ids, row)).abs().max() < 1e-4
    assert (edited - model(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt-oss", "mistral"])
def test_restricted_attention_equals_a_mask(name: str) -> None:
    hf, model = build_pair(name)
    ids = torch.stack(random_rows((56,)))
    sinks, recent = 2, 5

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, v: Tensor, visible: list[int]) -> Tensor:
        kept = [k for k in visible if k < sinks or i - k < recent]
        learned = learned_of(model, layer, h)
        s = torch.tensor([float(scores[k]) for k in kept] + ([] if learned is None else [learned])).double()
        weights = s.softmax(0)
        return sum((weights[j] * v[k].double() for j, k in enumerate(kept)), torch.zeros(v.shape[-1]).double())

    edited = model.run_with_hooks(ids, fwd_hooks=sl.restrict_attention(model, sinks=sinks, recent=recent))
    assert (edited - naive_logits(hf, ids, row)).abs().max() < 1e-4
    for pattern in patterns(model, ids, sl.restrict_attention(model, sinks=0, recent=3)):
        assert pattern[0, :, 20, :18].abs().max() == 0
        assert pattern[0, :, 20, 18:21].min() > 0


def test_sinks_of_a_restriction_may_be_named() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    found = patterns(model, ids, sl.restrict_attention(model, sinks=[6], recent=2))[0]
    assert found[0, :, 15, 6].min() > 0
    assert found[0, :, 15, [0, 5, 7, 13]].abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_swaps_and_windows_follow_a_generation(name: str) -> None:
    _, model = build_pair(name)
    prompt = torch.stack(random_rows((12,)))
    for hooks in (sl.swap_attention(model, "off-by-one"), sl.restrict_attention(model, sinks=2, recent=6)):
        found = []
        for cached in (True, False):
            with model.hooks(fwd_hooks=hooks):
                found.append(greedy(model, prompt, cached))
        assert torch.equal(*found)


def test_bad_swaps_say_what_to_do() -> None:
    _, model = build_pair("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "sigmoid"}, "kind must be"),
        ({"kind": "learned-logit"}, "logit="),
        ({"kind": "off-by-one", "logit": 1.0}, "logit="),
        ({"kind": "learned-logit", "logit": torch.zeros(3)}, "shape"),
        ({"kind": "clipped", "gamma": 0.1}, "gamma <= 0"),
    ]
    for options, message in cases:
        with pytest.raises(sl.BadInputError, match=message):
            sl.swap_attention(model, **options)
    windows: list[dict[str, Any]] = [{"recent": 0}, {"sinks": -1}]
    for options in windows:
        with pytest.raises(sl.BadInputError, match="recent >= 1"):
            sl.restrict_attention(model, **options)
    _, lost = build_pair("gpt-neo")
    with pytest.raises(sl.UnsupportedModelError, match="delegates"):
        sl.swap_attention(lost, "off-by-one")
    with pytest.raises(sl.UnsupportedModelError, match="delegates"):
        sl.restrict_attention(lost)
    with pytest.raises(sl.BadInputError, match="no positions"):
        sl.swap_attention(model, "off-by-one").at([3])


def test_scores_under_a_restriction_say_why_there_are_none() -> None:
    _, model = build_pair("llama")
    ids = random_rows((64,))[0]
    with (
        model.hooks(fwd_hooks=sl.restrict_attention(model, sinks=0, recent=8)),
        pytest.raises(sl.BadInputError, match="hooks now on the model leave distant keys no attention in layer 0"),
    ):
        sl.sink_scores(model, ids)
    assert sl.sink_scores(model, ids).alpha.isfinite().all()
