"""Mean queries and keys of every head, before rotation and after QK norm, over the ordinary tokens of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, grouped_by_head
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError
from sinklens.inputs.tokens import Tokens
from sinklens.show.progress import progress_bar


@dataclass(frozen=True, eq=False)
class Sums:
    """The ordinary tokens of one sequence: sums of queries and keys [layer, head, d], and how many there are."""

    document: int
    row: tuple[int, ...]
    q: Tensor
    k: Tensor
    count: int


@dataclass(eq=False)
class MeanInputs:
    """Sums over the ordinary tokens of each sequence of ``tokens`` (keys repeated over the heads that share them)."""

    digest: str
    sums: list[Sums]

    def without(
        self, tokens: Tokens, sequence: int
    ) -> tuple[Float[Tensor, "layer head d"], Float[Tensor, "layer head d"]]:
        """The mean query and key over all documents but that of a sequence.

        Raises:
            BadInputError: there is no other.
        """
        row = tuple(tokens.row(sequence).tolist())
        same = tokens.digest == self.digest
        kept = [s for s in self.sums if s.row != row and not (same and s.document == tokens.documents[sequence])]
        total = sum(s.count for s in kept)
        if not total:
            raise BadInputError(
                "the mean query and key are taken over other documents, and reference= holds none; give more sequences"
            )
        return sum_of([s.q for s in kept]) / total, sum_of([s.k for s in kept]) / total


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(tensors)).sum(0)


def gather_means(
    model: TransformerBridge, tokens: Tokens, apart: Sequence[Sequence[int]], *, progress: bool | None = None
) -> MeanInputs:
    """Run the sequences and add up queries and keys at all positions but ``apart`` (the sinks of each sequence)."""
    facts = capabilities(model)
    normed = "hook_q_normed" in facts.fires
    points = ("hook_q_normed", "hook_k_normed") if normed else ("hook_q", "hook_k")
    heads = (facts.n_heads, facts.n_kv_heads)
    found = MeanInputs(tokens.digest, [])
    with progress_bar("mean queries and keys", len(tokens), progress) as advance:
        for b in range(len(tokens)):
            one = tokens[b].trim().to(str(model.cfg.device))
            kept = torch.ones(int(one.lengths[0]), dtype=torch.bool, device=one.ids.device)
            kept[list(apart[b])] = False
            sums: list[list[Tensor]] = [[], []]

            def add(side: int, kept: Tensor = kept, sums: list[list[Tensor]] = sums) -> Any:
                def hook(tensor: Tensor, hook: Any) -> None:
                    first = facts.heads_first or (normed and tensor.ndim == 4)
                    x = grouped_by_head(tensor.detach(), heads[side], first)[0]
                    sums[side].append(x[kept].double().sum(0).cpu())

                return hook

            hooks = [(attention_hook(n, points[i]), add(i)) for n in range(facts.n_layers) for i in (0, 1)]
            run_blocks(model, one.ids, hooks)
            q = torch.stack(sums[0])
            k = torch.stack(sums[1]).repeat_interleave(facts.n_heads // facts.n_kv_heads, 1)
            row = tuple(tokens.row(b).tolist())
            found.sums.append(Sums(tokens.documents[b], row, q, k, int(kept.sum())))
            advance()
    return found
