"""Sweeps against one plain forward per item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, build_pair, random_rows

import sinklens as sl
from sinklens.experiment import ablation_sweep as sweeps

NAMES = ("gpt2", "llama", "gemma3", "gpt-oss", "neox", "mistral", "gemma2")


def naive(model: Any, ids: torch.Tensor, edited: set[int], **options: Any) -> float:
    """Mean change of loss over the scored tokens, by two plain forwards."""
    kept = [p for p in range(ids.shape[1] - 1) if p not in edited]
    hooks = sl.ablate_sinks(model, sorted(edited), **options)
    return float((sl.token_loss(model, ids, hooks=hooks) - sl.token_loss(model, ids))[0, kept].double().mean())


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_a_growing_batch_equal_single_forwards(name: str) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((20, 20)))
    found = sl.sweep_ablation(model, ids, [0, 2], "zero")
    for i, layer in enumerate(found.keys):
        for b in range(2):
            assert (
                abs(
                    float(found.metrics["loss"][i, b]) - naive(model, ids[b : b + 1], {0, 2}, mode="zero", layers=layer)
                )
                < 1e-5
            )
    assert found.base.isfinite().all()


@pytest.mark.parametrize("mode", ["renormalize", "mean_value", "fixed_key"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layer_head_pairs_equal_single_forwards(name: str, mode: Any) -> None:
    _, model = build_pair(name)
    ids = torch.stack(random_rows((20,)))
    options: dict[str, Any] = {"reference": torch.stack(random_rows((20, 20), seed=4))} if mode != "renormalize" else {}
    found = sl.sweep_ablation(model, ids, [0], mode, over="layer-head", **options)
    assert found.keys == tuple((layer, head) for layer in range(2) for head in range(4))
    for i, (layer, head) in enumerate(found.keys):  # type: ignore[misc]
        assert (
            abs(
                float(found.metrics["loss"][i, 0]) - naive(model, ids, {0}, mode=mode, heads=[(layer, head)], **options)
            )
            < 1e-5
        )


def test_heads_and_doses_equal_single_forwards() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    heads = sl.sweep_ablation(model, ids, [0], over="head")
    assert [abs(float(heads.metrics["loss"][h, 0]) - naive(model, ids, {0}, heads=[h])) < 1e-6 for h in range(4)] == [
        True
    ] * 4
    doses = sl.sweep_ablation(model, ids, [0], over="dose", doses=(0.0, 0.5, 1.0))
    assert doses.keys == (0.0, 0.5, 1.0)
    assert float(doses.metrics["loss"][2, 0]) == 0
    assert abs(float(doses.metrics["loss"][0, 0]) - naive(model, ids, {0})) < 1e-6


def test_memory_bounded_passes_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = build_pair("gemma3")
    ids = torch.stack(random_rows((20,)))
    whole = sl.sweep_ablation(model, ids, [0])
    passes: list[int] = []
    monkeypatch.setattr("sinklens.experiment.ablation_sweep.NUMBERS_AT_ONCE", 2 * 20 * (4 * 20 + 4 * model.cfg.d_model))
    real = sweeps._final_states
    monkeypatch.setattr(
        "sinklens.experiment.ablation_sweep._final_states", lambda *given: passes.append(1) or real(*given)
    )
    assert torch.allclose(sl.sweep_ablation(model, ids, [0]).metrics["loss"], whole.metrics["loss"], atol=1e-6)
    assert len(passes) == model.cfg.n_layers


@pytest.mark.parametrize("mode", ["scale", "zero"])
def test_first_order_estimate_is_the_derivative(mode: Any) -> None:
    """For a small edit the estimate and the exact change agree to first order (float64 GPT-2)."""
    model = sl.load_model(build("gpt2").double())
    ids = torch.stack(random_rows((20,)))
    options: dict[str, Any] = {"g": 1.0001} if mode == "scale" else {}
    found = sl.sweep_ablation(model, ids, [0], mode, over="layer-head", estimate=True, **options)
    assert found.estimate is not None
    exact, guess = found.metrics["loss"][:, 0], found.estimate[:, 0]
    if mode == "scale":
        assert (exact - guess).abs().max() < 1e-3 * exact.abs().max()
    assert guess.abs().max() > 0
    assert set(found.correlation()) == {"pearson", "spearman"}


def test_results_can_be_saved_drawn_and_read(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20, 20)))
    for over in ("layer", "head", "layer-head", "dose"):
        found = sl.sweep_ablation(model, ids, [0], over=over)
        back = sl.experiment.Sweep.load(found.save(tmp_path / f"{over}.safetensors"))
        assert back.to_dataframe().equals(found.to_dataframe())
        assert back.plot().layout.title.text
        assert over.split("-")[0] in repr(back)


def test_bad_sweeps_say_what_to_do() -> None:
    _, model = build_pair("llama")
    ids = torch.stack(random_rows((20,)))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"over": "token"}, "over must be"),
        ({"estimate": True}, "layer-head"),
        ({"over": "dose", "mode": "zero"}, "sweeps mode"),
        ({"over": "dose", "doses": ()}, "sweeps mode"),
        ({"over": "head", "heads": [(0, 1)]}, "heads= as numbers"),
    ]
    for options, message in cases:
        with pytest.raises(sl.BadInputError, match=message):
            sl.sweep_ablation(model, ids, [0], **options)
    with pytest.raises(sl.BadInputError, match="no first-order"):
        sl.sweep_ablation(model, ids, [0]).correlation()
    with pytest.raises(sl.UnsupportedModelError, match="no next token"):
        sl.sweep_ablation(build_pair("bert")[1], ids, [0])
