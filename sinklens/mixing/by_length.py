"""Mixing against context length, and exact Jacobian norms of chosen pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.find.sinkmap import SinkMap
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.mixing.conditions import Conditions, Sinks
from sinklens.mixing.mixing import compare_mixing


@public
def mixing_by_length(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    lengths: Sequence[int],
    conditions: Conditions | None = None,
    *,
    sinks: Sinks = None,
    layers: Sequence[int] = (-1,),
    **options: Any,
) -> pd.DataFrame:
    """The three indices against context length: the first n tokens of every sequence, for each n.

    Args:
        model, tokens: as everywhere; every sequence must have as many tokens as the longest length.
        lengths: how many tokens.
        conditions: hook lists by label, as for :func:`sinklens.compare_mixing`.
        sinks: S; a map of the whole text is cut to each length, other choices are made anew.
        layers: of the table.
        options: the other arguments of :func:`sinklens.compare_mixing`; ``most`` bounds the columns of long texts.

    Returns:
        The table of :meth:`sinklens.mixing.MixingComparison.to_dataframe` with a column ``tokens``.

    Cost: that of one comparison per length.

    Raises:
        BadInputError: a length below 3, or beyond the shortest sequence.
    """
    batch = as_tokens(model, tokens)
    shortest = int(batch.lengths.min())
    if not lengths or any(not 3 <= n <= shortest for n in lengths):
        raise BadInputError(f"lengths must lie between 3 and {shortest}, the shortest sequence's; got {list(lengths)}")
    parts = []
    for n in lengths:
        own = sinks.cut(range(len(batch)), n) if isinstance(sinks, SinkMap) else None
        some = batch.first(n) if own is None else own.tokens
        found = compare_mixing(model, some, conditions or {}, sinks=sinks if own is None else own, **options)
        parts.append(found.to_dataframe(layers).assign(tokens=n))
    return pd.concat(parts, ignore_index=True)
