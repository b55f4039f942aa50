"""Token or position? The same scan over natural, shuffled, random and repeated tokens, and over context lengths."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, SinklensWarning
from sinklens.core.validation import public
from sinklens.find.lifetimes import Thresholds
from sinklens.find.scores import sink_scores
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import from_scores
from sinklens.inputs.load import load_tokens
from sinklens.inputs.tokens import Tokens

CONTEXTS = ("natural", "shuffled", "random", "repeat")


@public
def compare_contexts(
    model: TransformerBridge | PlainModel,
    source: str = "python-docs",
    *,
    contexts: Sequence[str] = CONTEXTS,
    lengths: Sequence[int] = (64, 128, 256, 512),
    n_seqs: int = 16,
    epsilon: float = 0.3,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """One table: a row per (context, length) with the sink rate, its interval, alpha, and the sinks found.

    ``shuffled`` is the natural text with the ordinary tokens of each sequence permuted, special tokens in place: what
    depends on position stays, what depends on meaning goes. Its rows say, of the natural text's sinks, which share is
    still a sink at the same **position**, and which share still at the same **token** (followed to its new place),
    for position 0 apart from all others.

    Columns: context, seq_len, sink_rate, low, high (bootstrap-t from 16 documents on, else NaN), alpha, primary,
    secondary, secondary_per_100_tokens; and for shuffled rows the natural sinks at position 0 (first) and elsewhere
    (others): first, first_kept_by_position, first_kept_by_token, others, others_kept_by_position, others_kept_by_token.
    """
    unknown = set(contexts) - set(CONTEXTS)
    if unknown:
        raise BadInputError(f"unknown contexts {', '.join(sorted(unknown))}; there are {', '.join(CONTEXTS)}")
    rows = []
    for length in lengths:
        natural: SinkMap | None = None
        text = load_tokens(model, source, n_seqs=n_seqs, seq_len=length, seed=seed)
        for context in CONTEXTS:
            if context not in contexts and not (context == "natural" and "shuffled" in contexts):
                continue
            moved: Tensor | None = None
            tokens = text
            if context == "shuffled":
                tokens, moved = shuffle(text, seed)
            elif context != "natural":
                tokens = load_tokens(model, context, n_seqs=n_seqs, seq_len=length, seed=seed)
            scores = sink_scores(model, tokens, progress=progress)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SinklensWarning)  # NaN in the table says it
                found = from_scores(scores, Thresholds())
            natural = found if context == "natural" else natural
            if context not in contexts:
                continue
            low, high = scores.sink_rate_interval(0, epsilon) or (torch.nan, torch.nan)
            row = {
                "context": context,
                "seq_len": length,
                "sink_rate": scores.sink_rate(0, epsilon),
                "low": low,
                "high": high,
                "alpha": float(scores.alpha[..., 0].mean()),
                "primary": len(found.primary),
                "secondary": len(found.secondary),
                "secondary_per_100_tokens": 100 * len(found.secondary) / int(tokens.lengths.sum()),
            }
            if moved is not None and natural is not None:
                row |= kept_shares(natural, found, moved)
            rows.append(row)
    return pd.DataFrame(rows)


def shuffle(tokens: Tokens, seed: int = 0) -> tuple[Tokens, Tensor]:
    """The ordinary tokens of each sequence permuted, special tokens in place, and where each position went.

    ``moved[b, p]`` is the new position of the token that stood at p. Sequences must start in column 0.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = torch.arange(tokens.ids.shape[1]).repeat(len(tokens), 1)
    ids = tokens.ids.clone()
    labels = []
    for b in range(len(tokens)):
        ordinary = (~tokens.special[b]).nonzero().flatten().cpu()
        target = ordinary[torch.randperm(len(ordinary), generator=generator)]
        moved[b, ordinary] = target
        ids[b, target] = tokens.ids[b, ordinary]
        row = list(tokens.labels[b])
        for p, q in zip(ordinary.tolist(), target.tolist(), strict=True):
            row[q] = tokens.labels[b][p]
        labels.append(tuple(row))
    parts = {**tokens.tensors(), "ids": ids}
    meta = {**tokens.meta(), "labels": labels, "info": {**tokens.info, "shuffled": seed}}
    return Tokens.from_parts(parts, meta), moved


def kept_shares(natural: SinkMap, shuffled: SinkMap, moved: Tensor) -> dict[str, float]:
    """Of the natural sinks: the share still a sink at the same position, and at the same token's new place."""
    still = {(s.sequence, s.position) for s in shuffled}
    shares: dict[str, float] = {}
    for name, group in (
        ("first", [s for s in natural if s.position == 0]),
        ("others", [s for s in natural if s.position > 0]),
    ):
        shares[name] = float(len(group))
        count = max(1, len(group))
        by_position = sum((s.sequence, s.position) in still for s in group) / count
        by_token = sum((s.sequence, int(moved[s.sequence, s.position])) in still for s in group) / count
        shares[f"{name}_kept_by_position"] = by_position if group else torch.nan
        shares[f"{name}_kept_by_token"] = by_token if group else torch.nan
    return shares
