"""How much of which text each stage of a report measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sinklens.attention.importance import FAR, MIN_FAR_QUERIES
from sinklens.bridge.capabilities import record
from sinklens.core.errors import BadInputError
from sinklens.core.intervals import MIN_DOCUMENTS
from sinklens.experiment.controls import Control
from sinklens.inputs.load import load_tokens
from sinklens.inputs.tokens import Tokens


@dataclass(frozen=True)
class Sizes:
    """What limits a report's cost.

    Attributes:
        n_seqs, seq_len: of a text, where the user gives none; intervals need 16 documents.
        controls: of the ablations.
        causal: prove writers by replacing what they write; most_proven: of so many sinks per kind and sequence.
        reference: sequences and tokens of python-docs that lend the trace what the text lacks: tokens of a sink's id
            that are no sink, directions of other documents.
        split_seqs: sequences whose writers are split into neurons.
        mixing_seqs, mixing_tokens: sequences, and tokens of each, whose Jacobians are measured.
        probes: random vectors per token.
    """

    n_seqs: int
    seq_len: int
    controls: tuple[Control, ...]
    causal: bool
    most_proven: int
    reference: tuple[int, int]
    split_seqs: int
    mixing_seqs: int
    mixing_tokens: int
    probes: int


FULL = Sizes(
    n_seqs=16,
    seq_len=128,
    controls=("random", "matched"),
    causal=True,
    most_proven=1,
    reference=(16, 256),
    split_seqs=8,
    mixing_seqs=16,
    mixing_tokens=16,
    probes=2,
)
QUICK = Sizes(
    n_seqs=16,
    seq_len=64,
    controls=("random",),
    causal=False,
    most_proven=0,
    reference=(8, 128),
    split_seqs=2,
    mixing_seqs=2,
    mixing_tokens=8,
    probes=2,
)
SHORTEST = FAR + MIN_FAR_QUERIES  # tokens below which no sink can be told


def text_of(
    model: Any,
    source: Any,
    *,
    n_seqs: int | None = None,
    seq_len: int | None = None,
    quick: bool = False,
    seed: int = 0,
) -> Tokens:
    """The sequences of a source, of a size that suits a report where the user gives none.

    A corpus or file gives its documents' first tokens, as many documents as there are up to 16; a single short text is
    taken whole. With ``seq_len``, and for lists of texts, this is :func:`sinklens.load_tokens`.
    """
    if seq_len is not None or not isinstance(source, str):
        return load_tokens(model, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    sizes = QUICK if quick else FULL
    length = min(sizes.seq_len, record(model).context or sizes.seq_len)
    found: list[Tokens] = []
    for least in (None, min(SHORTEST, length)):
        try:
            batch = load_tokens(model, source, n_seqs=n_seqs, seq_len=length, min_len=least, seed=seed)
        except BadInputError:
            continue
        found.append(batch[: n_seqs or sizes.n_seqs])
        if len(set(found[-1].documents)) >= min(MIN_DOCUMENTS, n_seqs or MIN_DOCUMENTS):
            return found[-1]
    if not found:  # every document is shorter, or there is no such source: say so
        return load_tokens(model, source, n_seqs=n_seqs, seed=seed)
    return max(found, key=lambda batch: (len(set(batch.documents)), len(batch)))
