"""What an intervention is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.forward.follow import numbered
from sinklens.forward.predictions import check_masking, drawn, predictions
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens


@public
def token_loss(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    hooks: Sequence[Any] = (),
    mask_id: int | None = None,
    most_scored: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch pos"]:
    """Loss per token in nats; its ``nanmean()`` is the usual loss.

    Decoders: entry ``[b, p]`` is ``-log p(token p+1 | tokens 0..p)``, NaN at and beyond the last. Encoders: the
    pseudo-loss ``-log p(token p | the rest)``, with [MASK] in the place of token p (Salazar et al. 2020), NaN at
    special tokens. Edits act on the masked copies at the positions that they have in the text.

    Args:
        model: with a trained language-model head.
        tokens: the sequences; each runs without padding.
        hooks: an edit.
        mask_id: the id of an encoder's [MASK], where its tokenizer names none.
        most_scored: at most so many tokens per sequence, drawn at random; NaN at the others.
        seed: of that draw.

    Cost: one forward per sequence, for encoders one row of a forward per token; logits of one sequence at a time.

    Raises:
        UnsupportedModelError: weights without a trained language-model head, an encoder without a known mask token.
        BadInputError: ``mask_id`` for a decoder, a sequence of special tokens only, an edit that leaves no numbers.
    """
    read = predictions(model, mask_id)
    batch = as_tokens(model, tokens)
    rows = []
    for b in range(len(batch)):
        one = batch[b].trim()
        kept = torch.tensor(read.scorable(batch, b), dtype=torch.long)
        if not len(kept):
            raise BadInputError(
                f"{batch.sources[b]} holds special tokens only, which an encoder is not asked to predict"
            )
        if read.mask_id is not None and b == 0:
            check_masking(model, one.ids, int(kept[0]), read.mask_id)
        scored = drawn(kept, most_scored, seed + b)
        with numbered([b]):
            logits = read.logits(model, one.ids, scored, hooks)
        row = torch.full((one.ids.shape[1],), torch.nan)
        row[scored] = token_metrics(loss, logits, logits, read.targets(one.ids, scored)).float()
        rows.append(row)
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
        BadInputError: logits that are no numbers, as an edit that overflows leaves them; a user's function that gives
            no value per token.
    """
    parts: list[Tensor] = []
    wide = torch.promote_types(logits.dtype, torch.float32)
    for start in range(0, logits.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        if not bool((logits[rows] < torch.inf).all()):  # what is -inf is a token that cannot come
            raise BadInputError(
                "the logits are NaN or infinite, so the model predicts nothing: an edit among its hooks leaves no "
                "numbers behind"
            )
        found = metric(logits[rows].to(wide), base_logits[rows].to(wide), targets[rows])
        if not isinstance(found, Tensor) or found.shape != targets[rows].shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            name = getattr(metric, "__name__", "the metric")
            raise BadInputError(f"{name} must give one value per token, shape {tuple(targets[rows].shape)}; got {got}")
        parts.append(found.cpu())
    return torch.cat(parts)
