"""StreamingLLM on the real models: one forward against the cache that really rolls, and known perplexities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from command import run
from wording import TEXT_A

import sinklens as sl
from sinklens.models.fetch import fetch
from sinklens.streaming import StreamingCache, streaming_attention, streaming_loss

pytestmark = pytest.mark.real


@pytest.mark.parametrize(("fixture", "name"), [("smollm2", "smollm2-135m"), ("gemma", "gemma3-270m")])
def test_one_forward_equals_the_cache_that_rolls(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    model: Any = request.getfixturevalue(fixture)
    ids = sl.load_tokens(model, [TEXT_A * 2]).ids[:, :160]
    plain = tf.AutoModelForCausalLM.from_pretrained(fetch(name)).eval()  # the cache serves any copy of the model
    cache = StreamingCache(model, sinks=2, recent=24)
    with torch.no_grad():
        steps = [plain.model(ids[:, i : i + 1], past_key_values=cache).last_hidden_state for i in range(160)]
        want = plain.lm_head(torch.cat(steps, 1))[0]
        with streaming_attention(model, sinks=2, recent=24):
            found = model(ids)[0]
    assert (found - want).abs().max() < 1e-3
    ours, theirs = (torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]) for logits in (found, want))
    assert abs(float(ours - theirs)) < 1e-5


def test_the_first_token_keeps_smollm2_alive_where_the_window_alone_does_not(smollm2: Any) -> None:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = sl.load_tokens(smollm2, [text[:8000]], seq_len=512)
    full, alone, one = (
        streaming_loss(smollm2, tokens, sinks=sinks, recent=recent, progress=False).perplexity
        for sinks, recent in ((0, None), (0, 64), (1, 64))
    )
    assert alone > 2 * full
    assert one < 1.5 * full


def test_stream_prints_every_cache_and_writes_the_page(tmp_path: Path, text_a: str) -> None:
    options = ["--recent", "16", "--sinks", "1", "--out", str(tmp_path / "out")]
    code, shown = run("stream", "--text", "-", *options, input=text_a)
    assert code == 0
    lines = [line.split() for line in shown.splitlines()]
    losses = {" ".join(line[1:-5]): line[-4] for line in lines if line[:1] == ["16"]}
    assert set(losses) == {
        "window only", "first 1", "primary sinks", "all sinks", "random 1", "random, as many as sinks"
    }  # fmt: skip
    assert float(losses["first 1"]) < float(losses["random 1"])
    assert "3.928" in next(line for line in shown.splitlines() if "full attention" in line)
    assert (tmp_path / "out" / "streaming.html").is_file()
    code, shown = run("stream", "--text", "-", "--recent", "x", input=text_a)
    assert code == 2
    assert "--recent takes numbers" in shown
