"""decompose_sinks: sums, naive references, and every attribution checked by doing it on the host."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows
from editing import learned_of, pair_for
from naive_edits import SEEN, naive_logits, naive_row
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sinklens as sl
from sinklens.bridge.adapters import attention_hook
from sinklens.bridge.capabilities import has_hook
from sinklens.decompose.margin import BEYOND, GEOMETRY, MEANS, PARAMETERS
from sinklens.decompose.queries_keys import read_layers
from sinklens.decompose.result import NUMBERS
from sinklens.inputs.load import as_tokens
from sinklens.residual.components import EMBEDDINGS, ENDS, INSIDE, Contributions
from sinklens.residual.contributions import flat

FAMILIES = ("gpt2", "llama", "qwen2", "neox", "phi3", "gemma2", "gemma3", "gpt-oss", "bert")
OTHERS = ("falcon", "bloom", "opt", "roberta", "qwen3", "olmo2", "mistral", "mixtral", "gpt-neo")
SINKS = [0, 3]
LENGTH = 60


def decomposed(model: Any, **options: Any) -> sl.decompose.SinkDecomposition:
    ids = torch.stack(random_rows((LENGTH,) * 3))
    return sl.decompose_sinks(model, ids, SINKS, **{"effects": (), "progress": False, **options})


def visible(facts: sl.models.Capabilities, layer: int, i: int) -> list[int]:
    window = facts.windows[layer] or LENGTH
    last = i + 1 if facts.causal else min(LENGTH, i + window)
    return list(range(max(0, i - window + 1), last))


def naive_margins(model: Any, scores: Tensor, layer: int, head: int, sink: int) -> dict[str, float]:
    """Margin, gap, peakedness and log |R| of one sink in one head by the formulas, from a matrix of scores."""
    facts = sl.models.capabilities(model)
    learned = learned_of(model, layer, head)
    rows = []
    for i in range(LENGTH):
        seen = visible(facts, layer, i)
        rest = [j for j in seen if j not in SINKS]
        if sink not in seen or abs(i - sink) < 16 or not rest:
            continue
        lse = math.log(sum(math.exp(float(scores[i, j])) for j in rest))
        mean = sum(float(scores[i, j]) for j in rest) / len(rest)
        gap = float(scores[i, sink]) - mean
        peak = lse - mean - math.log(len(rest))
        whole = lse if learned is None else math.log(math.exp(lse) + math.exp(learned))
        rows.append((float(scores[i, sink]) - whole, gap, peak, math.log(len(rest)), whole - lse))
    names = ("margin", "gap", "peakedness", "log_rest", "learned")
    return {name: sum(r[n] for r in rows) / len(rows) for n, name in enumerate(names)}


def host_scores(hf: Any, model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Scores of every layer [head, query, key] from the plain Hugging Face model's own rotated queries and keys."""
    facts = sl.models.capabilities(model)

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, values: Tensor, seen: list[int]) -> Tensor:
        return naive_row(scores, values, seen, set(), "zero", learned=learned_of(model, layer, h))  # S empty: unedited

    naive_logits(hf, ids, row)
    cap = getattr(hf.config, "attn_logit_softcapping", None)
    found = {}
    for layer in range(facts.n_layers):
        q, k, _, scale = SEEN[layer]
        scores = (q[0].double() @ k[0].double().mT) * scale
        found[layer] = cap * (scores / cap).tanh() if cap else scores
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_margin_and_gap_follow_the_formulas(name: str) -> None:
    hf, model, tolerance = pair_for(name)
    ids = torch.stack(random_rows((LENGTH,) * 3))
    found = decomposed(model)
    scores = host_scores(hf, model, ids[:1])
    for layer, of_layer in scores.items():
        for head in range(of_layer.shape[0]):
            for s, sink in enumerate(SINKS):
                for number, value in naive_margins(model, of_layer[head], layer, head, sink).items():
                    ours = float(found.number(number)[s, layer, head])
                    assert ours == pytest.approx(value, abs=tolerance), (layer, head, number)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_splits_sum_to_the_gap_and_components_too(name: str) -> None:
    _, model = build_pair(name)
    found = decomposed(model)
    gap, beyond = found.number("gap"), sum(found.number(n) for n in BEYOND)
    assert gap.isfinite().all()
    assert (gap.abs() > 0.01).any()
    for split in (PARAMETERS, MEANS, GEOMETRY):
        assert (sum(found.number(n) for n in split) + beyond - gap).abs().max() < 1e-4
    whole = gap - found.number("log_rest") - found.number("peakedness") - found.number("learned")
    assert (whole - found.number("margin")).abs().max() < 1e-5
    assert (found.number("peakedness") > -1e-5).all()
    for side in (found.key_side + found.rest_side, found.query_side):
        assert (side.nansum(-1) + beyond - gap).abs().max() < 1e-4


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_terms_rebuild_the_hosts_scores_at_every_position(name: str) -> None:
    if name in ("gpt2", "bert"):  # these keep float64 throughout
        hf: Any = build(name)
        model, tolerance = sl.load_model(hf.double()), 1e-9
    else:
        (_, model), tolerance = build_pair(name), 1e-4
    facts = sl.models.capabilities(model)
    ids = torch.stack(random_rows((LENGTH,)))
    rest = torch.ones(LENGTH, dtype=torch.bool)
    rest[SINKS] = False
    shown: dict[int, dict[str, Tensor]] = {}

    def keep(layer: int, point: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            shown.setdefault(layer, {})[point] = tensor[0].detach().clone()

        return hook

    points = ("hook_attn_scores", "hook_pattern")
    hooks: list[Any] = [(attention_hook(n, p), keep(n, p)) for n in range(facts.n_layers) for p in points]
    model.run_with_hooks(ids, fwd_hooks=hooks)
    for layer, inputs in read_layers(model, ids, rest, range(facts.n_layers)).items():
        parts, scoring = inputs.scores, inputs.scores.scoring
        raw = torch.zeros(facts.n_heads, LENGTH, LENGTH, dtype=parts.v.dtype)
        for q in (parts.q.content, parts.q.bias):
            for k in (parts.k.content, parts.k.bias):
                raw += scoring.scale * q @ k.mT
        total = scoring.capped(raw)
        if scoring.slopes is not None:
            total = total + scoring.slopes[:, None, None] * torch.arange(LENGTH)
        for i in range(LENGTH):
            seen = visible(facts, layer, i)
            theirs = shown[layer]["hook_attn_scores"][:, i, seen]
            ours = total[:, i, seen]
            if not facts.scores_are_logits:  # the host shows the pattern only: compare the softmax
                theirs, ours = shown[layer]["hook_pattern"][:, i, seen], ours.softmax(-1)
            if name == "bloom":  # ALiBi is free up to a constant per row
                theirs, ours = theirs - theirs[:, :1], ours - ours[:, :1]
            assert (ours - theirs).abs().max() < tolerance * (1 + float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3", "olmo2", "bert", "neox", "bloom"])
def test_components_sum_to_the_stream_the_key_and_the_query(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = flat(tensor.detach(), LENGTH)

        return hook

    layers = range(sl.models.capabilities(model).n_layers)
    names = [f"blocks.{n}.{p}" for n in layers for p in (*INSIDE, *ENDS)] + list(EMBEDDINGS)
    model.run_with_hooks(ids, fwd_hooks=[(n, keep(n)) for n in names if has_hook(model, n)])
    inputs = read_layers(model, ids, torch.ones(LENGTH, dtype=torch.bool), layers)
    parts = Contributions(model)
    parts.begin(seen["blocks.0.hook_in"], {n: seen[n] for n in EMBEDDINGS if n in seen})
    for layer in layers:
        stack = parts.stack()
        stream = seen[f"blocks.{layer}.hook_in"]
        assert len(stack) == len(parts.names)
        assert (stack.sum(0) - stream).abs().max() < 1e-4 * (1 + stream.abs().max())
        for side in (inputs[layer].key, inputs[layer].query):
            assert (side.of(stack).sum(1) - side.content).abs().max() < 1e-4
        prefix = f"blocks.{layer}."
        parts.add(layer, {n.removeprefix(prefix): t for n, t in seen.items() if n.startswith(prefix)})
    assert len(parts.names) >= 1 + 2 * len(layers)


def stream_norm(hf: Any, name: str, layer: int, x: Tensor, part: Tensor) -> Tensor:
    """What a part of the stream becomes behind a layer's norm at the scale of the whole, by hand."""
    if name == "gpt2":
        norm = hf.transformer.h[layer].ln_1
        sd = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return (part - part.mean(-1, keepdim=True)) / sd * norm.weight
    norm = hf.model.layers[layer].input_layernorm
    return part / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def projected(hf: Any, name: str, layer: int, side: str, x: Tensor) -> Tensor:
    """x W without bias, from Hugging Face's own weights: [pos, head, d_head]."""
    if name == "gpt2":
        weight = hf.transformer.h[layer].attn.c_attn.weight
        columns = weight.chunk(3, dim=1)[("q", "k").index(side)]
        return (x @ columns).unflatten(-1, (4, 8))
    return (x @ getattr(hf.model.layers[layer].self_attn, f"{side}_proj").weight.T).unflatten(-1, (-1, 8))


@pytest.mark.parametrize("side", ["key", "query"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_removing_a_component_moves_the_hosts_gap_by_what_is_named(name: str, side: str) -> None:
    """Its contribution is taken out of hook_k (or hook_q) by hand; the host rotates and scores by itself."""
    hf, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,)))
    found = decomposed(model)
    layer = 1
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor[0].detach().clone()

        return hook

    scores_at = attention_hook(layer, "hook_attn_scores")
    points = ["blocks.1.hook_in", "blocks.0.attn.hook_out", "blocks.0.mlp.hook_out", "embed.hook_out", scores_at]
    model.run_with_hooks(ids, fwd_hooks=[(p, keep(p)) for p in points])
    before = seen[scores_at]
    written = {
        ("attn", 0): seen["blocks.0.attn.hook_out"],
        ("mlp", 0): seen["blocks.0.mlp.hook_out"],
        ("embed", -1): seen["embed.hook_out"],
    }
    values = found.key_side + found.rest_side if side == "key" else found.query_side
    for component, part in written.items():
        share = projected(hf, name, layer, side[0], stream_norm(hf, name, layer, seen["blocks.1.hook_in"], part))

        def remove(tensor: Tensor, hook: Any, share: Tensor = share) -> Tensor:
            return tensor - share[None]

        edits = [(attention_hook(layer, f"hook_{side[0]}"), remove), (scores_at, keep("after"))]
        model.run_with_hooks(ids, fwd_hooks=edits)
        for s, sink in enumerate(SINKS):
            for head in range(4):
                was = naive_margins(model, before[head], layer, head, sink)["gap"]
                now = naive_margins(model, seen["after"][head], layer, head, sink)["gap"]
                said = float(values[s, layer, head, found.components.index(component)])
                assert was - now == pytest.approx(said, abs=2e-4), (component, head)
    assert values[:, layer].nan_to_num().abs().max() > 0.05


@pytest.mark.parametrize(("name", "free"), [("gpt2", True), ("bert", True), ("qwen2", False)])
def test_a_constant_in_b_k_cancels_without_rope_only(name: str, free: bool) -> None:
    hf, model = build_pair(name)
    changed = copy.deepcopy(hf)
    with torch.no_grad():
        for key, bias in changed.named_parameters():
            if key.endswith(("c_attn.bias", "key.bias", "k_proj.bias")):
                (bias[32:64] if "c_attn" in key else bias).add_(0.7)
    other = sl.load_model(changed)
    before, after = decomposed(model), decomposed(other)
    by_bias = after.number("content_bk") + after.number("bq_bk")
    same = [NUMBERS.index(n) for n in ("margin", "gap", "bias_share", "key_side", "distance", "sigma")]
    gap = (after.values[:2, 0] - before.values[:2, 0])[..., same].nan_to_num().abs().max()
    if free:
        assert by_bias[:, 0].abs().max() < 1e-5
        assert gap < 1e-4
    else:
        assert by_bias[:, 0].abs().max() > 0.05
        assert gap > 0.05


def test_means_and_bias_share_follow_the_formulas_on_llama() -> None:
    """Means over the other documents before RoPE, rotated by Hugging Face's own function."""
    hf = build("llama")
    with torch.no_grad():  # peaked attention, so that the share of a sink varies over queries
        for block in hf.model.layers:
            block.self_attn.q_proj.weight *= 12
    model = sl.load_model(copy.deepcopy(hf))
    ids = torch.stack(random_rows((LENGTH,) * 3))
    found = decomposed(model)
    layer = 1
    seen: dict[str, Tensor] = {}
    known = 0

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach().clone()

        return hook

    names = [attention_hook(layer, p) for p in ("hook_q", "hook_k", "hook_attn_scores")]
    model.run_with_hooks(ids, fwd_hooks=[(n, keep(n)) for n in names])
    q, k, scores = (seen[n] for n in names)
    k = k.repeat_interleave(2, 2)
    rest = [p for p in range(LENGTH) if p not in SINKS]
    cos, sin = hf.model.rotary_emb(q, torch.arange(LENGTH)[None])

    def turned(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x[None, None], x[None, None], cos, sin)[0][0, 0].double()

    for head in range(4):
        q_bar, k_bar = q[1:, rest, head].mean((0, 1)), k[1:, rest, head].mean((0, 1))
        whole_q, whole_k = turned(q[0, :, head]), turned(k[0, :, head])
        flat_q, flat_k = turned(q_bar.expand(LENGTH, -1)), turned(k_bar.expand(LENGTH, -1))
        for s, sink in enumerate(SINKS):
            sums: dict[str, list[float]] = {name: [] for name in (*MEANS, "sigma", "guess")}
            for i in range(sink + 16, LENGTH):
                keys = [j for j in rest if j <= i]
                pairs = {
                    "distance": (flat_q, flat_k),
                    "key_side": (flat_q, whole_k - flat_k),
                    "query_distance": (whole_q - flat_q, flat_k),
                    "query_specific": (whole_q - flat_q, whole_k - flat_k),
                }
                gaps = {
                    n: float(a[i] @ (b[sink] - sum(b[j] for j in keys) / len(keys))) * 8**-0.5
                    for n, (a, b) in pairs.items()
                }
                for n, value in gaps.items():
                    sums[n].append(value)
                row = scores[0, head, i].double()
                margin = float(row[sink] - row[keys].logsumexp(0))
                guess = margin - gaps["query_distance"] - gaps["query_specific"]
                sums["sigma"].append(float(torch.tensor(margin).double().sigmoid()))
                sums["guess"].append(float(torch.tensor(guess).double().sigmoid()))
            for n in MEANS:
                assert float(found.number(n)[s, layer, head]) == pytest.approx(sum(sums[n]) / len(sums[n]), abs=1e-5)
            sigma, guess_at = sums["sigma"], sums["guess"]
            mean = sum(sigma) / len(sigma)
            share = 1 - sum((a - b) ** 2 for a, b in zip(sigma, guess_at, strict=True)) / sum(
                (a - mean) ** 2 for a in sigma
            )
            spread = math.sqrt(sum((a - mean) ** 2 for a in sigma) / len(sigma))
            ours = float(found.number("bias_share")[s, layer, head])
            if mean >= 0.05 and spread >= 0.02:
                known += 1
                assert ours == pytest.approx(share, abs=1e-3)
            else:
                assert math.isnan(ours)
    assert known >= 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-oss", "bert"])
def test_what_is_written_follows_the_pattern(name: str) -> None:
    _, model = build_pair(name)
    facts = sl.models.capabilities(model)
    ids = torch.stack(random_rows((LENGTH,) * 3))
    found = decomposed(model)
    layer, seen = 1, {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach().clone()

        return hook

    points = ("hook_pattern", "hook_v")
    model.run_with_hooks(ids[:1], fwd_hooks=[(attention_hook(layer, p), keep(p)) for p in points])
    pattern = seen["hook_pattern"][0].double()
    values = seen["hook_v"][0].double().repeat_interleave(facts.n_heads // facts.n_kv_heads, 1)
    bias = model.blocks[layer].attn.b_V
    if bias is not None:
        values = values - bias.detach().double().view(-1, 8).repeat_interleave(facts.n_heads // facts.n_kv_heads, 0)
    w_o = model.blocks[layer].attn.W_O.detach().double()
    for head in range(facts.n_heads):
        written = values[:, head] @ w_o[head]
        for s, sink in enumerate(SINKS):
            queries = [i for i in range(LENGTH) if abs(i - sink) >= 16 and sink in visible(facts, layer, i)]
            rest = [[j for j in visible(facts, layer, i) if j not in SINKS] for i in queries]
            p = pattern[head]
            mass = sum(float(p[i, sink]) for i in queries) / len(queries)
            other = sum(
                float(torch.stack([p[i, j] * written[j] for j in keys]).sum(0).norm())
                for i, keys in zip(queries, rest, strict=True)
            ) / len(queries)
            usual = sum(float(written[j].norm()) for j in range(LENGTH) if j not in SINKS) / (LENGTH - len(SINKS))
            both = [p[i, 0] * written[0] + p[i, 3] * written[3] for i in range(LENGTH) if float(p[i, SINKS].sum()) > 0]
            units = torch.stack([w / w.norm() for w in both])
            expected = {
                "direction": float(units.mean(0).norm()),
                "mass": mass,
                "written": mass * float(written[sink].norm()),
                "written_rest": other,
                "value_ratio": float(written[sink].norm()) / usual,
            }
            for number, value in expected.items():
                assert float(found.number(number)[s, layer, head]) == pytest.approx(value, rel=1e-4, abs=1e-6), number


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_direct_writes_follow_the_norms_by_hand(name: str) -> None:
    """To the logits, to the stream, and beside other documents; Gemma's norm behind attention included."""
    hf: Any
    hf, model = build_pair(name)
    ids = torch.stack(random_rows((LENGTH,) * 3))
    found = decomposed(model)
    layer, seen = sl.models.capabilities(model).n_layers - 1, {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach().double().clone()

        return hook

    names = [attention_hook(layer, p) for p in ("hook_pattern", "hook_v")]
    names += ["ln_final.hook_in", f"blocks.{layer}.hook_in"]
    names += [f"blocks.{layer}.ln1_post.hook_in"] if name == "gemma3" else []
    model.run_with_hooks(ids, fwd_hooks=[(n, keep(n)) for n in names])
    pattern, values, x, stream = (seen[n] for n in names[:4])
    values = values.repeat_interleave(2, 2)
    final_gain = hf.model.norm.weight.detach().double() + (1 if name == "gemma3" else 0)
    scale = (x[0].pow(2).mean(-1) + 1e-6).rsqrt()
    post_gain, post_scale = torch.ones(32).double(), torch.ones(LENGTH).double()
    if name == "gemma3":
        post_gain = hf.model.layers[layer].post_attention_layernorm.weight.detach().double() + 1
        post_scale = (seen[names[4]][0].pow(2).mean(-1) + 1e-6).rsqrt()
    unembed = hf.lm_head.weight.detach().double()
    window = sl.models.capabilities(model).windows[layer] or LENGTH
    queries = [i for i in range(16, LENGTH) if i < window]
    w_o = model.blocks[layer].attn.W_O.detach().double()
    added = {i: torch.zeros(32).double() for i in queries}
    for head in range(4):
        vector = values[0, 0, head] @ w_o[head]
        targets, squares = [], []
        for i in queries:
            written = pattern[0, head, i, 0] * vector * post_gain * post_scale[i]
            added[i] += written
            if i == LENGTH - 1:
                continue
            logits = unembed @ (written * scale[i] * final_gain)
            logits = logits - logits.mean()
            targets.append(float(logits[ids[0, i + 1]]))
            squares.append(float(logits.pow(2).mean().sqrt()))
        ours = {n: float(found.number(n)[0, layer, head]) for n in ("logit_target", "logit_rms", "same_elsewhere")}
        assert ours["logit_target"] == pytest.approx(sum(targets) / len(targets), abs=1e-5)
        assert ours["logit_rms"] == pytest.approx(sum(squares) / len(squares), rel=1e-3)
        others = (values[1, 0, head] + values[2, 0, head]) / 2 @ w_o[head]
        expected = float(torch.cosine_similarity(vector, others, dim=0))
        assert ours["same_elsewhere"] == pytest.approx(expected, abs=1e-4)
    share = sum(float(added[i].norm() / stream[0, i].norm()) for i in queries) / len(queries)
    assert float(found.number("residual_share")[0, layer, 0]) == pytest.approx(share, rel=1e-3)


def test_bad_input_is_refused() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((LENGTH,) * 2))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sinks": [LENGTH]}, "out of range"),
        ({"sinks": [0], "effects": "heads"}, "effects must be"),
        ({"sinks": [0], "metrics": ("accuracy",)}, "metrics of the 2x2"),
        ({"sinks": ["learned"]}, "constant per head"),
        ({"sinks": [0], "exact_heads": 0}, "at least 1"),
        ({"sinks": [0], "most_scored": 0}, "at least 1"),
    ]
    for options, words in cases:
        with pytest.raises(sl.BadInputError, match=words):
            sl.decompose_sinks(model, ids, **options)
    _, encoder = build_pair("bert")
    with pytest.raises(sl.BadInputError, match="no next token"):
        sl.decompose_sinks(encoder, ids, [0], metrics=("loss",))
    _, latent = build_pair("deepseek-v3")
    with pytest.raises(sl.UnsupportedModelError, match="MLA"):
        sl.decompose_sinks(latent, ids, [0], effects=())


def test_result_is_written_and_read_whole(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    found = decomposed(model, effects=("all", "layer", "head"), exact_heads=2)
    again = sl.decompose.SinkDecomposition.load(found.save(tmp_path / "found.safetensors"))
    assert torch.equal(again.values.nan_to_num(), found.values.nan_to_num())
    assert again.summary() == found.summary()
    assert again.to_dataframe().equals(found.to_dataframe())
    for scope, square in found.effects.items():
        assert again.effects[scope].to_dataframe().equals(square.to_dataframe())
    assert again.claims is not None
    assert found.claims is not None
    assert again.claims.to_dataframe().equals(found.claims.to_dataframe())
    assert len(found.to_dataframe()) == 6 * 2 * 4
    for what, options in (("gap", {"split": "parameters"}), ("components", {}), ("plane", {})):
        assert found.plot(what, **options).to_json() == again.plot(what, **options).to_json()
    with pytest.raises(sl.BadInputError, match="plot"):
        found.plot("nothing")


def test_sinks_without_far_queries_are_left_out_not_spread() -> None:
    _, model = build_pair("llama")
    late = decomposed(model, layers=None)
    ids = torch.stack(random_rows((LENGTH,) * 3))
    mixed = sl.decompose_sinks(model, ids, [0, 55], effects=(), progress=False)
    assert mixed.number("margin")[1::2].isnan().all()
    assert set(mixed.heads().sinks) == {3}
    assert set(mixed.heads()["class"]) == {"none"}
    table = mixed.component_table("key")
    assert table.nats.notna().all()
    assert set(table.sinks) == {3}
    assert mixed.plot("components").data
    none = sl.decompose_sinks(model, ids, [55], effects=(), progress=False)
    assert "no query is far enough" in none.summary()
    with pytest.raises(sl.BadInputError, match="16 or more tokens away"):
        none.plot("gap")
    assert len(late.component_table("rest")) > 0


def test_numbers_do_not_depend_on_padding_or_on_what_stands_beside(tmp_path: Path) -> None:
    """Left and right padding, another order, and an explicit reference instead of the batch itself."""
    _, model = build_pair("qwen2")
    rows = random_rows((40, 60, 50))
    whole = as_tokens(model, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1))
    batch = replace(whole, mask=torch.tensor([[i < len(row) for i in range(60)] for row in rows]))
    straight = sl.decompose_sinks(model, batch, [0, 3], effects=(), progress=False)
    left = sl.decompose_sinks(model, batch.aligned(60).pad("left", 5), [0, 3], effects=(), progress=False)
    assert (straight.values - left.values).nan_to_num().abs().max() < 1e-4
    others = batch[[1, 2]]
    alone = sl.decompose_sinks(model, batch[0], [0, 3], effects=(), reference=others, progress=False)
    assert (straight.values[:2] - alone.values).nan_to_num()[..., : NUMBERS.index("mass")].abs().max() < 1e-4
    own_too = sl.decompose_sinks(model, batch[0], [0, 3], effects=(), reference=batch, progress=False)
    assert torch.equal(own_too.values.nan_to_num(), alone.values.nan_to_num())  # its own text is no other document
    with pytest.raises(sl.BadInputError, match="over other documents"):
        sl.decompose_sinks(model, batch[0], [0], effects=(), reference=batch[0], progress=False)
    (tmp_path / "half").write_bytes(straight.save(tmp_path / "whole").read_bytes()[:1000])
    with pytest.raises(sl.BadInputError, match="not a complete"):
        sl.decompose.SinkDecomposition.load(tmp_path / "half")


def test_the_cell_without_mass_is_as_long_as_the_formula_says() -> None:
    """|o_R + sigma (o_S - b_V)| / |z| for S = {0}, although 3 is a known sink too."""
    _, model = build_pair("qwen2")
    ids = torch.stack(random_rows((LENGTH,) * 2))
    found = sl.decompose_sinks(model, ids, [0], effects=(), progress=False)
    layer, seen = 1, {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor[0].detach().double().clone()

        return hook

    points = ("hook_pattern", "hook_v")
    model.run_with_hooks(ids[:1], fwd_hooks=[(attention_hook(layer, p), keep(p)) for p in points])
    values = seen["hook_v"].repeat_interleave(2, 1)
    attention: Any = model.blocks[layer].attn
    b_v = attention.b_V.detach().double().view(-1, 8).repeat_interleave(2, 0)
    for head in range(4):
        ratios = []
        for i in range(16, LENGTH):
            p = seen["hook_pattern"][head, i]
            others = sum(p[j] * values[j, head] for j in range(1, i + 1)) / (1 - p[0])
            cell = others + p[0] * (values[0, head] - b_v[head])
            z = sum(p[j] * values[j, head] for j in range(i + 1))
            ratios.append(float(torch.as_tensor(cell).norm() / torch.as_tensor(z).norm()))
        ours = float(found.number("off_manifold")[0, layer, head])
        assert ours == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_low_precision_is_refused_in_words() -> None:
    hf: Any = build("llama")
    hf = hf.to(torch.bfloat16)
    with pytest.raises(sl.UnsupportedModelError, match="float32"):
        sl.decompose_sinks(sl.load_model(hf), torch.stack(random_rows((LENGTH,) * 2)), [0])
