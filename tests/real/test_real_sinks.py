"""Sinks of the embedded models: the anchors of the project, measured by hand before there was a package."""

from __future__ import annotations

from typing import Any

import pytest
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl

pytestmark = pytest.mark.real

STREAMING = "StreamingLLM can work on infinite-length texts without compromising efficiency and performance."


def test_smollm2_has_one_primary_and_two_of_four_the_are_secondary(smollm2: TransformerBridge, text_a: str) -> None:
    sinks = sl.find_sinks(smollm2, text_a)
    assert [s.position for s in sinks.primary] == [0]
    assert sinks.primary.sinks[0].bridged == 2, "layers 10 and 11 are bridged"
    the = [p for p, label in enumerate(sinks.tokens.labels[0]) if label == " the"]
    assert the == [2, 10, 42, 46]
    assert [s.position for s in sinks.secondary] == [10, 46]
    for sink in sinks.secondary:
        assert sink.reason == "early_end"
        assert 2 <= sink.onset <= 4
        assert 10 <= sink.end <= 11
    by_direction = sl.find_sinks(smollm2, text_a, method="direction")
    assert [s.position for s in by_direction] == [0, 10, 46]
    assert [s.position for s in sl.find_sinks(smollm2, text_a, method="wong")] == [0]


def test_gemma_has_bos_from_layer_0_and_no_primary_without_it(gemma: TransformerBridge, text_a: str) -> None:
    sinks = sl.find_sinks(gemma, text_a)
    assert [(s.position, s.token, s.onset) for s in sinks.primary] == [(0, "<bos>", 0)]
    without = sl.find_sinks(gemma, sl.load_tokens(gemma, [text_a], prepend_bos=False))
    assert len(without.primary) == 0
    assert without.strongest == (None,)
    assert {s.reason for s in without} <= {"no_primary"}
    assert all(s.mass < 0.1 for s in without)


def test_wong_s_detector_warns_on_gemma(gemma: TransformerBridge, text_a: str) -> None:
    with pytest.warns(sl.SinklensWarning, match=r"flags \d+ of 97 tokens"):
        flagged = sl.find_sinks(gemma, text_a, method="wong")
    assert len(flagged) > 90
    assert "these are not sinks" in flagged.notes[-1]


def test_minilm_has_cls_and_the_grid_is_drawn_where_detection_has_too_few_queries(
    minilm: TransformerBridge, text_a: str
) -> None:
    sinks = sl.find_sinks(minilm, text_a)
    assert [(s.position, s.token) for s in sinks.primary] == [(0, "[CLS]")]
    with pytest.warns(sl.SinklensWarning, match="too few queries"):
        assert len(sl.find_sinks(minilm, STREAMING)) == 0
    grid: Any = sl.heads.attention_grid(minilm, STREAMING)
    assert len(grid.data) == 6
    assert grid.layout.xaxis.ticktext[0] == "[CLS]"


def test_massive_activations_of_smollm2_are_graded_and_not_strict(smollm2: TransformerBridge, text_a: str) -> None:
    layers = sl.sink_anatomy(smollm2, sl.find_sinks(smollm2, text_a)).layers
    first = layers[(layers.position == 0) & (layers.layer == 14)].iloc[0]
    assert first.residual_norm == pytest.approx(23_670, rel=0.01)
    assert first.max_ratio == pytest.approx(500, rel=0.05)
    assert first.massive_dims == "507"
    assert not layers.strict.any()
    second = layers[(layers.position == 10) & (layers.layer == 5)].iloc[0]
    assert second.cosine_centred > 0.98


def test_the_sink_s_key_is_small_and_its_angle_large(smollm2: TransformerBridge, text_a: str) -> None:
    """Gu et al. 2025, Figure 2: the product of norms makes no sink, the cosine does."""
    heads = sl.sink_anatomy(smollm2, sl.find_sinks(smollm2, text_a)).heads
    late = heads[(heads.position == 0) & (heads.layer >= 12)]
    assert (late.k_norm < late.other_k_norm).mean() > 0.9
    assert (late.cosine > late.other_cosine).mean() > 0.9
    assert late.v_ratio.median() < 0.5
