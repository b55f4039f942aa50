"""``Places``: where an edit acts, as the user named it: a SinkMap, positions, a predicate on ids, the learned sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.find.sinkmap import SinkMap
from sinklens.forward.follow import Forward
from sinklens.inputs.tokens import Tokens, check_positions

LEARNED = "learned"
Predicate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """One token of one known sequence, and the layers in which the edit acts on it (None: all)."""

    sequence: int
    position: int
    layers: frozenset[int] | None
    group: str


@dataclass(frozen=True, eq=False)
class Places:
    """Where an edit acts.

    Attributes:
        positions: the same in every sequence.
        predicate: ``ids -> bool mask [batch, pos]`` of the running forward.
        tokens, entries: tokens of known sequences, each in its own layers.
        others: (sequence, position) of every sink that was found, edited or not.
        learned: the learned logit as well.
        recent: act on the most recent tokens that are no sink instead, as many per query as it would have seen.
    """

    positions: tuple[int, ...] = ()
    predicate: Predicate | None = None
    tokens: Tokens | None = None
    entries: tuple[Place, ...] = ()
    others: tuple[tuple[int, int], ...] = ()
    learned: bool = False
    recent: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two Places the same, for keeping what was read at them."""
        digest = None if self.tokens is None else self.tokens.digest
        return self.positions, self.predicate, digest, self.entries, self.learned, self.recent

    @property
    def columns_wanted(self) -> bool:
        """Whether any token is meant, not the learned logit alone."""
        return bool(self.positions or self.predicate or self.entries)

    def acts_in(self, layer: int) -> bool:
        """Whether anything is alive at a layer."""
        if self.tokens is None:
            return True
        return any(e.layers is None or layer in e.layers for e in self.entries)

    def groups(self, forward: Forward, layer: int) -> dict[str, Bool[Tensor, "batch column"]]:
        """The columns to edit, by group: sinks that are averaged together in other sequences."""
        if self.predicate is not None:
            return {"chosen": self._chosen(forward)}
        if self.tokens is None:
            batch = len(forward.starts)
            _check_lengths(self.positions, forward)
            return {f"position {p}": forward.mark([[p]] * batch) for p in self.positions}
        alive: dict[str, list[list[int]]] = {}
        for entry in self.entries:
            if entry.layers is None or layer in entry.layers:
                rows = alive.setdefault(entry.group, [[] for _ in forward.rows])
                for b, sequence in enumerate(forward.rows):
                    if sequence == entry.sequence:
                        rows[b].append(entry.position)
        return {group: forward.mark(rows) for group, rows in alive.items()}

    def marked_or_none(self, forward: Forward, layer: int) -> dict[str, Bool[Tensor, "batch column"]]:
        """The groups that have any column; none where a predicate chooses nothing of a text."""
        try:
            groups = self.groups(forward, layer)
        except BadInputError:
            if self.predicate is None:
                raise
            return {}
        return {name: columns for name, columns in groups.items() if columns.any()}

    def columns(self, forward: Forward, layer: int) -> Bool[Tensor, "batch column"]:
        """All columns to edit at a layer."""
        marked = forward.mark([[] for _ in range(len(forward.starts))])
        for columns in self.groups(forward, layer).values():
            marked = marked | columns
        return marked

    def sinks(
        self, forward: Forward, layer: int, allowed: Bool[Tensor, "batch query key"], queries: slice, keys: slice
    ) -> Bool[Tensor, "batch #query key"]:
        """S for some queries and keys, given as columns of the forward: the columns to edit, or their recent stand-ins.

        ``allowed`` must cover every key that the queries see.
        """
        columns = self.columns(forward, layer)
        if self.recent:
            return self._recent(forward, columns, allowed, queries, keys)
        return columns[:, None, keys]

    def apart(self, forward: Forward) -> Bool[Tensor, "batch column"]:
        """Every sink that is known in these sequences."""
        where = [[p for s, p in self.others if s == sequence] for sequence in forward.rows]
        return forward.mark(where)

    def at(self, positions: Sequence[int] | Sequence[Sequence[int]]) -> Places:
        """The same edit elsewhere: one list for every sequence, or one per known sequence.

        Lists per sequence stand in for the entries of that sequence in order, in the layers of each.
        """
        nested = [p for p in positions if not isinstance(p, int)]
        if not nested:
            flat = tuple(p for p in positions if isinstance(p, int))
            return Places(positions=check_positions(flat), learned=self.learned)
        if self.tokens is None or len(nested) != len(self.tokens) or len(nested) != len(positions):
            known = "no known sequences" if self.tokens is None else f"{len(self.tokens)} sequences"
            raise BadInputError(f"lists per sequence need one for each; these hooks have {known}, got {len(positions)}")
        entries: list[Place] = []
        for sequence, row in enumerate(nested):
            mine = [e for e in self.entries if e.sequence == sequence]
            if len(row) > len(mine):
                raise BadInputError(f"sequence {sequence} has {len(mine)} places to stand in for, got {len(row)}")
            entries += [replace(e, position=p) for e, p in zip(mine, check_positions(row), strict=False)]
        return replace(self, entries=tuple(entries))

    def _chosen(self, forward: Forward) -> Bool[Tensor, "batch column"]:
        ids = forward.ids
        if self.predicate is None or ids is None:
            raise BadInputError("a predicate needs a forward from token ids")
        chosen = apply_predicate(self.predicate, ids)
        real = torch.arange(forward.columns, device=ids.device) >= forward.starts[:, None]
        if forward.mask is not None:
            real = forward.mask
        chosen = chosen & real
        if not chosen.any() and not forward.past:
            raise BadInputError("the predicate selects no token of this forward, so the edit would change nothing")
        return chosen

    def _recent(
        self,
        forward: Forward,
        columns: Bool[Tensor, "batch column"],
        allowed: Bool[Tensor, "batch query key"],
        queries: slice,
        keys: slice,
    ) -> Bool[Tensor, "batch query key"]:
        """The n latest tokens before each query that are no sink; n: how many of ``columns`` the query may see."""
        ordinary = ~(columns | self.apart(forward))
        if forward.mask is not None:
            ordinary &= forward.mask
        counted = ordinary.long().cumsum(1)
        index = torch.arange(forward.columns, device=columns.device)
        wanted = (columns[:, None, keys] & allowed).sum(-1)
        before = (counted - ordinary.long())[:, queries]  # ordinary tokens strictly before each query
        rank = before[:, :, None] - counted[:, None, keys]
        earlier = index[keys] < index[queries, None]
        return ordinary[:, None, keys] & earlier & (rank < wanted[:, :, None])


Sinks = SinkMap | Places | Sequence[int | str] | int | str | Predicate


def apply_predicate(predicate: Predicate, ids: Int[Tensor, "batch column"]) -> Bool[Tensor, "batch column"]:
    """What a user's predicate says of some ids, checked."""
    chosen = predicate(ids)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != ids.shape:
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise BadInputError(f"the predicate must give a bool mask of the ids' shape {tuple(ids.shape)}, got {got}")
    return chosen.to(ids.device)


def _check_lengths(positions: Sequence[int], forward: Forward) -> None:
    shortest = int(forward.lengths.min())
    if max(positions, default=0) >= shortest:
        row = int(forward.lengths.argmin())
        raise BadInputError(
            f"position {max(positions)} is out of range: row {row} of this forward has {shortest} tokens, so the edit "
            f"would change nothing there; take sequences that are long enough, or a SinkMap"
        )


def find_places(sinks: Sinks) -> Places:
    """Where an edit acts, from what the user passes as ``sinks``.

    Raises:
        BadInputError: no sink, no position, a name other than "learned".
    """
    if isinstance(sinks, Places):
        return sinks
    if isinstance(sinks, SinkMap):
        if not len(sinks):
            raise BadInputError("this SinkMap holds no sink, so there is nothing to edit; " + " ".join(sinks.notes))
        entries = tuple(
            Place(s.sequence, s.position, frozenset(n for a, b, _ in s.episodes for n in range(a, b + 1)), s.kind)
            for s in sinks
        )
        return Places(tokens=sinks.tokens, entries=entries, others=tuple(sinks.places or ()))
    if callable(sinks):
        return Places(predicate=sinks)
    named = [sinks] if isinstance(sinks, (int, str)) else list(sinks)
    strange = [s for s in named if isinstance(s, bool) or (not isinstance(s, int) and s != LEARNED)]
    if strange or not named:
        raise BadInputError(
            f"sinks must be a SinkMap, a list of positions, 'learned' or a predicate on the ids; got {sinks!r}"
        )
    return Places(positions=check_positions(s for s in named if isinstance(s, int)), learned=LEARNED in named)
