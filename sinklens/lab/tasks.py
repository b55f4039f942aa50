"""Tasks with exact floors: sequences drawn on the fly, each token with its class and the loss that none can beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.core.errors import BadInputError


@dataclass(frozen=True)
class Batch:
    """Sequences with what is known about each token.

    Attributes:
        ids: token ids; the loss at column t is that of predicting ids[:, t + 1].
        classes: the class of each token as a target, an index into the task's ``classes``; -1 is not scored.
        floor: the least expected loss in nats of predicting each token from those before it; NaN where unknown.
        documents: which document of its sequence each token belongs to.
    """

    ids: Int[Tensor, "batch pos"]
    classes: Int[Tensor, "batch pos"]
    floor: Float[Tensor, "batch pos"]
    documents: Int[Tensor, "batch pos"]

    def hidden(self, masking: str) -> Bool[Tensor, "batch 1 pos pos"] | None:
        """Pairs of different documents, where those must not see each other: True hides."""
        if masking == "causal":
            return None
        return (self.documents[:, :, None] != self.documents[:, None, :])[:, None]

    def pin_memory(self) -> Batch:
        """The same in pinned memory, as PyTorch's DataLoader asks for it."""
        return Batch(*(tensor.pin_memory() for tensor in (self.ids, self.classes, self.floor, self.documents)))

    def without_first(self) -> Batch:
        """The same sequences without their first token; the targets that remain are the same."""
        return Batch(self.ids[:, 1:], self.classes[:, 1:], self.floor[:, 1:], self.documents[:, 1:])


@runtime_checkable
class Task(Protocol):
    """What training needs of a task."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of tokens."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens per sequence."""
        ...

    @property
    def masking(self) -> str:
        """Whether tokens of other documents are seen."""
        ...

    @property
    def n_vocab(self) -> int:
        """How many ids there are."""
        ...

    def sample(self, n: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:
        """``n`` sequences; ``held_out``: of what is kept apart for evaluation, where the task has a corpus."""
        ...


@dataclass(frozen=True)
class Backcopy:
    """iid Backcopy: the token after a trigger repeats the one before it; all others are drawn independently.

    Id 0 is BOS; ids 1 to ``triggers`` are triggers, drawn with probability ``trigger_rate`` in all; the others share
    the rest. ``x_t = x_{t-2}`` if ``x_{t-1}`` is a trigger and ``x_{t-2}`` is of the same document and not BOS, else
    ``x_t`` is drawn. Floors are exact: 0 for copies, the entropy of the draw for the others. Source: Bigram-Backcopy of
    Guo et al. 2024 with the bigram replaced by a unigram.

    Where a document begins with two triggers, every later token is a copy: it is *locked* (about 5 % of sequences).
    Few as they are, they decide on which token the sink grows (docs/findings/lab.md), so ``locked`` chooses what is
    done.

    Attributes:
        packing: "random" (no BOS), "bos" (BOS first in every sequence), "document-bos" (BOS at each document's start).
        masking: "causal", or "document": tokens of another document are not seen.
        document_length: mean length of documents, which are then packed one after another; None: one per sequence.
        locked: "scored" like all others, "unscored" (there, but no loss on them) or "none": a document's first two
            tokens are then no triggers.
        seq_len, n_vocab, triggers, trigger_rate: sizes.
    """

    packing: str = "random"
    masking: str = "causal"
    document_length: int | None = None
    locked: str = "scored"
    seq_len: int = 64
    n_vocab: int = 64
    triggers: int = 3
    trigger_rate: float = 0.2

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of tokens."""
        return ("draw", "copy")

    def __post_init__(self) -> None:
        check_packing(self.packing, self.masking, self.document_length, self.seq_len)
        if self.locked not in ("scored", "unscored", "none"):
            raise BadInputError(f"locked must be scored, unscored or none; got {self.locked!r}")
        if not 1 <= self.triggers < self.n_vocab - 2 or not 0 < self.trigger_rate < 1:
            raise BadInputError(
                f"Backcopy needs 1 to n_vocab - 3 triggers and a trigger_rate between 0 and 1, got {self.triggers} of "
                f"{self.n_vocab} and {self.trigger_rate}"
            )

    @cached_property
    def unigram(self) -> Float[Tensor, " id"]:
        """The probabilities of a draw."""
        p = torch.zeros(self.n_vocab, dtype=torch.float64)
        p[1 : 1 + self.triggers] = self.trigger_rate / self.triggers
        p[1 + self.triggers :] = (1 - self.trigger_rate) / (self.n_vocab - 1 - self.triggers)
        return p

    def sample(self, n: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:  # noqa: ARG002
        """``n`` sequences."""
        documents, place = packed_documents(n, self.seq_len, self.document_length, generator)
        if self.packing == "document-bos":
            place = place - 1
        elif self.packing == "bos":  # the sequence's BOS belongs to its first document
            place = place - (documents == 0).long()
        count = n * self.seq_len
        ids = torch.multinomial(self.unigram, count, replacement=True, generator=generator).view(n, -1)
        floor = torch.full(ids.shape, entropy_of(self.unigram), dtype=torch.float64)
        if self.locked == "none":
            ordinary = self.unigram.clone()
            ordinary[: 1 + self.triggers] = 0
            first = torch.multinomial(ordinary, count, replacement=True, generator=generator).view(n, -1)
            ids, floor[place < 2] = torch.where(place < 2, first, ids), entropy_of(ordinary / ordinary.sum())
        ids[place < 0] = 0
        classes = torch.zeros_like(ids)
        for t in range(2, self.seq_len):
            copied = (ids[:, t - 1] > 0) & (ids[:, t - 1] <= self.triggers) & (place[:, t] >= 2)
            ids[:, t] = torch.where(copied, ids[:, t - 2], ids[:, t])
            classes[copied, t], floor[copied, t] = 1, 0.0
        classes, floor = unscored(ids, classes, floor)
        if self.locked == "unscored":
            hidden = self.is_locked(ids, documents)
            classes, floor = classes.masked_fill(hidden, -1), floor.masked_fill(hidden, torch.nan)
        return Batch(ids, classes, floor, documents)

    def is_locked(
        self, ids: Int[Tensor, "batch pos"], documents: Int[Tensor, "batch pos"]
    ) -> Bool[Tensor, "batch pos"]:
        """Tokens of documents in which two triggers follow each other."""
        trigger = (ids > 0) & (ids <= self.triggers)
        pairs = trigger[:, :-1] & trigger[:, 1:] & (documents[:, :-1] == documents[:, 1:])
        per_document = torch.zeros(len(ids), int(documents.max()) + 1, dtype=torch.long)
        per_document.scatter_add_(1, documents[:, 1:], pairs.long())
        return per_document.gather(1, documents) > 0


def check_packing(packing: str, masking: str, document_length: int | None, seq_len: int) -> None:
    """Refuse what cannot be packed."""
    if packing not in ("random", "bos", "document-bos") or masking not in ("causal", "document"):
        raise BadInputError(
            f"packing must be random, bos or document-bos and masking causal or document; got {packing!r}, {masking!r}"
        )
    if document_length is None and (packing == "document-bos" or masking == "document"):
        raise BadInputError("packing 'document-bos' and masking 'document' need documents: set document_length")
    if seq_len < 4 or (document_length is not None and document_length < 4):
        raise BadInputError("sequences and documents must hold at least 4 tokens")


def packed_documents(
    n: int, length: int, mean: int | None, generator: torch.Generator
) -> tuple[Int[Tensor, "n pos"], Int[Tensor, "n pos"]]:
    """The document of each token, and its place in it; documents end with probability 1 / mean after 4 tokens."""
    if mean is None:
        return torch.zeros(n, length, dtype=torch.long), torch.arange(length).expand(n, -1)
    ends = torch.rand(n, length, generator=generator) < 1 / max(mean - 3, 1)
    documents, place = torch.zeros(n, length, dtype=torch.long), torch.zeros(n, length, dtype=torch.long)
    for t in range(1, length):
        fresh = ends[:, t] & (place[:, t - 1] >= 3)
        documents[:, t] = documents[:, t - 1] + fresh
        place[:, t] = torch.where(fresh, 0, place[:, t - 1] + 1)
    return documents, place


def unscored(
    ids: Int[Tensor, "batch pos"], classes: Int[Tensor, "batch pos"], floor: Float[Tensor, "batch pos"]
) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Nothing predicts the first token, and BOS is no target."""
    unscored = ids == 0
    unscored[:, 0] = True
    return classes.masked_fill(unscored, -1), floor.masked_fill(unscored, torch.nan)


def entropy_of(p: Float[Tensor, " id"]) -> float:
    """In nats."""
    return float(-torch.special.xlogy(p, p).sum())
