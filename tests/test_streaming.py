"""StreamingLLM in one forward against a cache that really rolls, and against loops over every query's own cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from naive_streaming import naive
from torch import Tensor

from sinklens.streaming import StreamingCache, streaming_attention

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


@pytest.mark.parametrize("name", REACHED)
@pytest.mark.parametrize(("sinks", "recent"), [(4, 16), ([3, 11, 40], 7), (6, 46)])
def test_one_forward_equals_the_cache_that_rolls(name: str, sinks: Any, recent: int) -> None:
    model = pair(name)[1]
    ids = torch.stack(random_rows((67, 67)))
    found, want = streamed(model, ids, sinks, recent), rolled(model, ids, sinks, recent)
    assert (found - want).abs().max() < 1e-4 * want.abs().max()
    with torch.no_grad():
        assert (found - model(ids))[:, recent + 8 :].abs().max() > 1e-2


@pytest.mark.parametrize("name", LOOPED)
def test_one_forward_equals_loops_over_every_querys_own_cache(name: str) -> None:
    hf, model = pair(name)
    ids = torch.stack(random_rows((62, 62)))
    for kept, recent in (([[0, 1], [0, 1]], 9), ([[2, 3, 30], [17]], 20), ([[], []], 12), ([[0, 5], [1, 4]], 53)):
        with naive(hf, kept, recent, frequencies(hf)), torch.no_grad():
            want = hf(ids).logits
        sinks = 2 if kept[0] == [0, 1] else kept
        assert (streamed(model, ids, sinks, recent) - want).abs().max() < 1e-4 * want.abs().max()
