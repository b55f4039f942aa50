"""Interventions on the real models: exact equalities, and the effects that the anchors name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import left
from editing import greedy
from wording import TEXT_A

import sinklens as sl

pytestmark = pytest.mark.real
EVERY_MODE: list[tuple[Any, dict[str, Any]]] = [
    ("renormalize", {}),
    ("zero", {}),
    ("value_only", {}),
    ("scale", {"g": 0.5}),
    ("null", {}),
    ("uniform", {}),
    ("move", {"target": 5}),
]


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_removing_the_first_token_equals_masking_its_key_everywhere(decoder: Any) -> None:
    tokens = sl.load_tokens(decoder, [TEXT_A])
    removed = decoder(tokens.ids[:, 1:])
    masked = decoder.run_with_hooks(tokens.ids, fwd_hooks=sl.ablate_sinks(decoder, [0]))
    assert (removed - masked[:, 1:]).abs().max() < 1e-3
    a = torch.nn.functional.cross_entropy(removed[0, :-1], tokens.ids[0, 2:])
    b = torch.nn.functional.cross_entropy(masked[0, 1:-1], tokens.ids[0, 2:])
    assert abs(float(a - b)) < 1e-5


def test_neutral_edits_are_exactly_neutral(decoder: Any) -> None:
    tokens = sl.load_tokens(decoder, [TEXT_A])
    sinks = sl.find_sinks(decoder, tokens)
    plain = decoder(tokens.ids)
    same = sl.ablate_sinks(decoder, sinks, "scale", g=1.0)
    assert torch.equal(decoder.run_with_hooks(tokens.ids, fwd_hooks=same), plain)
    for site in ("resid_pre", "k", "v", "mlp_out"):
        own = sl.patch_bos(decoder, tokens, tokens, site=site, allow_identity=True)
        assert torch.equal(decoder.run_with_hooks(tokens.ids, fwd_hooks=own), plain)


@pytest.mark.parametrize(("mode", "options"), EVERY_MODE, ids=[m for m, _ in EVERY_MODE])
def test_modes_agree_under_padding_and_touch_no_first_row(decoder: Any, mode: Any, options: dict[str, Any]) -> None:
    tokens = sl.load_tokens(decoder, [TEXT_A, TEXT_A[:300]])
    sinks = sl.find_sinks(decoder, tokens)
    hooks = sl.ablate_sinks(decoder, sinks, mode, **options)
    padded = left(tokens)
    both = decoder.run_with_hooks(padded.ids, attention_mask=padded.mask, fwd_hooks=hooks)
    for b in range(2):
        row = tokens.row(b)[None]
        alone = decoder.run_with_hooks(row, fwd_hooks=hooks)[0]
        assert alone.isfinite().all()
        assert torch.equal(alone[0], decoder(row)[0, 0])
        difference = (both[b, -row.shape[1] :].log_softmax(-1) - alone.log_softmax(-1)).abs()
        assert difference.max() < 0.02  # float32 of a residual stream with norms of 23,000


def test_generation_with_and_without_a_cache(decoder: Any) -> None:
    tokens = sl.load_tokens(decoder, [TEXT_A[:120]])
    found = []
    for cached in (True, False):
        with decoder.hooks(fwd_hooks=sl.ablate_sinks(decoder, [0], "zero")):
            found.append(greedy(decoder, tokens.ids, cached))
    assert torch.equal(*found)


def test_secondary_sinks_hand_most_of_their_mass_to_the_first_token(smollm2: Any) -> None:
    tokens = sl.load_tokens(smollm2, [TEXT_A])
    sinks = sl.find_sinks(smollm2, tokens)
    e = sl.run_experiment(
        smollm2, tokens, {"secondary": sl.ablate_sinks(smollm2, sinks.secondary)}, controls=("random",)
    )
    side = e.side_effects().set_index(["label", "control"]).loc[("secondary", "")]
    assert side.to_other_sinks / side.freed == pytest.approx(0.58, abs=0.08)
    assert abs(float(e.change("loss", "secondary"))) < 0.1
    assert float(e.change("kl", "secondary")) > 0


def test_the_bos_carries_gemma(gemma: Any) -> None:
    tokens = sl.load_tokens(gemma, [TEXT_A])
    e = sl.run_experiment(gemma, tokens, {"zero": sl.ablate_sinks(gemma, [0], "zero")}, controls=("random", "matched"))
    table = e.to_dataframe().set_index(["label", "control"])
    assert table.d_loss[("zero", "")] > 1
    assert abs(table.d_loss[("zero", "random")]) < 0.2


def test_massive_dimensions_zero_and_mean_differ(smollm2: Any) -> None:
    tokens = sl.load_tokens(smollm2, [TEXT_A])
    sinks = sl.find_sinks(smollm2, tokens).primary
    others = sl.load_tokens(smollm2, "python-docs", n_seqs=4, seq_len=128)
    losses = [
        float(
            sl.token_loss(smollm2, tokens, hooks=sl.ablate_residual(smollm2, sinks, mode, reference=others)).nanmean()
        )
        for mode in ("massive_zero", "massive_mean")
    ]
    base = float(sl.token_loss(smollm2, tokens).nanmean())
    assert losses[0] - base > 10 * abs(losses[1] - base)


def test_an_encoder_is_edited_but_has_no_loss(minilm: Any) -> None:
    tokens = sl.load_tokens(minilm, [TEXT_A])
    seen: list[Any] = []
    reading = ("blocks.3.attn.hook_pattern", lambda pattern, hook: seen.append(pattern[..., 0].abs().max()))
    plain = minilm(tokens.ids)
    edited = minilm.run_with_hooks(tokens.ids, fwd_hooks=[*sl.ablate_sinks(minilm, [0]), reading])
    assert (edited - plain).abs().max() > 0.1
    assert seen[0] == 0  # the host shows the edited pattern
    assert torch.equal(minilm(tokens.ids), plain)
    hooks = sl.patch_bos(minilm, tokens, "zero")
    with pytest.raises(sl.UnsupportedModelError, match="no next token"):
        sl.run_experiment(minilm, tokens, {"patched": hooks})
