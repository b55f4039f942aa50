"""ablate_sinks against naive edits of Hugging Face models, and what the modes promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from batches import batch_of, left, planted_map
from editing import SIMPLE, SINKS, WITH_REFERENCE, bias_of, greedy, learned_of, pair_for, patterns
from naive_edits import SEEN, naive_logits, naive_row, plain_row
from torch import Tensor

import sinklens as sl

EDITABLE = ("gpt2", "llama", "qwen2", "neox", "gemma3", "gpt-oss", "mistral", "gemma2", "opt", "bert")


@pytest.mark.parametrize(("mode", "options"), SIMPLE, ids=[f"{m}-{o}" for m, o in SIMPLE])
@pytest.mark.parametrize("name", EDITABLE)
def test_mode_equals_the_naive_edit_of_the_whole_model(name: str, mode: Any, options: dict[str, Any]) -> None:
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
    facts = sl.models.capabilities(model)
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
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma3", "gemma2", "qwen3", "olmo2", "opt", "bert"])
def test_modes_with_means_equal_the_naive_edit(name: str, mode: Any, options: dict[str, Any]) -> None:
    hf, model, tolerance = pair_for(name)
    reference = random_rows((14, 14, 14), seed=5)
    means, keys, margins = naive_reference(hf, model, reference)
    ids = torch.stack(random_rows((14, 14)))

    def row(layer: int, b: int, h: int, i: int, scores: Tensor, v: Tensor, visible: list[int]) -> Tensor:
        q, _, _, scale = SEEN[layer]
        new = {p: float(q[b, h, i].double() @ keys[layer, h, p]) * scale for p in SINKS}
        if name == "gemma2":
            new = {p: 2.0 * math.tanh(score / 2.0) for p, score in new.items()}
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


@pytest.mark.parametrize("name", EDITABLE)
def test_ablated_sink_gets_no_attention_and_rows_sum_as_before(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((12, 12)))
    for pattern in patterns(model, ids, sl.ablate_sinks(model, [0, 2])):
        assert pattern[:, :, 3:, [0, 2]].abs().max() == 0
        assert pattern.isfinite().all()
        if name != "gpt-oss":
            assert (pattern.sum(-1) - 1).abs().max() < 1e-5
            if name != "bert":
                assert torch.equal(pattern[:, :, 0, 0], torch.ones_like(pattern[:, :, 0, 0]))


@pytest.mark.parametrize("name", EDITABLE)
def test_neutral_edits_change_nothing_at_all(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((12, 12)))
    plain = model(ids)
    for hooks in (
        sl.ablate_sinks(model, [0, 2], "scale", g=1.0),
        sl.ablate_sinks(model, [11], "renormalize", heads=[0]),
    ):
        edited = model.run_with_hooks(ids, fwd_hooks=hooks)
        # Position 11 is the last: only the last query sees it, so every earlier row is untouched.
        rows = slice(None) if not len(hooks) else slice(0, 0 if name == "bert" else 11)
        assert torch.equal(edited[:, rows], plain[:, rows])


@pytest.mark.parametrize("mode", ["renormalize", "zero", "mean_value", "fixed_key", "fixed_logit"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-oss"])
def test_an_edit_of_one_head_leaves_the_heads_that_share_its_keys_alone(name: str, mode: Any) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((12,)))
    reference = torch.stack(random_rows((12, 12), seed=3))
    options: dict[str, Any] = {"reference": reference} if mode in ("mean_value", "fixed_key", "fixed_logit") else {}

    def z_of_layer_0(hooks: Any) -> Tensor:
        found: list[Tensor] = []
        reading = ("blocks.0.attn.hook_z", lambda t, hook: found.append(t.detach().clone()))
        model.run_with_hooks(ids, fwd_hooks=[*hooks, reading], return_type=None)
        return found[0]

    plain = z_of_layer_0([])
    edited = z_of_layer_0(sl.ablate_sinks(model, [0], mode, layers=0, heads=[1], **options))
    assert torch.equal(plain[:, :, [0, 2, 3]], edited[:, :, [0, 2, 3]])
    assert (plain[:, :, 1] - edited[:, :, 1]).abs().max() > 1e-3
    pairs = z_of_layer_0(sl.ablate_sinks(model, [0], mode, heads=[(0, 1)], **options))
    assert torch.equal(edited, pairs)


@pytest.mark.parametrize("mode", ["renormalize", "zero", "mean_value", "fixed_key", "fixed_logit", "move"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_padding_sides_and_single_sequences_agree(name: str, mode: Any) -> None:
    _, model = build_pair(name)
    rows = random_rows((9, 14, 12))
    places = {(0, 0): ("primary", range(2)), (1, 0): ("primary", range(2)), (2, 1): ("primary", range(1, 2))}
    sinks = planted_map(model, rows, {**places, (1, 3): ("secondary", range(1))})
    options: dict[str, Any] = {"target": 5} if mode == "move" else {}
    hooks = sl.ablate_sinks(model, sinks, mode, **options)
    right = sinks.tokens
    padded = left(right)
    a = model.run_with_hooks(right.ids, attention_mask=right.mask, fwd_hooks=hooks)
    b = model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
    for i, row in enumerate(rows):
        one = model.run_with_hooks(row[None], fwd_hooks=hooks)[0]
        assert (a[i, : len(row)] - one).abs().max() < 1e-4
        assert (b[i, -len(row) :] - one).abs().max() < 1e-4
    assert (a[0, :9] - model(rows[0][None])[0]).abs().max() > 1e-2


def test_positions_count_from_the_first_unpadded_token() -> None:
    _, model = build_pair("llama")
    rows = random_rows((9, 14))
    padded = batch_of(model, rows, "left")
    hooks = sl.ablate_sinks(model, [0, 4])
    got = model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
    for i, row in enumerate(rows):
        assert (got[i, -len(row) :] - model.run_with_hooks(row[None], fwd_hooks=hooks)[0]).abs().max() < 1e-4


def test_a_sink_is_edited_in_the_layers_of_its_life_only() -> None:
    _, model = build_pair("gemma3")
    rows = random_rows((12, 13))
    sinks = planted_map(model, rows, {(0, 2): ("secondary", range(1, 2)), (1, 0): ("primary", range(3))})
    hooks = sl.ablate_sinks(model, sinks, "zero")
    first = patterns(model, rows[0][None], hooks)
    assert [float(p[:, :, 3:, 2].max()) == 0 for p in first] == [False, True, False]
    second = patterns(model, rows[1][None], hooks)
    assert [float(p[:, :, 1:, 0].max()) == 0 for p in second] == [True, True, True]
    only = patterns(model, rows[1][None], sl.ablate_sinks(model, sinks, "zero", layers=[2]))
    assert [float(p[:, :, 1:, 0].max()) == 0 for p in only] == [False, False, True]


def test_hooks_of_a_map_refuse_other_tokens_and_can_be_rebuilt_elsewhere() -> None:
    _, model = build_pair("llama")
    rows = random_rows((12, 13))
    sinks = planted_map(model, rows, {(0, 2): ("secondary", range(1, 2)), (1, 0): ("primary", range(2))})
    hooks = sl.ablate_sinks(model, sinks, "zero")
    other = random_rows((12,), seed=9)[0]
    with pytest.raises(sl.BadInputError, match="same Tokens"):
        model.run_with_hooks(other[None], fwd_hooks=hooks)
    longer = torch.cat([rows[0], other])  # a text that begins with a known sequence is a continuation of it
    assert float(patterns(model, longer[None], hooks)[1][:, :, 3:, 2].max()) == 0
    moved = hooks.at([[5], [4]])
    assert [float(p[:, :, 6:, 5].max()) == 0 for p in patterns(model, rows[0][None], moved)] == [False, True]
    anywhere = hooks.at([3])
    assert [float(p[:, :, 4:, 3].max()) == 0 for p in patterns(model, other[None], anywhere)] == [True, True]
    with pytest.raises(sl.BadInputError, match="one for each"):
        hooks.at([[1]])


def test_predicate_reads_the_ids_of_the_running_forward() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((12, 12)))
    ids[0, 4] = ids[1, 7] = 90
    ids[ids == 90] = torch.where((torch.arange(2)[:, None] * 3 + 4 == torch.arange(12)).expand(2, 12)[ids == 90], 90, 3)
    hooks = sl.ablate_sinks(model, lambda ids: ids == 90)
    found = patterns(model, ids, hooks)[0]
    assert found[0, :, 5:, 4].max() == 0
    assert found[1, :, 8:, 7].max() == 0
    assert found[0, :, 8:, 7].max() > 0
    with pytest.raises(sl.BadInputError, match="selects no token"):
        model.run_with_hooks(ids, fwd_hooks=sl.ablate_sinks(model, lambda ids: ids == 95))
    with pytest.raises(sl.BadInputError, match="bool mask"):
        model.run_with_hooks(ids, fwd_hooks=sl.ablate_sinks(model, lambda ids: ids))


def test_ordinary_keys_alone_gain_when_asked() -> None:
    _, model = build_pair("llama")
    rows = random_rows((14,))
    sinks = planted_map(model, rows, {(0, 0): ("primary", range(2)), (0, 3): ("secondary", range(2))})
    plain = patterns(model, rows[0][None], [])[0]
    edited = patterns(model, rows[0][None], sl.ablate_sinks(model, sinks.secondary, to="ordinary"))[0]
    assert torch.equal(edited[:, :, 5:, 0], plain[:, :, 5:, 0])
    assert edited[:, :, 5:, 3].max() == 0
    assert (edited.sum(-1) - 1).abs().max() < 1e-5
    gain = edited[:, :, 5:, 5] / plain[:, :, 5:, 5]
    expected = 1 + plain[:, :, 5:, 3] / (1 - plain[:, :, 5:, 3] - plain[:, :, 5:, 0])
    assert (gain / expected - 1).abs().max() < 1e-4
    with pytest.raises(sl.BadInputError, match="needs a SinkMap"):
        sl.ablate_sinks(model, [3], to="ordinary")


def test_a_mean_that_is_there_already_is_refused_unless_asked_for() -> None:
    _, model = build_pair("llama")
    rows = [torch.cat([torch.tensor([1]), row]) for row in random_rows((12, 13, 12))]  # the same first token: a BOS
    sinks = planted_map(model, rows, {(b, 0): ("primary", range(2)) for b in range(3)})
    plain = model(rows[0][None])
    identities: list[tuple[Any, dict[str, Any]]]
    identities = [("mean_value", {}), ("fixed_key", {}), ("fixed_key", {"value": "mean"})]
    for mode, options in identities:
        with pytest.raises(sl.BadInputError, match="change nothing"):
            model.run_with_hooks(rows[0][None], fwd_hooks=sl.ablate_sinks(model, sinks, mode, **options))
        same = sl.ablate_sinks(model, sinks, mode, allow_identity=True, **options)
        assert torch.equal(model.run_with_hooks(rows[0][None], fwd_hooks=same), plain)
    neutral = sl.ablate_sinks(model, sinks, "fixed_key", value="neutral")
    with pytest.warns(sl.SinklensWarning, match="by construction"):
        got = model.run_with_hooks(rows[0][None], fwd_hooks=neutral)
    assert torch.equal(got, model.run_with_hooks(rows[0][None], fwd_hooks=sl.ablate_sinks(model, sinks, "zero")))
    assert any("by construction" in note for note in neutral.notes)


def test_means_leave_out_the_document_that_is_edited() -> None:
    """z of layer 0 gains exactly A (mean of the others' values - own value)."""
    _, model = build_pair("llama")
    rows = random_rows((12, 13, 14))
    sinks = planted_map(model, rows, {(b, 0): ("primary", range(1)) for b in range(3)})
    seen: dict[str, Tensor] = {}

    def look(ids: Tensor, hooks: Any) -> dict[str, Tensor]:
        names = ("hook_v", "hook_pattern", "hook_z")
        reading = [(f"blocks.0.attn.{n}", lambda t, hook, n=n: seen.update({n: t.detach().clone()})) for n in names]
        model.run_with_hooks(ids[None], fwd_hooks=[*hooks, *reading], return_type=None)
        return dict(seen)

    values = [look(row, [])["hook_v"][0, 0].repeat_interleave(2, 0) for row in rows]
    plain = look(rows[0], [])
    edited = look(rows[0], sl.ablate_sinks(model, sinks, "mean_value"))
    gain = (values[1] + values[2]) / 2 - values[0]
    expected = plain["hook_pattern"][0, :, 1:, 0].T[..., None] * gain
    assert ((edited["hook_z"] - plain["hook_z"])[0, 1:] - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1e-2


def test_a_sink_without_a_counterpart_elsewhere_keeps_its_own_and_a_note_says_so() -> None:
    _, model = build_pair("llama")
    rows = random_rows((12, 13))
    places = {(0, 0): ("primary", range(2)), (1, 0): ("primary", range(2)), (1, 4): ("secondary", range(1))}
    sinks = planted_map(model, rows, places)
    for mode in ("mean_value", "fixed_key"):
        hooks = sl.ablate_sinks(model, sinks, mode)
        alone = sl.ablate_sinks(model, sinks.primary, mode)
        got = [model.run_with_hooks(rows[1][None], fwd_hooks=h) for h in (hooks, alone)]
        assert (got[0] - got[1]).abs().max() < 1e-5
        assert any("no counterpart" in note for note in hooks.notes)
        assert not alone.notes
    lonely = planted_map(model, rows, {(0, 2): ("secondary", range(2))})
    for mode in ("mean_value", "fixed_key", "fixed_logit"):
        with pytest.raises(sl.BadInputError, match="needs other documents"):
            sl.ablate_sinks(model, lonely, mode)


def test_the_learned_sink_is_ablated_by_name() -> None:
    hf, model = build_pair("gpt-oss")
    ids = torch.stack(random_rows((12,)))
    scores = sl.sink_scores(model, ids)
    assert scores.learned_sink is not None
    plain = patterns(model, ids, [])[0]
    learned = (1 - plain.sum(-1)).mean(-1)
    assert (scores.learned_sink[:, 0] - learned).abs().max() < 1e-5
    gone = patterns(model, ids, sl.ablate_sinks(model, "learned"))
    assert all((p.sum(-1) - 1).abs().max() < 1e-5 for p in gone)
    both = patterns(model, ids, sl.ablate_sinks(model, [0, "learned"]))[0]
    assert both[:, :, 1:, 0].max() == 0
    assert (both[:, :, 1:].sum(-1) - 1).abs().max() < 1e-5

    def row(layer: int, b: int, h: int, i: int, s: Tensor, v: Tensor, visible: list[int]) -> Tensor:
        learned = learned_of(model, layer, h)
        return naive_row(s, v, visible, set(), "scale", g=0.2, learned=learned, learned_is_sink=True)

    edited = model.run_with_hooks(ids, fwd_hooks=sl.ablate_sinks(model, "learned", "scale", g=0.2))
    assert (edited - naive_logits(hf, ids, row)).abs().max() < 5e-5
    for mode in ("zero", "mean_value", "fixed_key"):
        with pytest.raises(sl.BadInputError, match="learned sink"):
            sl.ablate_sinks(model, "learned", mode)
    with pytest.raises(sl.BadInputError, match="no learned sink"):
        sl.ablate_sinks(build_pair("llama")[1], "learned")


@pytest.mark.parametrize("name", ["gpt-neo"])
def test_where_an_edit_would_be_lost_it_is_refused(name: str) -> None:
    _, model = build_pair(name)
    for mode in ("renormalize", "zero", "scale"):
        with pytest.raises(sl.UnsupportedModelError, match="delegates"):
            sl.ablate_sinks(model, [0], mode, g=0.5 if mode == "scale" else None)


def test_nothing_stays_behind_after_an_error() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((12,)))
    plain = model(ids)

    def fail(tensor: Tensor, hook: Any) -> None:
        raise RuntimeError("a user's mistake")

    hooks = sl.ablate_sinks(model, [0], "zero")
    with pytest.raises(RuntimeError, match="mistake"), model.hooks(fwd_hooks=[*hooks, ("blocks.1.hook_in", fail)]):
        model(ids)
    assert torch.equal(model(ids), plain)
    with model.hooks(fwd_hooks=hooks):
        assert not torch.equal(model(ids), plain)
    assert torch.equal(model(ids), plain)


def test_edits_compose_with_users_hooks() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((12,)))
    seen: list[float] = []
    mine = ("blocks.0.attn.hook_pattern", lambda t, hook: seen.append(float(t[:, :, 1:, 0].max())))
    model.run_with_hooks(ids, fwd_hooks=[mine, *sl.ablate_sinks(model, [0]), mine], return_type=None)
    assert seen[0] > 0
    assert seen[1] == 0


GENERATED: list[tuple[Any, dict[str, Any]]] = [
    ("renormalize", {}),
    ("zero", {}),
    ("mean_value", {"reference": True}),
    ("fixed_key", {"reference": True}),
    ("fixed_logit", {"reference": True}),
    ("move", {"target": 3}),
]


@pytest.mark.parametrize(("mode", "options"), GENERATED, ids=[m for m, _ in GENERATED])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt-oss"])
def test_generation_with_a_cache_equals_generation_without(name: str, mode: Any, options: dict[str, Any]) -> None:
    _, model = build_pair(name)
    prompt = torch.stack(random_rows((12,)))
    if "reference" in options:
        options = {"reference": torch.stack(random_rows((12, 12), seed=3))}
    found = []
    for cached in (True, False):
        with model.hooks(fwd_hooks=sl.ablate_sinks(model, [0, 2], mode, **options)):
            found.append(greedy(model, prompt, cached))
    assert torch.equal(*found)
    assert found[0].shape[1] == 76


def test_maps_and_predicates_follow_a_generation() -> None:
    _, model = build_pair("llama")
    rows = random_rows((12, 13))
    sinks = planted_map(model, rows, {(0, 2): ("secondary", range(2)), (1, 0): ("primary", range(2))})
    for where in (sinks, lambda ids: ids % 3 == 0):
        found = []
        for cached in (True, False):
            with model.hooks(fwd_hooks=sl.ablate_sinks(model, where)):
                found.append(greedy(model, rows[0][None], cached))
        assert torch.equal(*found)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sinks": []}, "sinks must be"),
    ({"sinks": [-1]}, "first unpadded"),
    ({"sinks": "bos"}, "sinks must be"),
    ({"sinks": [True]}, "sinks must be"),
    ({"mode": "remove"}, "mode must be"),
    ({"mode": "scale"}, "needs g"),
    ({"mode": "scale", "g": -1.0}, "needs g"),
    ({"mode": "scale", "g": float("nan")}, "g is NaN"),
    ({"g": 0.5}, "needs g"),
    ({"mode": "move"}, "needs a target"),
    ({"mode": "move", "target": 0}, "one of the sinks"),
    ({"to": "nobody"}, "to must be"),
    ({"neutral": "no"}, "neutral must be"),
    ({"value": "mean"}, "fixed_key and fixed_logit"),
    ({"layers": 7}, "out of range"),
    ({"layers": []}, "is empty"),
    ({"heads": [4]}, "out of range"),
    ({"heads": [(0, 9)]}, "out of range"),
    ({"heads": [(0, 1)], "layers": 0}, "pairs alone"),
    ({"backend": "magic"}, "backend must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    _, model = build_pair("llama")
    given = {"sinks": [0], **options}
    with pytest.raises(sl.BadInputError, match=message):
        sl.ablate_sinks(model, given.pop("sinks"), given.pop("mode", "renormalize"), **given)


def test_positions_that_a_sequence_does_not_have_are_refused_while_running() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((12,)))
    with pytest.raises(sl.BadInputError, match="out of range"):
        model.run_with_hooks(ids, fwd_hooks=sl.ablate_sinks(model, [12]))
    with pytest.raises(sl.BadInputError, match="out of range"):
        model.run_with_hooks(ids, fwd_hooks=sl.ablate_sinks(model, [0], "move", target=12))
    empty = planted_map(model, random_rows((12,)), {})
    with pytest.raises(sl.BadInputError, match="holds no sink"):
        sl.ablate_sinks(model, empty)
    with pytest.raises(sl.SinklensError, match="token ids"):
        model.run_with_hooks(torch.randn(1, 12, 32), fwd_hooks=sl.ablate_sinks(model, [0], layers=1), start_at_layer=1)
