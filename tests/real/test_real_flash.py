"""The flash backend on the real models: equal to the hooks backend in outputs, statistics and every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import left
from torch import Tensor
from wording import TEXT_A

import sinklens as sl

pytestmark = pytest.mark.real
MODES: list[tuple[Any, dict[str, Any]]] = [
    ("renormalize", {}),
    ("zero", {}),
    ("value_only", {}),
    ("scale", {"g": 0.5}),
    ("mean_value", {}),
    ("fixed_key", {}),
    ("fixed_key", {"value": "neutral"}),
    ("fixed_key", {"value": "mean"}),
    ("fixed_logit", {}),
    ("fixed_logit", {"value": "neutral"}),
    ("null", {}),
    ("move", {"target": 5}),
    ("uniform", {}),
]
OTHER = "The history of the lighthouse is longer than that of most towers, and its keepers wrote everything down. " * 6


@pytest.fixture(scope="module", params=["smollm2", "gemma", "minilm"])
def any_model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def both(model: Any, tokens: sl.Tokens, hooks: Any) -> tuple[Tensor, Tensor]:
    """Logits on the host and under flash, of real tokens only."""
    with torch.no_grad():
        host = model.run_with_hooks(tokens.ids, attention_mask=tokens.mask, fwd_hooks=hooks)
        with sl.flash(model):
            fast = model.run_with_hooks(tokens.ids, attention_mask=tokens.mask, fwd_hooks=hooks)
    return host[tokens.mask], fast[tokens.mask]


def test_plain_forwards_agree_and_leave_nothing_behind(any_model: Any) -> None:
    tokens = sl.load_tokens(any_model, [TEXT_A, TEXT_A[:200]])
    for batch in (tokens, left(tokens)):
        before = any_model(batch.ids, attention_mask=batch.mask)
        host, fast = both(any_model, batch, [])
        assert (host - fast).abs().max() < 1e-4
        assert torch.equal(any_model(batch.ids, attention_mask=batch.mask), before)


def test_statistics_agree(any_model: Any) -> None:
    """Beyond Gemma's window of 512 tokens, and with padding."""
    longest = 600 if sl.models.capabilities(any_model).causal else 250
    tokens = sl.load_tokens(any_model, "python-docs", n_seqs=2, seq_len=longest)
    short = sl.load_tokens(any_model, [TEXT_A])
    batch = left(sl.Tokens.concatenate([tokens[0], short]))
    host, fast = (sl.sink_scores(any_model, batch, backend=way) for way in ("hooks", "flash"))
    for quantity in ("alpha", "beta", "uniform"):
        torch.testing.assert_close(getattr(fast, quantity), getattr(host, quantity), atol=1e-5, rtol=0, equal_nan=True)
    few = sl.sink_scores(any_model, batch, positions=[0, 7], backend="flash")
    torch.testing.assert_close(few.alpha[..., [0, 7]], host.alpha[..., [0, 7]], atol=1e-5, rtol=0)
    a, b = (
        sl.heads.attention_statistics(any_model, batch, [0, 7], entropy=True, backend=w) for w in ("hooks", "flash")
    )
    for quantity in ("mass", "margin", "free_margin", "value_norm", "entropy"):
        torch.testing.assert_close(
            getattr(a, quantity), getattr(b, quantity), atol=2e-4, rtol=1e-5, equal_nan=True, msg=quantity
        )
    assert (a.mass - b.mass).nan_to_num(0).abs().max() < 1e-5


def test_the_same_sinks_are_found(any_model: Any) -> None:
    tokens = sl.load_tokens(any_model, [TEXT_A])
    host, fast = (sl.find_sinks(any_model, tokens, backend=way) for way in ("hooks", "flash"))
    assert [(s.position, s.kind, s.onset, s.end) for s in host] == [(s.position, s.kind, s.onset, s.end) for s in fast]
    assert len(host)


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    """The same weights in float64, loaded when first asked for."""
    return {}


def hooks_of(model: Any, mode: Any, options: dict[str, Any], **more: Any) -> Any:
    if mode in ("mean_value", "fixed_key", "fixed_logit"):
        more |= {"reference": [OTHER, TEXT_A[100:]], "allow_identity": True}
    return sl.ablate_sinks(model, [0], mode, **options, **more)


@pytest.mark.parametrize(("mode", "options"), MODES, ids=[f"{m}-{o}" for m, o in MODES])
def test_every_mode_agrees(any_model: Any, exact: dict[str, Any], mode: Any, options: dict[str, Any]) -> None:
    """1e-4 where one layer is edited. In all layers at once some edits move logits by tens, and the edit in float32
    is itself further than that from the edit in float64: there the backends may differ by a few times that."""
    tokens = sl.load_tokens(any_model, [TEXT_A])
    middle = sl.models.capabilities(any_model).n_layers // 2
    host, fast = both(any_model, tokens, hooks_of(any_model, mode, options, layers=middle))
    assert (host - fast).abs().max() < 1e-4
    host, fast = both(any_model, tokens, hooks_of(any_model, mode, options))
    bound = 1e-4
    if (host - fast).abs().max() > bound:
        name = sl.models.capabilities(any_model).model
        if name not in exact:
            exact.clear()
            exact[name] = sl.load_model(
                "gemma3-270m" if "gemma" in name.lower() else "smollm2-135m", dtype=torch.float64
            )
        truth = exact[name].run_with_hooks(tokens.ids, fwd_hooks=hooks_of(exact[name], mode, options))[tokens.mask]
        missed = float((host - truth).abs().max())
        assert (fast - truth).abs().max() < 5 * missed  # maxima over all logits scatter: 0.5 to 3.3 was seen
        bound = 6 * missed
    assert (host - fast).abs().max() < bound


def test_experiments_agree(decoder: Any) -> None:
    tokens = sl.load_tokens(decoder, [TEXT_A])
    sinks = sl.find_sinks(decoder, tokens)
    found = [
        sl.run_experiment(decoder, tokens, {"all": sl.ablate_sinks(decoder, sinks)}, sinks=sinks, backend=way)
        for way in ("hooks", "flash")
    ]
    for metric in ("loss", "kl"):
        torch.testing.assert_close(
            found[0].metrics[metric], found[1].metrics[metric], atol=5e-4, rtol=0, equal_nan=True
        )
    assert found[0].side[1]["freed"] == pytest.approx(found[1].side[1]["freed"], abs=1e-5)
