"""What an intervention is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.errors import UnsupportedModelError
from sinklens.models import has_trained_head
from sinklens.proof import capabilities
from sinklens.tokens import Tokens, as_tokens


def token_loss(
    model: TransformerBridge, tokens: str | Sequence[str] | Tensor | Tokens, *, hooks: Sequence[Any] = ()
) -> Float[Tensor, "batch pos"]:
    """Next-token loss in nats: entry ``[b, p]`` is ``-log p(token p+1 | tokens 0..p)``, NaN at and beyond the last.

    Its ``nanmean()`` is the usual loss. Cost: one forward per sequence; logits of one sequence at a time.

    Raises:
        UnsupportedModelError: a bidirectional model, or weights without a trained language-model head.
    """
    facts = capabilities(model)
    if not facts.causal or not has_trained_head(model):
        raise UnsupportedModelError(
            f"{facts.model} predicts no next token (an encoder, or weights without a language-model head)"
        )
    batch = as_tokens(model, tokens)
    rows = []
    with torch.no_grad():
        for i in range(len(batch)):
            one = batch[i].trim()
            logits = model.run_with_hooks(one.ids, attention_mask=one.mask, fwd_hooks=list(hooks))
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), one.ids[0, 1:], reduction="none")
            rows.append(torch.nn.functional.pad(loss.cpu(), (0, 1), value=torch.nan))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
