"""StreamingLLM in one forward against a cache that really rolls, and against loops over every query's own cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import _LLAMA, build_pair, random_rows
from batches import batch_of, left, planted_map
from naive_streaming import naive
from state import attention_settings
from torch import Tensor

import sinklens as sl
from sinklens.streaming import StreamingCache, streaming_attention
from sinklens.streaming.rotary import turns

REACHED = ("llama", "qwen2", "neox", "gemma3", "gemma2", "mistral", "gpt-oss", "qwen3", "olmo2", "phi3", "deepseek-v3")
LOOPED = ("llama", "neox", "gemma3", "gpt-oss", "gemma2")


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    return build_pair(name)


def streamed(model: Any, ids: Tensor, sinks: Any, recent: int, **options: Any) -> Tensor:
    with streaming_attention(model, sinks=sinks, recent=recent), torch.no_grad():
        return model(ids, **options)


def rolled(model: Any, ids: Tensor, sinks: Any, recent: int) -> Tensor:
    """Logits of a text read token by token."""
    cache = StreamingCache(model, sinks=sinks, recent=recent)
    with torch.no_grad():
        steps = [model.original_model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    return torch.cat(steps, 1)


def frequencies(hf: Any) -> list[Tensor]:
    """Each layer's rotary frequencies, from the host's own tables by layer type."""
    buffers = {name.rpartition(".")[2]: buffer for name, buffer in hf.named_buffers()}
    kinds = getattr(hf.config, "layer_types", None) or [""] * hf.config.num_hidden_layers
    return [buffers[f"{kind}_inv_freq"] if f"{kind}_inv_freq" in buffers else buffers["inv_freq"] for kind in kinds]


@pytest.mark.parametrize(
    ("name", "sinks", "recent"),
    [*((name, 4, 16) for name in REACHED), ("llama", [3, 11, 40], 7), ("gemma3", [3, 11, 40], 7), ("gemma3", 6, 46)],
)
def test_one_forward_equals_the_cache_that_rolls(name: str, sinks: Any, recent: int) -> None:
    model = pair(name)[1]
    ids = torch.stack(random_rows((53, 53)))
    found, want = streamed(model, ids, sinks, recent), rolled(model, ids, sinks, recent)
    assert (found - want).abs().max() < 1e-4 * want.abs().max()
    with torch.no_grad():
        assert (found - model(ids))[:, recent + 4 :].abs().max() > 1e-2


@pytest.mark.parametrize("name", LOOPED)
def test_one_forward_equals_loops_over_every_querys_own_cache(name: str) -> None:
    hf, model = pair(name)
    ids = torch.stack(random_rows((60, 60)))
    for kept, recent in (([[0, 1], [0, 1]], 9), ([[2, 3, 30], [17]], 20), ([[0, 5], [1, 4]], 55)):
        with naive(hf, kept, recent, frequencies(hf)), torch.no_grad():
            want = hf(ids).logits
        sinks = 2 if kept[0] == [0, 1] else kept
        assert (streamed(model, ids, sinks, recent) - want).abs().max() < 1e-4 * want.abs().max()


def test_the_band_is_the_same_in_long_texts_whatever_the_blocks_of_rows() -> None:
    hf, model = pair("llama")
    ids = torch.stack(random_rows((203,)))
    for kept, recent in (([[0, 1, 70]], 20), ([[5]], 75)):  # whole blocks of rows and a rest
        with naive(hf, kept, recent, frequencies(hf)), torch.no_grad():
            want = hf(ids).logits
        assert (streamed(model, ids, kept, recent) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", REACHED)
def test_nothing_evicted_is_the_hosts_own_forward(name: str) -> None:
    model = pair(name)[1]
    ids = torch.stack(random_rows((61, 61)))
    before = attention_settings(model)
    with torch.no_grad():
        want = model(ids)
        for sinks, recent in ((4, 61), (0, 500), (61, 5), (50, 11)):
            assert (streamed(model, ids, sinks, recent) - want).abs().max() < 1e-4 * want.abs().max()
        assert attention_settings(model) == before
        assert torch.equal(model(ids), want)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "gemma2"])
def test_padding_changes_nothing(name: str) -> None:
    model = pair(name)[1]
    rows = random_rows((70, 57, 33))
    right = batch_of(model, rows)
    kept = [[0, 20], [3], [1, 2, 30]]
    alone = [streamed(model, row[None], [where], 9)[0] for row, where in zip(rows, kept, strict=True)]
    for tokens in (right, left(right).pad("right", 3)):
        found = streamed(model, tokens.ids, kept, 9, attention_mask=tokens.mask)
        for b, want in enumerate(alone):
            assert (found[b][tokens.mask[b]] - want).abs().max() < 1e-4 * want.abs().max()


def test_evicted_tokens_reach_no_later_prediction_and_kept_ones_do() -> None:
    model = pair("llama")[1]
    ids = torch.stack(random_rows((67,)))
    far = slice(40, None)  # two layers, eight recent tokens: position 20 reaches position 34 at most
    for position, sinks, reaches in ((20, 2, False), (20, [20], True), (1, 2, True), (1, 0, False)):
        other = ids.clone()
        other[0, position] = 3 + (int(ids[0, position]) - 2) % 90
        moved = (streamed(model, ids, sinks, 8) - streamed(model, other, sinks, 8))[:, far].abs().max()
        assert (moved > 1e-2) if reaches else (moved < 1e-5)


def test_sinks_of_a_map_stay_in_their_own_sequences() -> None:
    model = pair("llama")[1]
    tokens = batch_of(model, random_rows((90, 80)))
    places = {(0, 1): ("primary", range(2)), (0, 30): ("secondary", range(1)), (1, 7): ("primary", range(2))}
    found = planted_map(model, random_rows((90, 80)), places)
    kept = [[1, 30], [7]]
    both = streamed(model, tokens.ids, found, 12, attention_mask=tokens.mask)
    swapped = tokens[[1, 0]]
    other_way = streamed(model, swapped.ids, found, 12, attention_mask=swapped.mask)
    for b in range(2):
        alone = streamed(model, tokens.row(b)[None], [kept[b]], 12)[0]
        assert (both[b][tokens.mask[b]] - alone).abs().max() < 1e-4
        assert (other_way[1 - b][swapped.mask[1 - b]] - alone).abs().max() < 1e-4
    with pytest.raises(sl.BadInputError, match="none of the 2 sequences"):
        streamed(model, torch.stack(random_rows((90,), seed=8)), found, 12)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_goes_on_with_what_one_forward_predicts(name: str) -> None:
    model = pair(name)[1]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for length, sinks, more in ((12, 2, {}), (40, [0, 5], {"prefill_chunk_size": 1})):
        ids = torch.stack(random_rows((length, length)))
        cache = StreamingCache(model, sinks=sinks, recent=11)
        found = model.original_model.generate(ids, past_key_values=cache, max_new_tokens=20, **options, **more)
        predicted = streamed(model, found, sinks, 11)[:, length - 1 : -1].argmax(-1)
        assert torch.equal(found[:, length:], predicted)
        layers: list[Any] = cache.layers
        assert {layer.keys.shape[-2] for layer in layers} == {13}
        assert cache.get_seq_length() == length + 19
        cache.reset()
        again = model.original_model.generate(ids, past_key_values=cache, max_new_tokens=3, **options, **more)
        assert torch.equal(found[:, : length + 3], again)


def test_the_bridges_own_generate_takes_the_cache() -> None:
    model = pair("llama")[1]
    ids = torch.stack(random_rows((8, 8)))
    cache = StreamingCache(model, sinks=1, recent=10)
    found = model.generate(
        ids, past_key_values=cache, max_new_tokens=20, do_sample=False, stop_at_eos=False, verbose=False
    )
    assert torch.equal(found[:, 8:], streamed(model, found, 1, 10)[:, 7:-1].argmax(-1))


def test_the_cache_refuses_what_it_cannot_do_exactly() -> None:
    model = pair("llama")[1]
    ids = torch.stack(random_rows((30,)))
    cache = StreamingCache(model, sinks=2, recent=11)
    with torch.no_grad():
        model.original_model(ids[:, :13], past_key_values=cache)  # fits: nothing is evicted
        with pytest.raises(sl.BadInputError, match="prefill_chunk_size=1"):
            model.original_model(ids[:, 13:15], past_key_values=cache)
    with pytest.raises(sl.UnsupportedModelError, match="pushed out is gone"):
        cache.crop(-1)
    with pytest.raises(sl.BadInputError, match="recent"):
        StreamingCache(model, recent=0)
    with pytest.raises(sl.BadInputError, match="sinks"):
        StreamingCache(model, sinks=-1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "learned"),
        ("opt", "learned"),
        ("bert", "encoder"),
        ("bloom", "AttentionInterface"),
        ("falcon", "AttentionInterface"),
    ],
)
def test_positions_that_cannot_be_counted_in_a_cache_are_refused(name: str, words: str) -> None:
    model = pair(name)[1]
    ids = torch.stack(random_rows((30,)))
    with pytest.raises(sl.UnsupportedModelError, match=words):
        streamed(model, ids, 4, 8)
    with pytest.raises(sl.UnsupportedModelError, match=words):
        StreamingCache(model)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return sl.load_model(tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, **options)).eval())


def test_scaled_rotations_are_read_off_and_those_that_depend_on_the_length_refused() -> None:
    yarn = llama(
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 4, "beta_slow": 1}
    )
    assert yarn.original_model.model.rotary_emb.attention_scaling > 1.1
    ids = torch.stack(random_rows((60,)))
    assert (streamed(yarn, ids, 3, 9) - rolled(yarn, ids, 3, 9)).abs().max() < 1e-4
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(sl.UnsupportedModelError, match="dynamic.*length"):
        streamed(dynamic, ids, 3, 9)


def test_each_layer_turns_by_its_own_table() -> None:
    hf, model = pair("gemma3")
    for turn, table in zip(turns(model), frequencies(hf), strict=True):
        assert turn.frequencies is not None
        assert torch.allclose(turn.frequencies.float(), table)
    partial = turns(pair("neox")[1])[0]
    assert partial.frequencies is not None
    assert 2 * len(partial.frequencies) < pair("neox")[1].cfg.d_head


def test_a_rotation_that_no_table_explains_is_refused() -> None:
    model = build_pair("llama")[1]
    rotary = next(m for m in model.original_model.modules() if hasattr(m, "inv_freq"))
    rotary.register_forward_hook(lambda module, args, out: (out[0], out[1] * 0.9))
    with pytest.raises(sl.UnsupportedModelError, match="does not rotate"):
        streamed(model, torch.stack(random_rows((30,))), 4, 8)


@pytest.mark.parametrize(
    ("sinks", "recent", "words"),
    [
        (4, 0, "recent"),
        (-1, 8, "sinks"),
        (True, 8, "sinks"),
        ([-3], 8, "positions"),
        ([2, 2], 8, "twice"),
        ([30], 8, "out of range"),
        ([[1], [2]], 8, "2 lists"),
        ([1, [2]], 8, "sinks must be"),
    ],
)
def test_bad_input_says_what_is_wrong(sinks: Any, recent: int, words: str) -> None:
    with pytest.raises(sl.BadInputError, match=words):
        streamed(pair("llama")[1], torch.stack(random_rows((30,))), sinks, recent)


def test_nothing_is_passed_over_in_silence_inside_the_context() -> None:
    model = pair("llama")[1]
    ids = torch.stack(random_rows((60,)))
    edit = sl.ablate_sinks(model, [0], "zero")
    before = sl.token_loss(model, ids)
    with streaming_attention(model, 2, 8) as state, torch.no_grad():
        with pytest.raises(sl.UnsupportedModelError, match="edits of attention"):
            model.run_with_hooks(ids, fwd_hooks=edit)
        with pytest.raises(sl.UnsupportedModelError, match="call it outside"):
            sl.sink_scores(model, ids)
        with pytest.raises(sl.UnsupportedModelError, match="call it outside"), streaming_attention(model, 2, 8):
            pass
        with pytest.raises(sl.BadInputError, match="StreamingCache"):
            model.original_model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model(ids)
        assert set(state.paths.values()) == {"banded"}
        assert (sl.token_loss(model, ids) - before).nan_to_num().abs().max() > 1e-2
    with torch.no_grad():
        assert torch.equal(sl.token_loss(model, ids)[:, :-1], before[:, :-1])
        assert model.original_model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 60
