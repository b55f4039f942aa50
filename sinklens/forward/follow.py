"""``Forward``: what an edit knows about the forward that it finds itself in.

TransformerLens hooks see tensors, not masks or positions. A few hooks that only read follow the ids, the padding and,
under ``generate`` with a KV cache, how much has been seen before, so that edits can index by absolute position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Armed, hook_points, running
from sinklens.bridge.adapters import attention_hook, either_backend
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensError
from sinklens.inputs.tokens import Tokens

EMBED = "embed.hook_in"
_numbers: ContextVar[tuple[int, ...]] = ContextVar("sequence numbers", default=())
READERS = 3  # how many hooks of a list follow the forward, before those that edit


@contextmanager
def numbered(sequences: Sequence[int]) -> Iterator[None]:
    """The rows of forwards inside are these sequences (all rows, if it is one).

    Edits know a row by its ids. Where a text occurs twice, only this tells which of the two it is.
    """
    before = _numbers.set(tuple(sequences))
    try:
        yield
    finally:
        _numbers.reset(before)


class Forward:
    """The running forward: its ids so far, its padding, and which known sequence each row is.

    Attributes:
        ids: every id so far, cached ones included: [batch, column].
        past: columns that came before this call (0 without a KV cache).
        mask: unpadded columns; None until layer 0's attention has shown it.
        rows: for edits that belong to :class:`Tokens`, the sequence of each row.
    """

    def __init__(self, model: TransformerBridge, tokens: Tokens | None = None, *, known_only: bool = True) -> None:
        self.tokens = tokens
        self.known_only = known_only
        self.ids: Int[Tensor, "batch column"] | None = None
        self.past = 0
        self.mask: Bool[Tensor, "batch column"] | None = None
        self.rows: list[int | None] = []
        self._starts: Int[Tensor, " batch"] | None = None
        self._visited: set[str] = set()
        self._known = [] if tokens is None else [tokens.row(i).cpu() for i in range(len(tokens))]
        self._shown = False
        self._model = ref(model)
        facts = capabilities(model)
        self._logits = facts.scores_are_logits
        self._first = attention_hook(0, "hook_attn_scores" if self._logits else "hook_pattern")

    def hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """The reading hooks; they change nothing and belong before the edits that use this object."""

        first_input = attention_hook(0, "hook_in")

        def see_padding(scores: Tensor, hook: Any) -> None:
            self._see_padding(scores)

        def listen(_: Tensor, hook: Any) -> None:
            model = self._model()
            state = None if model is None else running(model)
            if model is not None and state is not None:
                state.arm(0, Armed(self, hook_points(model)[first_input], listen))

        return [(EMBED, self._begin), (first_input, listen), (self._first, either_backend(see_padding))]

    @property
    def columns(self) -> int:
        """How many columns there are, cached ones included."""
        return self._ids.shape[1]

    @property
    def starts(self) -> Int[Tensor, " batch"]:
        """Each row's first unpadded column: position 0."""
        if self.mask is not None:
            return self.mask.int().argmax(1)
        if self._starts is not None:
            return self._starts
        return torch.zeros(self._ids.shape[0], dtype=torch.long, device=self._ids.device)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Unpadded columns of each row; before layer 0's attention, all after the start."""
        return self.columns - self.starts if self.mask is None else self.mask.sum(1)

    @property
    def _ids(self) -> Int[Tensor, "batch column"]:
        if self.ids is None:
            raise SinklensError(
                "an edit ran before the embedding: these hooks need a forward from token ids "
                "(not from inputs_embeds, nor start_at_layer)"
            )
        return self.ids

    def visit(self, name: str) -> None:
        """Say that an edit of this name runs; refuses a second time without a new embedding."""
        if name in self._visited:
            raise SinklensError(
                f"{name} ran twice without an embedding in between: these hooks need a forward from token ids"
            )
        _ = self._ids
        self._visited.add(name)

    def mark(self, positions: list[list[int]]) -> Bool[Tensor, "batch column"]:
        """The columns of each row's positions; positions at or beyond the end are left out."""
        marked = torch.zeros(self._ids.shape, dtype=torch.bool, device=self._ids.device)
        starts, lengths = self.starts.tolist(), self.lengths.tolist()
        for b, row in enumerate(positions):
            inside = [starts[b] + p for p in row if p < lengths[b]]
            marked[b, inside] = True
        return marked

    def _begin(self, ids: Tensor, hook: Any) -> None:
        goes_on = self.ids is not None and ids.shape == (self.ids.shape[0], 1) and self.ids.shape[1] > 1
        self._visited.clear()
        self._shown = False
        if goes_on and self.ids is not None:
            self.past = self.ids.shape[1]
            self.ids = torch.cat([self.ids, ids], 1)
            if self.mask is not None:
                self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
            return
        if ids.ndim != 2 or ids.is_floating_point():
            raise BadInputError(f"these hooks need token ids [batch, pos], got {tuple(ids.shape)} of {ids.dtype}")
        self.ids, self.past, self.mask, self._starts = ids, 0, None, None
        self.rows = [None] * ids.shape[0]
        if self.tokens is not None:
            found = [self._match(row.cpu(), b) for b, row in enumerate(ids)]
            self.rows = [sequence for sequence, _ in found]
            if self.known_only:
                self._starts = torch.tensor([start for _, start in found], device=ids.device)

    def _match(self, row: Int[Tensor, " column"], number: int) -> tuple[int | None, int]:
        """The longest known sequence that stands in this row, with its first column; of copies that of its number."""
        given = _numbers.get()
        own = given[min(number, len(given) - 1)] if given else number
        order = sorted(range(len(self._known)), key=lambda i: (-len(self._known[i]), i != own))
        for i in order:
            known = self._known[i]
            if len(known) > len(row):
                continue
            hits = (row.unfold(0, len(known), 1) == known).all(1).nonzero()
            if len(hits):
                return i, int(hits[0])
        if self.known_only:
            raise BadInputError(
                f"row {number} of this forward is none of the {len(self._known)} sequences that these hooks were built "
                f"for: run them on the same Tokens, or rebuild them elsewhere with hooks.at(positions)"
            )
        return None, 0

    def _see_padding(self, scores: Tensor) -> None:
        """Layer 0's attention shows which columns are real: every real one sees itself, no one sees padding."""
        if self._shown:  # a delegating host shows its pattern afterwards
            return
        shown = scores[:, 0] > torch.finfo(scores.dtype).min / 2 if self._logits else scores[:, 0] > 0
        self.see(shown.any(1), scores.shape[-2], scores.shape[-1])

    def see(self, real: Bool[Tensor, "batch key"], queries: int, keys: int) -> None:
        """Learn in layer 0 which of its keys are real.

        Raises:
            BadInputError: a cache that edits cannot follow, left padding that an earlier edit could not know of, a
                known sequence that does not begin where it should.
        """
        self._shown = True
        if queries < keys or (self.past and queries == 1):
            if not self.past or queries != 1 or keys > self.columns:
                raise BadInputError(
                    "these hooks follow a KV cache that is filled by one prompt and then one token at a time; "
                    f"here {queries} tokens met {keys} keys"
                )
            if keys == 1:
                raise BadInputError("a forward of one token has nothing to attend to; give at least 2 tokens")
            return
        self.mask = real
        starts = self.mask.int().argmax(1)
        if self._starts is None:
            if (starts > 0).any() and self._visited:
                raise BadInputError(
                    "this batch is padded on the left, and an edit before layer 0's attention cannot know where its "
                    "sequences begin: pad on the right, or build the hooks from a SinkMap or Tokens"
                )
        elif not torch.equal(starts, self._starts):
            raise BadInputError(
                "a known sequence does not begin at the first unpadded token: pass attention_mask=tokens.mask with "
                "the ids, and nothing before the sequence"
            )
