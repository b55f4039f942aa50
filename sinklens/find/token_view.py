"""The text of one sequence, coloured by the mass that each token draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinklens.core.errors import BadInputError
from sinklens.show.circuitsvis import LONGEST_VIEW, TokenView, offline_view, safe_labels

if TYPE_CHECKING:
    from sinklens.find.sinkmap import SinkMap


def token_view(sinks: SinkMap, sequence: int = 0) -> TokenView:
    """The text of one sequence, coloured by mass (mean far importance over heads); the reader picks the layer.

    Raises:
        BadInputError: more than 128 tokens (the page would take minutes to draw), or no such sequence.
    """
    from circuitsvis.tokens import colored_tokens_multi  # slow to load

    if not 0 <= sequence < len(sinks.tokens):
        raise BadInputError(f"sequence {sequence} is out of range: there are {len(sinks.tokens)}")
    labels = sinks.tokens.labels[sequence]
    if len(labels) > LONGEST_VIEW:
        raise BadInputError(
            f"token_view draws up to {LONGEST_VIEW} tokens, this sequence has {len(labels)}; use plot()"
        )
    mass = sinks.mass[sequence, :, : len(labels)].nan_to_num(0.0)
    names = [f"layer {layer}" for layer in range(sinks.n_layers)]
    return offline_view(colored_tokens_multi(safe_labels(labels), mass.T.contiguous(), labels=names))
