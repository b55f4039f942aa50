"""Mean queries and keys of every head, before rotation and after QK norm, over the ordinary tokens of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention import attention_hook, grouped_by_head
from sinklens.console import progress_bar
from sinklens.proof import capabilities
from sinklens.running import run_blocks
from sinklens.tokens import Tokens


@dataclass(eq=False)
class MeanInputs:
    """Sums over the ordinary tokens of each document.

    Attributes:
        digest: of the tokens they come from.
        sums: by document: queries and keys [layer, head, d] (keys repeated over the heads that share them), tokens.
    """

    digest: str
    sums: dict[int, tuple[Tensor, Tensor, int]]

    def documents_of(self, tokens: Tokens) -> int:
        """How many documents these means have in common with some tokens."""
        return len(self.sums) if tokens.digest == self.digest else 0

    def without(
        self, document: int, tokens: Tokens
    ) -> tuple[Float[Tensor, "layer head d"], Float[Tensor, "layer head d"]]:
        """The mean query and key over all documents but one of the same tokens (over all, of other tokens)."""
        same = tokens.digest == self.digest and len(self.sums) > 1
        kept = [entry for d, entry in self.sums.items() if not (same and d == document)]
        total = max(sum(count for _, _, count in kept), 1)
        return sum_of([q for q, _, _ in kept]) / total, sum_of([k for _, k, _ in kept]) / total


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
    found = MeanInputs(tokens.digest, {})
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
            document = tokens.documents[b]
            before = found.sums.get(document, (torch.zeros_like(q), torch.zeros_like(k), 0))
            found.sums[document] = (before[0] + q, before[1] + k, before[2] + int(kept.sum()))
            advance()
    return found
