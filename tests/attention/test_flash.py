"""The flash backend against the hooks backend, and what the context puts back."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any, cast

import pytest
import torch
from architectures import build, build_pair, random_rows
from batches import batch_of, left
from editing import SIMPLE, SINKS, WITH_REFERENCE
from state import attention_settings
from torch import Tensor

import sinklens as sl
from sinklens.attention.backend import running
from sinklens.attention.flash_proof import unsupported
from sinklens.attention.interface import NAME

REACHED = (
    "gpt2", "llama", "qwen2", "neox", "gemma3", "gpt-oss", "mistral", "gemma2", "qwen3", "olmo2", "opt", "bert", "phi3",
    "mixtral", "deepseek-v3", "roberta",
)  # fmt: skip
NO_ROTATED_KEYS = ("neox", "phi3", "deepseek-v3")
MODES = SIMPLE + WITH_REFERENCE


@functools.cache
def one_of(name: str) -> Any:
    """A model that many tests use in turn: the context leaves it as it was."""
    return build_pair(name)[1]


@pytest.mark.parametrize("name", REACHED)
def test_plain_forwards_agree_whatever_the_padding(name: str) -> None:
    _, model = build_pair(name)
    assert unsupported(model) == ""
    right = batch_of(model, random_rows((70, 57, 9)))
    for tokens in (right, left(right), left(right).pad("right", 3)):
        before = attention_settings(model)
        plain = model(tokens.ids, attention_mask=tokens.mask)
        with sl.flash(model) as run, torch.no_grad():
            found = model(tokens.ids, attention_mask=tokens.mask)
            assert attention_settings(model)[0] == NAME
        assert list(run.paths) == [f"blocks.{n}.attn" for n in range(model.cfg.n_layers)]
        assert (found - plain)[tokens.mask].abs().max() < 2e-5
        assert attention_settings(model) == before
        assert torch.equal(model(tokens.ids, attention_mask=tokens.mask), plain)


@pytest.mark.parametrize(("mode", "options"), MODES, ids=[f"{m}-{o}" for m, o in MODES])
@pytest.mark.parametrize("name", REACHED)
def test_every_mode_agrees_with_the_hooks_backend(name: str, mode: Any, options: dict[str, Any]) -> None:
    model = one_of(name)
    if mode == "fixed_key" and name in NO_ROTATED_KEYS:
        with pytest.raises(sl.UnsupportedModelError):
            sl.ablate_sinks(model, [0], mode, reference=torch.stack(random_rows((60, 60))))
        return
    ids = torch.stack(random_rows((53, 53)))
    needs = {"reference": torch.stack(random_rows((60, 60, 60), seed=5))} if (mode, options) in WITH_REFERENCE else {}
    padded = left(batch_of(model, random_rows((53, 40))))
    choices: list[dict[str, Any]] = [{}, {"heads": [0, 3]}, {"layers": 1}]
    for choice in choices:
        hooks = sl.ablate_sinks(model, sorted(SINKS), mode, **options, **needs, **choice)
        with torch.no_grad():
            want = model.run_with_hooks(ids, fwd_hooks=hooks)
            with sl.flash(model):
                found = model.run_with_hooks(ids, fwd_hooks=hooks)
            assert (found - want).abs().max() < 3e-5
            assert (found - model(ids)).abs().max() > 0.03
            if not choice:
                want = model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
                with sl.flash(model):
                    found = model.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
                assert (found - want)[padded.mask].abs().max() < 3e-5


@pytest.mark.parametrize("others", [[], [0], [0, 2]])
@pytest.mark.parametrize(
    ("mode", "options"),
    [("renormalize", {}), ("scale", {"g": 0.3}), ("null", {}), ("move", {"target": 3}), ("uniform", {})],
)
def test_a_learned_sink_alone_or_with_others_agrees(mode: Any, options: dict[str, Any], others: list[int]) -> None:
    _, model = build_pair("gpt-oss")
    ids = torch.stack(random_rows((53, 53)))
    hooks = sl.ablate_sinks(model, ["learned", *others], mode, **options)
    with torch.no_grad():
        want = model.run_with_hooks(ids, fwd_hooks=hooks)
        with sl.flash(model):
            found = model.run_with_hooks(ids, fwd_hooks=hooks)
        assert (found - want).abs().max() < 3e-5
        assert (found - model(ids)).abs().max() > 1e-3


def test_which_path_runs_is_shown() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((53, 53)))
    cases: list[tuple[Any, str]] = [
        ([], "fused"),
        (sl.ablate_sinks(model, [0, 2]), "compressed"),
        (sl.swap_attention(model, "clipped"), "pattern"),
        (sl.ablate_sinks(model, [0], heads=[1]), "blocked"),
    ]
    for hooks, path in cases:
        with sl.flash(model) as run, torch.no_grad():
            model.run_with_hooks(ids, fwd_hooks=hooks)
        assert set(run.paths.values()) == {path}
    _, windowed = build_pair("mistral")
    with sl.flash(windowed) as run, torch.no_grad():
        windowed(ids)
        assert set(run.paths.values()) == {"blocked"}
        windowed(ids[:, :40])
        assert set(run.paths.values()) == {"fused"}  # the window hides nothing


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "opt", "bert"])
def test_other_edits_agree_too(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((70, 70)))
    composed = [*sl.ablate_sinks(model, [0], "zero"), *sl.swap_attention(model, "off-by-one")]
    edits: list[Any] = [
        sl.swap_attention(model, "off-by-one"),
        sl.swap_attention(model, "learned-logit", logit=2.0, heads=[1]),
        sl.swap_attention(model, "clipped"),
        sl.restrict_attention(model, sinks=2, recent=10),
        sl.ablate_sinks(model, lambda ids: ids == ids[:, :1], "scale", g=0.3),
        sl.ablate_residual(model, [0, 5], "rescale", reference=torch.stack(random_rows((60, 60, 60), seed=5))),
        composed,
    ]
    for hooks in edits:
        with torch.no_grad():
            want = model.run_with_hooks(ids, fwd_hooks=hooks)
            with sl.flash(model):
                found = model.run_with_hooks(ids, fwd_hooks=hooks)
        assert (found - want).abs().max() < 3e-5
        assert (found - model(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "mistral"])
def test_sinks_of_their_own_sequences_and_mass_to_ordinary_tokens_only(name: str) -> None:
    from batches import planted_map

    _, model = build_pair(name)
    rows = random_rows((70, 40))
    sinks = planted_map(
        model,
        rows,
        {
            (0, 0): ("primary", range(2)),
            (0, 5): ("secondary", range(1)),
            (1, 3): ("primary", range(2)),
            (1, 9): ("secondary", range(1, 2)),
        },
    )
    tokens = left(batch_of(model, rows))
    for chosen in (sinks, sinks.primary):
        choices: list[dict[str, Any]] = [
            {},
            {"to": "ordinary"},
            {"mode": "zero", "to": "ordinary"},
            {"mode": "uniform"},
        ]
        for options in choices:
            hooks = sl.ablate_sinks(model, chosen, **options)
            with torch.no_grad():
                want = model.run_with_hooks(tokens.ids, attention_mask=tokens.mask, fwd_hooks=hooks)
                with sl.flash(model):
                    found = model.run_with_hooks(tokens.ids, attention_mask=tokens.mask, fwd_hooks=hooks)
            assert (found - want)[tokens.mask].abs().max() < 3e-5


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "gpt2"])
def test_an_exception_inside_leaves_nothing_behind(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((20,)))
    before, plain = attention_settings(model), model(ids)

    def fail(tensor: Tensor, hook: Any) -> None:
        raise RuntimeError("a user's mistake")

    hooks = sl.ablate_sinks(model, [0], "zero")
    places = ["blocks.1.hook_in", "blocks.1.attn.hook_in"] + ([] if name == "gpt2" else ["blocks.1.attn.hook_q"])
    for place in places:
        for inside in (True, False):
            context = sl.flash(model) if inside else contextlib.nullcontext()
            with pytest.raises(RuntimeError, match="mistake"), torch.no_grad(), context:
                model.run_with_hooks(ids, fwd_hooks=[*hooks, (place, fail)])
            assert torch.equal(model(ids), plain)
            assert attention_settings(model) == before
            assert running(model) is None
            with sl.flash(model), torch.no_grad():
                again = model(ids)
                with pytest.raises(RuntimeError, match="mistake"):
                    model.run_with_hooks(ids, fwd_hooks=[*hooks, (place, fail)])
                assert torch.equal(model(ids), again)  # no edit waits for the next forward


def test_contexts_nest_and_the_host_can_be_asked_in_between() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((80,)))
    before, plain = attention_settings(model), model(ids)
    with torch.no_grad(), sl.flash(model) as outer:
        fast = model(ids)
        with sl.flash(model) as inner:
            assert running(model) is inner
            assert torch.equal(model(ids), fast)
            patterns = sl.sink_scores(model, ids, backend="hooks")  # suspends both
            assert running(model) is inner
        assert running(model) is outer
        assert torch.equal(model(ids), fast)
        torch.testing.assert_close(sl.sink_scores(model, ids).alpha, patterns.alpha, atol=1e-6, rtol=0)
        assert running(model) is outer
    assert attention_settings(model) == before
    assert torch.equal(model(ids), plain)


def test_two_models_do_not_meet() -> None:
    _, one = build_pair("llama")
    _, other = build_pair("llama", seed=1)
    ids = torch.stack(random_rows((20,)))
    want = one(ids), other(ids)
    with sl.flash(one), torch.no_grad():
        assert running(other) is None
        assert torch.equal(other(ids), want[1])
        with sl.flash(other):
            assert (one(ids) - want[0]).abs().max() < 2e-5
            assert (other(ids) - want[1]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    from editing import greedy

    _, model = build_pair(name)
    prompt = torch.stack(random_rows((9,)))
    for hooks in ([], sl.ablate_sinks(model, [0], "zero"), sl.restrict_attention(model, sinks=1, recent=6)):
        with sl.flash(model), torch.no_grad(), model.hooks(fwd_hooks=hooks):
            found = greedy(model, prompt, True)
            assert torch.equal(found, greedy(model, prompt, False))
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            assert torch.equal(found, greedy(model, prompt, True))


def test_what_cannot_fire_is_refused() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    for point in ("hook_pattern", "hook_attn_scores", "hook_rot_k"):
        name = f"blocks.1.attn.{point}"
        with sl.flash(model), pytest.raises(sl.UnsupportedModelError, match="cannot fire"), torch.no_grad():
            model.run_with_hooks(ids, fwd_hooks=[(name, lambda t, hook: None)])
    with sl.flash(model), torch.no_grad():
        seen: list[Tensor] = []
        model.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", lambda t, hook: seen.append(t))])
        assert seen[0].shape == (1, 20, 4, 8)
    _, gpt2 = build_pair("gpt2")
    with sl.flash(gpt2), pytest.raises(sl.UnsupportedModelError, match="hook_z|o.hook_in"), torch.no_grad():
        gpt2.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_z", lambda t, hook: t * 2)])


def test_what_the_backend_cannot_do_is_refused() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    with sl.flash(model), pytest.raises(sl.UnsupportedModelError, match="no gradients"):
        model.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_in", lambda t, hook: t.requires_grad_())])
    packed = torch.tensor([[*range(8), *range(12)]])
    with sl.flash(model), pytest.raises(sl.BadInputError, match="pack several"), torch.no_grad():
        model(ids, position_ids=packed, use_cache=False)
    for name in ("bloom", "falcon"):
        with pytest.raises(sl.UnsupportedModelError, match="AttentionInterface"), sl.flash(build_pair(name)[1]):
            pass
    with pytest.raises(sl.UnsupportedModelError, match="AttentionInterface"):
        sl.sink_scores(build_pair("gpt-neo")[1], ids, backend="flash")
    assert sl.sink_scores(build_pair("gpt-neo")[1], ids).info["backend"] == "hooks"


def test_hooks_bound_to_a_backend_refuse_the_other() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    bound = {way: sl.ablate_sinks(model, [0], backend=way) for way in ("hooks", "flash")}
    with pytest.raises(sl.SinklensError, match="inside 'with sinklens.flash"):
        model.run_with_hooks(ids, fwd_hooks=bound["flash"])
    with sl.flash(model), pytest.raises(sl.SinklensError, match="outside sinklens.flash"):
        model.run_with_hooks(ids, fwd_hooks=bound["hooks"])
    with sl.flash(model), torch.no_grad():
        found = model.run_with_hooks(ids, fwd_hooks=bound["flash"])
    assert (found - model.run_with_hooks(ids, fwd_hooks=bound["hooks"])).abs().max() < 2e-5
    with pytest.raises(sl.BadInputError, match="backend must be"):
        sl.ablate_sinks(model, [0], backend=cast(Any, "fast"))


def test_a_mean_that_is_there_already_is_exactly_nothing() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((40, 40)))
    same = ids.clone()
    same[:, 0] = same[0, 0]
    for mode in ("mean_value", "fixed_key"):
        hooks = sl.ablate_sinks(model, [0], mode, reference=same, allow_identity=True)
        with sl.flash(model), torch.no_grad():
            assert torch.equal(model.run_with_hooks(same, fwd_hooks=hooks), model(same))
        hooks = sl.ablate_sinks(model, [0], mode, reference=same)
        with sl.flash(model), pytest.raises(sl.BadInputError, match="change nothing"), torch.no_grad():
            model.run_with_hooks(same, fwd_hooks=hooks)


def test_left_padding_is_known_to_edits_of_the_residual_stream() -> None:
    _, model = build_pair("llama")
    tokens = left(batch_of(model, random_rows((30, 20))))
    hooks = sl.ablate_residual(model, [0], "rescale", reference=torch.stack(random_rows((60, 60, 60), seed=5)))
    with sl.flash(model), pytest.raises(sl.BadInputError, match="padded on the left"), torch.no_grad():
        model.run_with_hooks(tokens.ids, attention_mask=tokens.mask, fwd_hooks=hooks)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "opt"])
def test_experiments_agree(name: str) -> None:
    _, model = build_pair(name)
    tokens = batch_of(model, random_rows((90, 70)))
    found = {}
    for way in ("hooks", "flash"):
        edits = {
            "first": sl.ablate_sinks(model, [0]),
            "zero": sl.ablate_sinks(model, [0, 3], "zero", heads=[0]),
            "window": sl.restrict_attention(model, sinks=1, recent=20),
        }
        found[way] = sl.run_experiment(model, tokens, edits, controls=("random", "recent"), backend=way)
        assert found[way].info["backend"] == way
    for metric, values in found["hooks"].metrics.items():
        torch.testing.assert_close(values, found["flash"].metrics[metric], atol=3e-5, rtol=0, equal_nan=True)
    for a, b in zip(found["hooks"].side, found["flash"].side, strict=True):
        assert (a["new_sinks"], a["lost_sinks"]) == (b["new_sinks"], b["lost_sinks"])
        for key in ("freed", "to_edited", "to_other_sinks", "to_ordinary", "to_nothing", "entropy", "median_norm"):
            if name == "opt" and key not in ("entropy", "median_norm"):
                assert a[key] != a[key]  # the host shows the edited pattern only: not known, not 0
                assert b[key] == b[key]
            else:
                assert a[key] == pytest.approx(b[key], abs=2e-5)


def test_an_experiment_with_hooks_that_cannot_fire_takes_the_host() -> None:
    _, model = build_pair("llama")
    tokens = batch_of(model, random_rows((40,)))
    own = [("blocks.1.attn.hook_pattern", lambda t, hook: t.roll(1, 1))]
    assert sl.run_experiment(model, tokens, {"own": own}, controls=()).info["backend"] == "hooks"
    with pytest.raises(sl.UnsupportedModelError, match="hook_pattern"):
        sl.run_experiment(model, tokens, {"own": own}, controls=(), backend="flash")
    bound = sl.ablate_sinks(model, [0], backend="hooks")
    assert sl.run_experiment(model, tokens, {"bound": bound}, controls=()).info["backend"] == "hooks"
    with pytest.raises(sl.BadInputError, match="built with backend=hooks"):
        sl.run_experiment(model, tokens, {"bound": bound}, controls=(), backend="flash")


def test_scores_of_an_edited_model_are_taken_by_the_host() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((80,)))
    with model.hooks(fwd_hooks=sl.ablate_sinks(model, [0])):
        scores = sl.sink_scores(model, ids)
        with pytest.raises(sl.UnsupportedModelError, match="edited attention"):
            sl.sink_scores(model, ids, backend="flash")
    assert scores.info["backend"] == "hooks"
    assert scores.alpha[0, :, :, 0].max() < 0.05  # row 0 alone keeps it: 1 of 80 queries


def test_half_precision_runs() -> None:
    hf: Any = build("llama")
    hf.to(torch.bfloat16)
    model = sl.load_model(copy.deepcopy(hf))
    ids = torch.stack(random_rows((80,)))
    with torch.no_grad():
        want = sl.sink_scores(model, ids, backend="hooks")
        found = sl.sink_scores(model, ids, backend="flash")
    assert found.alpha.dtype == torch.float32
    assert (found.alpha - want.alpha).abs().max() < 2e-2  # the host's patterns are rounded to bfloat16


def test_wrapped_hooks_work_or_are_refused_but_never_lost() -> None:
    ids = torch.stack(random_rows((20,)))

    def wrapped(hooks: Any) -> list[Any]:
        return [(name, lambda t, hook, own=own: own(t, hook=hook)) for name, own in hooks]

    _, model = build_pair("llama")
    hooks = sl.ablate_sinks(model, [0])
    with sl.flash(model), torch.no_grad():
        want = model.run_with_hooks(ids, fwd_hooks=hooks)
        with pytest.raises(sl.UnsupportedModelError, match="cannot fire"):
            model.run_with_hooks(ids, fwd_hooks=wrapped(hooks))
        arming = [(n, f) for n, f in wrapped(hooks) if n.endswith(("attn.hook_in", "embed.hook_in"))]
        assert torch.equal(model.run_with_hooks(ids, fwd_hooks=arming), want)
    _, delegating = build_pair("opt")
    with pytest.raises(sl.SinklensError, match="as they are"):
        delegating.run_with_hooks(ids, fwd_hooks=wrapped(sl.ablate_sinks(delegating, [0])))


def test_sweeps_run_on_the_host_also_inside_a_context() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((40,)))
    want = sl.sweep_ablation(model, ids, [0]).to_dataframe()
    with sl.flash(model):
        found = sl.sweep_ablation(model, ids, [0]).to_dataframe()
    assert found.equals(want)
    _, delegating = build_pair("opt")
    with pytest.raises(sl.UnsupportedModelError, match="first-order estimate"):
        sl.sweep_ablation(delegating, ids, [0], over="layer-head", estimate=True)
    swept = sl.sweep_ablation(delegating, ids, [0], over="head")
    assert swept.metrics["loss"].abs().max() > 1e-3
