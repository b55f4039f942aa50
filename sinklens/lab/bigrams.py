"""Tasks whose tokens follow bigrams: Bigram-Backcopy of Guo et al., and Recall, in which a sink need not write."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.lab.tasks import Batch, check_packing, entropy_of, unscored


@dataclass(frozen=True)
class BigramBackcopy:
    """Bigram-Backcopy of Guo et al. 2024: as Backcopy, but tokens are drawn from the bigrams of a text's characters.

    ``x_t = x_{t-2}`` if ``x_{t-1}`` is a trigger (one of the most frequent characters) and ``x_{t-2}`` is not BOS,
    else ``x_t ~ P(. | x_{t-1})``. Floors are exact: 0 for copies, the entropy of the row for the others.

    Attributes:
        packing: "random": the first token follows the unigram; "bos": BOS first.
        triggers: how many of the most frequent characters.
        seq_len: length.
        characters: how many of the most frequent characters are used; the rest are left out.
    """

    packing: str = "bos"
    triggers: int = 3
    seq_len: int = 64
    characters: int = 60

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of tokens."""
        return ("draw", "copy")

    @property
    def masking(self) -> str:
        """One document per sequence."""
        return "causal"

    def __post_init__(self) -> None:
        check_packing(self.packing, "causal", None, self.seq_len)
        if not 1 <= self.triggers < self.characters:
            raise BadInputError(f"triggers must be between 1 and {self.characters - 1}, got {self.triggers}")

    @property
    def n_vocab(self) -> int:
        """BOS and the characters."""
        return 1 + self.characters

    @cached_property
    def tables(self) -> tuple[Float[Tensor, " id"], Float[Tensor, "id id"]]:
        """Unigram and bigram probabilities of the text; ids by frequency, so that triggers are 1, 2, ..."""
        from pydoc_data.topics import topics  # half a megabyte of text

        text = "\n".join(topics[key] for key in sorted(topics))
        common = [c for c, _ in sorted(Counter(text).items(), key=lambda pair: (-pair[1], pair[0]))]
        ids = {c: i + 1 for i, c in enumerate(common[: self.characters])}
        series = torch.tensor([ids[c] for c in text if c in ids])
        pairs = torch.zeros(self.n_vocab, self.n_vocab, dtype=torch.float64)
        pairs.index_put_((series[:-1], series[1:]), torch.ones(len(series) - 1, dtype=torch.float64), accumulate=True)
        unigram = torch.bincount(series, minlength=self.n_vocab).double()
        pairs[0] = unigram  # after BOS, any character
        return unigram / unigram.sum(), pairs / pairs.sum(1, keepdim=True)

    def sample(self, n: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:  # noqa: ARG002
        """``n`` sequences."""
        unigram, bigram = self.tables
        entropy = torch.tensor([entropy_of(row) for row in bigram], dtype=torch.float64)
        ids = torch.zeros(n, self.seq_len, dtype=torch.long)
        classes = torch.zeros_like(ids)
        floor = torch.full(ids.shape, entropy_of(unigram), dtype=torch.float64)
        if self.packing == "random":
            ids[:, 0] = torch.multinomial(unigram, n, replacement=True, generator=generator)
        for t in range(1, self.seq_len):
            last = ids[:, t - 1]
            ids[:, t] = torch.multinomial(bigram[last], 1, generator=generator)[:, 0]
            floor[:, t] = entropy[last]
            if t >= 2:
                copied = (last > 0) & (last <= self.triggers) & (ids[:, t - 2] > 0)
                ids[:, t] = torch.where(copied, ids[:, t - 2], ids[:, t])
                classes[copied, t], floor[copied, t] = 1, 0.0
        return Batch(ids, *unscored(ids, classes, floor), torch.zeros_like(ids))


@dataclass(frozen=True)
class Recall:
    """After a trigger comes the sequence's first token; all others follow a bigram, for which attention is no help.

    BOS, then a token m drawn uniformly from the ordinary ones; ``x_t = m`` if ``x_{t-1}`` is a trigger, else
    ``x_t ~ P(. | x_{t-1})`` with random, sparse rows (Dirichlet). So a head is needed after triggers only, and its
    values must carry any token's identity: what it reads elsewhere is in the way, unless that token writes nothing.
    With few dimensions per head (self-attention needs many) and no MLP (which would remove what is written), the
    sink's value drains. Floors are exact: 0 for recalls, the row's entropy for the others.

    Attributes:
        triggers, trigger_rate: ids 1 to ``triggers`` are triggers, of this probability in all in every row.
        concentration: of the Dirichlet; small is sparse.
        table_seed: of the rows, which are the same for every run.
        seq_len, n_vocab: sizes.
    """

    triggers: int = 3
    trigger_rate: float = 0.2
    concentration: float = 0.05
    table_seed: int = 5
    seq_len: int = 64
    n_vocab: int = 64

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of tokens."""
        return ("draw", "recall")

    @property
    def masking(self) -> str:
        """One document per sequence."""
        return "causal"

    def __post_init__(self) -> None:
        check_packing("bos", "causal", None, self.seq_len)
        if not 1 <= self.triggers < self.n_vocab - 2 or not 0 < self.trigger_rate < 1 or self.concentration <= 0:
            raise BadInputError(
                f"Recall needs 1 to n_vocab - 3 triggers, a trigger_rate between 0 and 1 and a positive concentration, "
                f"got {self.triggers} of {self.n_vocab}, {self.trigger_rate}, {self.concentration}"
            )

    @cached_property
    def bigram(self) -> Float[Tensor, "id id"]:
        """The rows."""
        first = 1 + self.triggers
        rows = torch.zeros(self.n_vocab, self.n_vocab, dtype=torch.float64)
        drawn = np.random.default_rng(self.table_seed).dirichlet(
            [self.concentration] * (self.n_vocab - first), size=self.n_vocab
        )
        rows[:, first:] = torch.tensor(drawn) * (1 - self.trigger_rate)
        rows[:, 1:first] = self.trigger_rate / self.triggers
        return rows

    def sample(self, n: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:  # noqa: ARG002
        """``n`` sequences."""
        entropy = torch.tensor([entropy_of(row) for row in self.bigram], dtype=torch.float64)
        first = 1 + self.triggers
        ids = torch.zeros(n, self.seq_len, dtype=torch.long)
        ids[:, 1] = torch.randint(first, self.n_vocab, (n,), generator=generator)
        classes = torch.zeros_like(ids)
        floor = torch.full(ids.shape, math.log(self.n_vocab - first), dtype=torch.float64)
        for t in range(2, self.seq_len):
            last = ids[:, t - 1]
            ids[:, t] = torch.multinomial(self.bigram[last], 1, generator=generator)[:, 0]
            recalled = last < first
            ids[:, t] = torch.where(recalled, ids[:, 1], ids[:, t])
            floor[:, t] = torch.where(recalled, 0.0, entropy[last])
            classes[recalled, t] = 1
        return Batch(ids, *unscored(ids, classes, floor), torch.zeros_like(ids))
