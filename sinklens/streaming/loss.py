"""``streaming_loss``: what a text costs a model that reads it through a rolling cache, in one forward."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.flash import flash
from sinklens.bridge.adapters import logit_factor, original, text_config
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.intervals import summary
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.find.sinkmap import SinkMap
from sinklens.forward.predictions import UNEMBED, predictions, scored_logits
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar
from sinklens.streaming.attention import Kept, streaming_attention

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROWS = 64  # positions whose logits exist at once


@public_methods
@dataclass(frozen=True, eq=False)
class StreamingLoss(ShownInJupyter):
    """The loss of every prediction under one rolling cache.

    Attributes:
        losses: entry [b, p] is ``-log p(token p+1 | what the cache holds at p)``; NaN at and beyond the last token.
        kept: per sequence, the positions that are never evicted.
        recent: how many of the latest tokens the cache holds beside them; None: everything (full attention).
        tokens: the sequences.
        info: model and versions.
    """

    losses: Float[Tensor, "batch pos"]
    kept: tuple[tuple[int, ...], ...]
    recent: int | None
    tokens: Tokens
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        row = self.interval()
        known = f" [{row['low']:.3f}, {row['high']:.3f}]" if row["low"] == row["low"] else ""
        cache = "full attention" if self.recent is None else f"{self.recent} recent tokens"
        keep = f", {sum(map(len, self.kept)) / len(self.kept):g} kept" if self.recent is not None else ""
        return (
            f"StreamingLoss: {row['mean']:.3f} nats{known}, perplexity {math.exp(row['mean']):.2f} ({cache}{keep}; "
            f"{len(self.tokens)} sequence(s))"
        )

    @property
    def per_sequence(self) -> Float[Tensor, " batch"]:
        """The mean over each sequence's predictions."""
        return self.losses.double().nanmean(1)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(float(self.per_sequence.mean()))

    def interval(self) -> dict[str, float]:
        """``mean, low, high`` of the loss per sequence: bootstrap-t over documents, NaN with fewer than 16 of them."""
        return summary(self.per_sequence, self.tokens.documents)

    def to_dataframe(self, by: str = "sequence") -> pd.DataFrame:
        """One row per sequence, per position bin (``by="position"``) or per token (``by="token"``).

        Bins double from 64 tokens on; the loss of a bin is the mean over sequences of their means in it.
        """
        if by == "position":
            return pd.DataFrame(bin_rows(self.losses, self.tokens))
        rows = []
        for b in range(len(self.tokens)):
            named = {"sequence": b, "source": self.tokens.sources[b], "document": self.tokens.documents[b]}
            if by == "sequence":
                loss = float(self.per_sequence[b])
                rows.append({**named, "kept": len(self.kept[b]), "loss": loss, "perplexity": math.exp(loss)})
                continue
            rows += [
                {"sequence": b, "position": p, "token": self.tokens.labels[b][p], "loss": float(self.losses[b, p])}
                for p in range(int(self.tokens.lengths[b]) - 1)
            ]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Loss against position, in bins, with the cache's size as a line."""
        from sinklens.streaming.figures import loss_by_position  # plotly is slow to load

        label = "full attention" if self.recent is None else "rolling cache"
        return loss_by_position({label: self.to_dataframe("position")}, self.recent)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {"losses": self.losses} | {f"tokens.{n}": t for n, t in self.tokens.tensors().items()}
        meta = {"kept": [list(row) for row in self.kept], "recent": self.recent}
        return save_tensors(path, "StreamingLoss", tensors, {**meta, "tokens": self.tokens.meta(), "info": self.info})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamingLoss:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "StreamingLoss")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        kept = tuple(tuple(int(p) for p in row) for row in meta["kept"])
        tokens = Tokens.from_parts(batch, meta["tokens"])
        return cls(tensors["losses"], kept, meta["recent"], tokens, meta["info"])


@public
def streaming_loss(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    sinks: Kept = 4,
    recent: int | None = 256,
    progress: bool | None = None,
) -> StreamingLoss:
    """The loss of every token, in nats, of a model that sees the kept tokens and the most recent ones only.

    Entry [b, p] is ``-log p(token p+1)`` from the cache at p; all predictions count, those made at kept tokens too.

    Args:
        model: a causal bridge with a trained language-model head and relative positions.
        tokens: the sequences; each runs without padding.
        sinks: what is never evicted: how many first tokens, positions, one list per sequence, or a SinkMap of these
            tokens.
        recent: how many of the latest tokens the cache holds; None: full attention, the base.
        progress: show a bar.

    Raises:
        BadInputError, UnsupportedModelError: as for :func:`sinklens.streaming.streaming_attention`; an encoder, or no
            trained head.

    Source: Xiao et al. 2024 (2309.17453), section 4.1: perplexity under a cache.
    Cost: one forward per sequence; logits of 64 positions at a time.
    """
    batch = as_tokens(model, tokens)
    _check_head(model)
    rows: list[Tensor] = []
    kept: list[tuple[int, ...]] = []
    with progress_bar("streaming", len(batch), progress) as advance:
        for b in range(len(batch)):
            ids = batch[b].trim().ids
            mine = own_positions(sinks, b, batch)
            rows.append(sequence_losses(model, ids, mine, recent))
            kept.append(tuple(mine if recent is not None else ()))
            advance()
    losses = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    return StreamingLoss(losses, tuple(kept), recent, batch, {"capabilities": asdict(capabilities(model))})


def own_positions(sinks: Kept, sequence: int, tokens: Tokens) -> list[int]:
    """The positions that one sequence keeps, in order."""
    if isinstance(sinks, SinkMap):
        if sinks.tokens.digest != tokens.digest:
            raise BadInputError("this SinkMap was found in other sequences; find_sinks(model, tokens) on these")
        return sorted(set(sinks.positions(sequence)))
    if isinstance(sinks, int):
        return list(range(min(sinks, int(tokens.lengths[sequence]))))
    nested = [list(row) for row in sinks if not isinstance(row, int)]
    if nested and len(nested) != len(tokens):
        raise BadInputError(f"sinks has {len(nested)} lists of positions and there are {len(tokens)} sequences")
    return sorted(nested[sequence]) if nested else sorted(p for p in sinks if isinstance(p, int))


def _check_head(model: TransformerBridge) -> None:
    if not capabilities(model).causal:
        raise UnsupportedModelError(
            f"{capabilities(model).model} is an encoder: every token sees later ones, so no cache can roll"
        )
    predictions(model)  # raises without a trained head


def sequence_losses(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], kept: Sequence[int], recent: int | None
) -> Float[Tensor, " pos"]:
    """The losses of one unpadded sequence, NaN at its last token; ``recent=None`` is full attention."""
    states: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> Tensor:
        states.append(tensor[0].detach())
        return tensor[:, -1:]

    context = flash(model) if recent is None else streaming_attention(model, list(kept), recent)
    found = torch.full((ids.shape[1],), torch.nan)
    with torch.no_grad(), context:
        last = model.run_with_hooks(ids, fwd_hooks=[(UNEMBED, keep)])[0, -1]
        tolerance = 1e-4 if last.dtype in (torch.float32, torch.float64) else 5e-2
        ours = _logits(model, states[0][-1:])[0]
        if (ours - last).abs().max() <= tolerance * (1 + last.abs().max()):
            for rows in torch.arange(ids.shape[1] - 1).split(ROWS):
                found[rows] = _cross_entropy(_logits(model, states[0][rows.to(ids.device)]), ids[0, rows + 1]).to(found)
        else:  # the host does more behind its unembedding than is known here, so it must give the logits itself
            for rows in torch.arange(ids.shape[1] - 1).split(16 * ROWS):
                found[rows] = _cross_entropy(scored_logits(model, ids, rows, []), ids[0, rows + 1])
    return found


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(wide), targets.to(logits.device), reduction="none").cpu()


def _logits(model: TransformerBridge, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocabulary"]:
    """The host's unembedding, with what usually comes behind it."""
    logits = original(model.unembed)(states[None])[0] * logit_factor(model)
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def bins(length: int) -> list[tuple[int, int]]:
    """Ranges of positions that double from 64 on: [0, 64), [64, 128), [128, 256), ..."""
    edges = [0]
    while edges[-1] < length:
        edges.append(max(64, 2 * edges[-1]))
    return [(a, min(b, length)) for a, b in zip(edges, edges[1:], strict=False)]


def bin_rows(losses: Float[Tensor, "batch pos"], tokens: Tokens) -> list[dict[str, Any]]:
    """The mean loss of the predictions made in each range of positions, with its interval over documents."""
    rows = []
    for first, end in bins(losses.shape[1] - 1):
        values = losses[:, first:end].double().nanmean(1)
        rows.append({"first": first, "last": end - 1, **summary(values, tokens.documents, "loss")})
    return rows
