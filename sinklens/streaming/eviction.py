"""``eviction_study``: which tokens must stay in a rolling cache? Sinks, the first tokens, random ones, or none."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensWarning
from sinklens.core.intervals import summary
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar
from sinklens.streaming.attention import check_recent
from sinklens.streaming.loss import bin_rows, sequence_losses

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FULL = "full attention"
NONE = "window only"


@dataclass(frozen=True)
class Cache:
    """One condition: which positions of each sequence stay, beside how many recent tokens (None: all)."""

    keeps: str
    recent: int | None
    kept: tuple[tuple[int, ...], ...]


@public_methods
@dataclass(frozen=True, eq=False)
class EvictionStudy(ShownInJupyter):
    """What :func:`eviction_study` measured.

    Attributes:
        losses: of every prediction, [condition, batch, pos]; NaN at and beyond a sequence's last token.
        caches: the conditions, full attention first.
        tokens: the sequences.
        info: model, seed.
    """

    losses: Float[Tensor, "condition batch pos"]
    caches: tuple[Cache, ...]
    tokens: Tokens
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"EvictionStudy of {len(self.tokens)} sequence(s)\n" + self.to_dataframe().to_string(
            index=False, float_format=lambda value: f"{value:.3f}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition.

        Columns: ``keeps, recent, kept`` (tokens that stay, mean over sequences), ``loss, perplexity``, ``cost`` (loss
        above full attention) and ``gain`` (loss below the window alone of the same size), the last two paired by
        sequence; ``_low`` and ``_high`` are 95 % bootstrap-t intervals over documents (16 or more). Losses are means
        over sequences of their means.
        """
        values = self.losses.double().nanmean(-1)
        alone = {c.recent: values[n] for n, c in enumerate(self.caches) if c.keeps == NONE}
        rows = []
        for n, cache in enumerate(self.caches):
            row: dict[str, Any] = {"keeps": cache.keeps, "recent": cache.recent or math.nan}
            row["kept"] = sum(map(len, cache.kept)) / len(cache.kept) if cache.recent else math.nan
            row |= summary(values[n], self.tokens.documents, "loss")
            row["perplexity"] = math.exp(row["loss"])
            nothing = torch.full_like(values[n], torch.nan)
            row |= summary(values[n] - values[0] if n else nothing, self.tokens.documents, "cost")
            gain = alone[cache.recent] - values[n] if cache.recent in alone and cache.keeps != NONE else nothing
            rows.append(row | summary(gain, self.tokens.documents, "gain"))
        return pd.DataFrame(rows)

    def positions(self) -> pd.DataFrame:
        """The loss by position of the prediction, in bins that double from 64 tokens on: one row per condition, bin."""
        rows = []
        for n, cache in enumerate(self.caches):
            named = {"keeps": cache.keeps, "recent": cache.recent or math.nan}
            rows += [named | row for row in bin_rows(self.losses[n], self.tokens)]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Perplexity of every condition, one colour per window, full attention as a line."""
        from sinklens.streaming.figures import study_bars  # plotly is slow to load

        return study_bars(self.to_dataframe())

    def plot_positions(self, recent: int | None = None) -> Figure:
        """Loss against position for one window (default: the smallest)."""
        from sinklens.streaming.figures import loss_by_position  # plotly is slow to load

        sizes = sorted({c.recent for c in self.caches if c.recent is not None})
        size = sizes[0] if recent is None else recent
        if size not in sizes:
            raise BadInputError(f"recent={recent} was not measured; there are {sizes}")
        table = self.positions()
        chosen = {
            c.keeps: pd.DataFrame(table[(table.keeps == c.keeps) & ((table.recent == size) | (c.recent is None))])
            for c in self.caches
            if c.recent in (None, size)
        }
        return loss_by_position(chosen, size)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {"losses": self.losses} | {f"tokens.{n}": t for n, t in self.tokens.tensors().items()}
        meta = {"caches": [asdict(c) for c in self.caches], "tokens": self.tokens.meta(), "info": self.info}
        return save_tensors(path, "EvictionStudy", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvictionStudy:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "EvictionStudy")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        caches = tuple(
            Cache(c["keeps"], c["recent"], tuple(tuple(int(p) for p in row) for row in c["kept"]))
            for c in meta["caches"]
        )
        return cls(tensors["losses"], caches, Tokens.from_parts(batch, meta["tokens"]), meta["info"])

    @classmethod
    def concatenate(cls, parts: Sequence[EvictionStudy]) -> EvictionStudy:
        """Studies of several texts as one; documents of different parts stay different.

        Raises:
            BadInputError: no part, or parts with other conditions.
        """
        if not parts or any([(c.keeps, c.recent) for c in p.caches] != _names(parts[0]) for p in parts):
            raise BadInputError("studies can be joined if all have the same conditions in the same order")
        longest = max(p.losses.shape[-1] for p in parts)
        losses = [torch.nn.functional.pad(p.losses, (0, longest - p.losses.shape[-1]), value=torch.nan) for p in parts]
        caches = tuple(
            Cache(c.keeps, c.recent, tuple(row for p in parts for row in p.caches[n].kept))
            for n, c in enumerate(parts[0].caches)
        )
        tokens = Tokens.concatenate([p.tokens for p in parts])
        return cls(torch.cat(losses, 1), caches, tokens, parts[0].info)


def _names(study: EvictionStudy) -> list[tuple[str, int | None]]:
    return [(c.keeps, c.recent) for c in study.caches]


@public
def eviction_study(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    recent: int | Sequence[int] = (64, 256),
    *,
    first: Sequence[int] = (1, 2, 4),
    sinks: SinkMap | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> EvictionStudy:
    """Which tokens must stay in a rolling cache? The loss of every token under each of these, for every window:

    ``window only``; the ``first k``; the ``primary sinks`` and ``all sinks`` that :func:`sinklens.find_sinks` finds;
    ``random k`` (k the largest of ``first``), drawn among the first ``min(recent)`` tokens behind the first k, so that
    they are as old as the first tokens when eviction begins; ``random, as many as sinks``, drawn from the whole text.
    Random tokens are no sinks. Full attention is the base.

    Args:
        model: a causal bridge with a trained language-model head and relative positions.
        tokens: the sequences; each runs without padding.
        recent: how many of the latest tokens the caches hold beside what they keep.
        first: how many first tokens.
        sinks: where the sinks are; default: ``find_sinks(model, tokens)``.
        seed: of the random tokens; sequence b of a batch draws from ``seed + b``.
        progress: show a bar.

    Raises:
        BadInputError: no window, a window so long that no sequence evicts anything, sinks of other sequences.
        UnsupportedModelError: as for :func:`sinklens.streaming.streaming_attention`.

    Source: Xiao et al. 2024 (2309.17453), tables 1 and 2, with sinks where they are instead of first tokens.
    Cost: one forward per sequence, window and distinct choice of kept tokens; beside them one for full attention and,
    without ``sinks=``, the scores.
    """
    batch = as_tokens(model, tokens)
    sizes = (recent,) if isinstance(recent, int) else tuple(dict.fromkeys(recent))
    for size in sizes:
        check_recent(size)
    longest = int(batch.lengths.max())
    if not sizes or max(sizes) >= longest:
        raise BadInputError(
            f"a cache of {list(sizes)} recent tokens evicts nothing from texts of up to {longest} tokens"
        )
    if any(isinstance(k, bool) or k < 1 for k in first):
        raise BadInputError(f"first= counts first tokens, each at least 1; got {list(first)}")
    if sinks is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)  # the notes are in info
            sinks = find_sinks(model, batch)
    elif sinks.tokens.digest != batch.digest:
        raise BadInputError("these sinks were found in other sequences; leave sinks= out, or find them in these")
    keeps = {label: tuple(rows) for label, rows in _choices(batch, sinks, first, min(sizes), seed).items()}
    empty = tuple(() for _ in range(len(batch)))
    caches = [Cache(FULL, None, empty)]
    caches += [Cache(label, size, rows) for size in sizes for label, rows in keeps.items()]
    known: dict[tuple[int, int | None, tuple[int, ...]], Tensor] = {}
    with progress_bar("eviction", len(batch) * len(caches), progress) as advance:
        for b in range(len(batch)):
            ids = batch[b].trim().ids
            for cache in caches:
                key = b, cache.recent, cache.kept[b]
                if key not in known:  # the first token is often the primary sink: the same cache
                    known[key] = sequence_losses(model, ids, cache.kept[b], cache.recent)
                advance()
    rows = [torch.nn.functional.pad(t, (0, longest - len(t)), value=torch.nan) for t in known.values()]
    table = dict(zip(known, rows, strict=True))
    losses = torch.stack([torch.stack([table[b, c.recent, c.kept[b]] for b in range(len(batch))]) for c in caches])
    info = {
        "capabilities": asdict(capabilities(model)),
        "seed": seed,
        "sinks": sinks.method,
        "notes": list(sinks.notes),
    }
    return EvictionStudy(losses, tuple(caches), batch, info)


def _choices(
    tokens: Tokens, sinks: SinkMap, first: Sequence[int], window: int, seed: int
) -> dict[str, list[tuple[int, ...]]]:
    """Per label, what each sequence keeps."""
    few = max(first, default=4)
    found: dict[str, list[tuple[int, ...]]] = {NONE: []}
    found |= {f"first {k}": [] for k in first}
    found |= {"primary sinks": [], "all sinks": [], f"random {few}": [], "random, as many as sinks": []}
    for b in range(len(tokens)):
        length = int(tokens.lengths[b])
        everything = sorted(set(sinks.positions(b)))
        primary = tuple(sorted({s.position for s in sinks.where(sequence=b) if s.kind == "primary"}))
        generator = torch.Generator().manual_seed(seed + b)
        found[NONE].append(())
        for k in first:
            found[f"first {k}"].append(tuple(range(min(k, length))))
        found["primary sinks"].append(primary)
        found["all sinks"].append(tuple(everything))
        for label, until, count in (
            (f"random {few}", min(window, length), few),
            ("random, as many as sinks", length, len(everything)),
        ):
            free = [p for p in range(few, until) if p not in everything]
            order = torch.randperm(len(free), generator=generator)[:count].tolist()
            found[label].append(tuple(sorted(free[n] for n in order)))
    return found
