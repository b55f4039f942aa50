"""SmolLM2 with blocks on disk: the same bits as in memory; bfloat16, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offloading import on_disk, run
from wording import TEXT_A

import sinklens as sl

pytestmark = pytest.mark.real


def places(every: int) -> dict[str, str]:
    """Every second or third block on disk."""
    found = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return found | {f"model.layers.{n}": "disk" if n % every == 0 else "cpu" for n in range(30)}


@pytest.fixture(scope="module")
def off() -> Any:
    return sl.load_model("smollm2-135m", device_map=places(2))


def test_scans_and_interventions_of_smollm2_on_disk_are_the_same_bits(smollm2: Any, off: Any) -> None:
    assert len(on_disk(off)) == 15 * 9
    tokens = sl.load_tokens(smollm2, [TEXT_A])
    assert sl.load_tokens(off, [TEXT_A]).digest == tokens.digest
    for way in ("hooks", "flash"):
        a, b = (sl.sink_scores(model, tokens, backend=way) for model in (smollm2, off))
        assert torch.equal(a.alpha, b.alpha)
    assert b.sink_rate() == pytest.approx(0.541, abs=0.005)
    found, again = (sl.find_sinks(model, tokens) for model in (smollm2, off))
    assert found.sinks == again.sinks
    assert len(found.secondary) == 2
    cases: list[tuple[Any, bool]] = [
        (lambda m: sl.ablate_sinks(m, found, "zero"), False),
        (lambda m: sl.ablate_sinks(m, found, "zero"), True),
        (lambda m: sl.patch_bos(m, tokens, "zero"), False),
        (lambda m: sl.restrict_attention(m, sinks=1, recent=16), True),
    ]
    for build, flash in cases:
        a, b = (run(model, tokens.ids, build(model), flash) for model in (smollm2, off))
        assert torch.equal(a, b)
    tables = [
        sl.run_experiment(
            model, tokens, {"all": sl.ablate_sinks(model, found)}, sinks=found, controls=(), progress=False
        ).to_dataframe()
        for model in (smollm2, off)
    ]
    assert tables[0].equals(tables[1])
    assert len(on_disk(off)) == 15 * 9


def test_writers_and_their_neurons_are_read_from_disk(smollm2: Any, off: Any) -> None:
    tokens = sl.load_tokens(smollm2, [TEXT_A])
    found = sl.find_sinks(smollm2, tokens).secondary
    traces = []
    for model in (smollm2, off):
        reference = sl.load_tokens(model, "python-docs", n_seqs=2, seq_len=96)
        trace = sl.trace_sinks(model, tokens, found, reference=reference, causal=False, progress=False)
        traces.append((trace.to_dataframe(), sl.trace.writer_neurons(model, trace, progress=False)))
    (a, neurons), (b, others) = traces
    assert a.equals(b)
    top = a[a.component == "mlp"].groupby("layer").contribution.sum().idxmax()
    assert top == 2
    assert neurons.to_dataframe().equals(others.to_dataframe())


def test_bfloat16_in_memory_and_on_disk() -> None:
    """Scans and interventions work in bfloat16 on both backends; taking scores apart does not."""
    full = sl.load_model("smollm2-135m", device="cpu", dtype="bfloat16")
    off = sl.load_model("smollm2-135m", device_map=places(3), dtype=torch.bfloat16)
    tokens = sl.load_tokens(full, [TEXT_A])
    for way in ("hooks", "flash"):
        a, b = (sl.sink_scores(model, tokens, backend=way) for model in (full, off))
        assert torch.equal(a.alpha, b.alpha)
        assert a.sink_rate() == pytest.approx(0.541, abs=0.03)
    found = sl.find_sinks(full, tokens)
    assert found.positions() == [0, 10, 46]
    a, b = (run(model, tokens.ids, sl.ablate_sinks(model, found, "zero"), flash=True) for model in (full, off))
    assert torch.equal(a, b)
    with pytest.raises(sl.UnsupportedModelError, match="float32"):
        sl.decompose_sinks(off, tokens, found)
