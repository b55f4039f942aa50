"""What an intervention is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.errors import BadInputError, UnsupportedModelError
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


Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``f(logits, base_logits, targets) -> value``: [token, vocabulary], the same of the base run, [token] -> [token]."""

ROWS = 64  # of logits that are turned into probabilities at once


def loss(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
    """``-log p(target)`` in nats."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def kl(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
    """``KL(base || edited) = sum_v p_base (log p_base - log p_edited)`` in nats; exactly 0.0 for equal logits."""
    log_base, log_edited = base_logits.log_softmax(-1), logits.log_softmax(-1)
    return (log_base.exp() * (log_base - log_edited)).sum(-1)


def top1(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001
    """1 where the likeliest token is the base's."""
    return (logits.argmax(-1) == base_logits.argmax(-1)).float()


METRICS: dict[str, Metric] = {"loss": loss, "kl": kl, "top1": top1}


def token_metrics(
    metric: Metric,
    logits: Float[Tensor, "token vocabulary"],
    base_logits: Float[Tensor, "token vocabulary"],
    targets: Int[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """A metric of every token, in blocks of rows.

    Raises:
        BadInputError: a user's function that gives no value per token.
    """
    parts: list[Tensor] = []
    wide = torch.promote_types(logits.dtype, torch.float32)
    for start in range(0, logits.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        found = metric(logits[rows].to(wide), base_logits[rows].to(wide), targets[rows])
        if not isinstance(found, Tensor) or found.shape != targets[rows].shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            name = getattr(metric, "__name__", "the metric")
            raise BadInputError(f"{name} must give one value per token, shape {tuple(targets[rows].shape)}; got {got}")
        parts.append(found.cpu())
    return torch.cat(parts)
