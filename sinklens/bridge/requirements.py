"""What a function asks of a model before it begins: precision, and attention that is a softmax."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import UnsupportedModelError


def refuse_half_precision(model: TransformerBridge, what: str) -> None:
    """Raise UnsupportedModelError where a model runs in less than float32."""
    if model.cfg.dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(
            f"{model.cfg.model_name} runs in {model.cfg.dtype}: {what} to 1e-3 of their size, which takes float32 or "
            f"float64; load_model(..., dtype='float32')"
        )


def refuse_unless_softmax(model: TransformerBridge, what: str) -> None:
    """Raise UnsupportedModelError where attention is not the softmax that the partition takes apart.

    Args:
        model: the model.
        what: the thing that rests on it, as the subject of a sentence.
    """
    facts = capabilities(model)
    if not facts.softmax:
        raise UnsupportedModelError(
            f"{facts.model}: its attention is not a softmax over the tokens that it shows (rows sum to anything, or a "
            f"learned slot takes a share), and {what} rests on that. sink_scores, measure_mixing, trace_sinks on "
            f"given sinks and edits of the residual stream work; sinklens.lab compares kinds of attention"
        )
