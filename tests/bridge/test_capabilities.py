"""The load-time proof finds what the adapters really do; each trap of the host has its test."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import SCORED, build, build_pair
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import sinklens as sl
from sinklens.bridge.capabilities import _records, check_finite_weights, prove

# causal, rope, pattern edit, scores are logits, learned sinks, KV heads, windows
EXPECTED = {
    "gpt2": (True, False, True, True, False, 4, (None, None)),
    "llama": (True, True, True, True, False, 2, (None, None)),
    "qwen2": (True, True, True, True, False, 2, (None, None)),
    "neox": (True, True, True, True, False, 4, (None, None)),
    "gemma3": (True, True, True, True, False, 2, (50, 50, None)),
    "opt": (True, False, False, False, False, 4, (None, None)),
    "bert": (False, False, False, False, False, 4, (None, None)),
    "gpt-oss": (True, True, True, True, True, 2, (50, None)),
    "mistral": (True, True, True, True, False, 2, (50, 50)),
    "bloom": (True, False, True, True, False, 4, (None, None)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_record_says_what_the_model_does(name: str) -> None:
    facts = sl.models.capabilities(build_pair(name)[1])
    found = (
        facts.causal,
        facts.rope,
        facts.pattern_edit,
        facts.scores_are_logits,
        facts.learned_sinks,
        facts.n_kv_heads,
        facts.windows,
    )
    assert found == EXPECTED[name]
    assert facts.z_edit
    assert facts.z_is_pattern_v
    assert facts.windows_proven
    assert facts.rows_sum_to_one != facts.learned_sinks
    assert "hook_pattern" in facts.fires


@pytest.mark.parametrize("name", SCORED)
def test_a_pattern_edit_moves_the_logits_exactly_where_the_record_says_so(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(3))

    def park_on_the_first(pattern, hook):
        parked = torch.zeros_like(pattern)
        parked[..., 0] = 1
        return parked

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host warns once that the edit is discarded
        edited = model.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_pattern", park_on_the_first)])
    assert torch.equal(edited, model(ids)) != sl.models.capabilities(model).pattern_edit


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_delegating_adapters_fire_z_before_the_pattern(name: str) -> None:
    fires = sl.models.capabilities(build_pair(name)[1]).fires
    assert fires.index("hook_z") < fires.index("hook_pattern")
    fires = sl.models.capabilities(build_pair("llama")[1]).fires
    assert fires.index("hook_z") > fires.index("hook_pattern")


def test_neox_lists_rotary_hooks_that_never_fire() -> None:
    _, model = build_pair("neox")
    assert "blocks.0.attn.hook_rot_k" in model.hook_dict
    assert "hook_rot_k" not in sl.models.capabilities(model).fires


def test_a_window_that_the_configuration_hides_is_found() -> None:
    _, model = build_pair("mistral")
    config: Any = model.original_model.config
    config.sliding_window = None  # the configuration now claims full attention
    proof_model = _windowed_in_secret(model)
    with pytest.raises(sl.UnsupportedModelError, match="never attends at distances"):
        prove(proof_model)


def _windowed_in_secret(model: TransformerBridge) -> TransformerBridge:
    """A bridge whose first layer masks keys further than 4 away, which no configuration says."""

    def mask(scores, hook):
        far = torch.ones_like(scores, dtype=torch.bool).tril(-4)
        return scores.masked_fill(far, torch.finfo(scores.dtype).min)

    model.add_hook("blocks.0.attn.hook_attn_scores", mask)
    return model


def test_attention_where_none_is_declared_is_found() -> None:
    _, model = build_pair("llama")

    def see_everything(scores, hook):
        return torch.zeros_like(scores)

    model.add_hook("blocks.1.attn.hook_attn_scores", see_everything)
    with pytest.raises(sl.UnsupportedModelError, match="mixes causal and bidirectional"):
        prove(model)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_what_is_no_softmax_is_recorded_and_edits_of_it_are_refused(factor: float) -> None:
    _, model = build_pair("llama")
    assert prove(model).softmax
    model.add_hook("blocks.0.attn.hook_pattern", lambda p, hook: factor * p, is_permanent=True)
    _records.pop(model, None)  # proven when it was built
    facts = sl.models.capabilities(model)
    assert not facts.softmax
    assert facts.shares == (factor < 1)
    with pytest.raises(sl.UnsupportedModelError, match="not a softmax"):
        sl.ablate_sinks(model, [0])
    ids = torch.arange(2, 42)[None]
    if factor > 1:
        with pytest.raises(sl.UnsupportedModelError, match="sum to more than 1"):
            sl.find_sinks(model, ids)
    assert sl.sink_scores(model, ids).alpha[0, 0, 0, 0] > 0


def test_models_without_a_stack_of_blocks_are_refused_with_the_reason() -> None:
    with pytest.raises(sl.UnsupportedModelError, match="encoder-decoder"):
        sl.load_model(build("t5"))


def test_a_bridge_that_reads_images_is_refused_with_the_reason() -> None:
    vit = build("vit")
    bridge = build_bridge_from_module(vit, type(vit).__name__, hf_config=vit.config)
    with pytest.raises(sl.UnsupportedModelError, match="reads images"):
        sl.load_model(bridge)


def test_nan_weights_are_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(sl.BadInputError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        sl.load_model(model)


def test_large_finite_weights_are_not_called_nan() -> None:
    layer = torch.nn.Linear(4, 1, bias=False)
    layer.weight.data.fill_(3e38)
    check_finite_weights(layer)
    layer.weight.data[0, :2] = torch.tensor([torch.inf, -torch.inf])
    with pytest.raises(sl.BadInputError, match="holds 2 NaN or infinite"):
        check_finite_weights(layer)


def test_other_objects_are_refused() -> None:
    with pytest.raises(sl.UnsupportedModelError, match="no TransformerBridge"):
        sl.models.capabilities(torch.nn.Linear(2, 2))
