"""``bos_variants``: the same text with its first token kept, removed, replaced, doubled or moved.

Input-level experiments for papers' BOS tables. In RoPE models removing the first token equals masking key 0 in every
layer and head, exactly (docs/definitions.md, section 3): it is a second view of the same experiment, not more evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.validation import public, public_methods
from sinklens.forward.metrics import token_loss
from sinklens.forward.predictions import predictions
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens, pad_rows
from sinklens.inputs.vocabulary import vocabulary
from sinklens.show.notebook import ShownInJupyter

VARIANTS = ("keep", "removed", "replaced", "doubled", "middle")
SHORTEST = 4


@public_methods
class BosVariants(ShownInJupyter, dict[str, Tokens], table="_listing"):
    """Variants of a batch by name, with the tokens that all of them predict.

    ``targets[name][b]`` are the positions, in that variant, of sequence b's scored tokens: the same tokens in the
    same order in each. Left out are the first two tokens and the one that follows the moved token, since not every
    variant predicts them from text, and an encoder's special tokens.
    """

    def __init__(self, variants: dict[str, Tokens], targets: dict[str, list[list[int]]], replacement: str) -> None:
        super().__init__(variants)
        self.targets = targets
        self.replacement = replacement

    def __repr__(self) -> str:
        return f"BosVariants: {', '.join(self)} of {len(self['keep'])} sequence(s); replacement {self.replacement!r}"

    def _listing(self) -> pd.DataFrame:
        """One row per variant: how its first sequence begins, how many tokens are scored in all."""
        begins = ["".join(tokens.labels[0][:12]) for tokens in self.values()]
        scored = [sum(map(len, self.targets[name])) for name in self]
        return pd.DataFrame({"variant": list(self), "begins": begins, "scored": scored})

    def losses(
        self, model: TransformerBridge, *, hooks: Sequence[Any] = (), mask_id: int | None = None
    ) -> dict[str, list[Float[Tensor, " target"]]]:
        """Loss in nats of every scored token, per variant and sequence (encoders: pseudo-loss, :func:`token_loss`)."""
        found: dict[str, list[Tensor]] = {}
        before = int(predictions(model, mask_id).mask_id is None)  # a decoder predicts a token at the one before it
        for name, tokens in self.items():
            loss = token_loss(model, tokens, hooks=hooks, mask_id=mask_id)
            found[name] = [loss[b, [p - before for p in row]] for b, row in enumerate(self.targets[name])]
        return found

    def to_dataframe(
        self, model: TransformerBridge, *, hooks: Sequence[Any] = (), mask_id: int | None = None
    ) -> pd.DataFrame:
        """Mean loss per variant and its difference from "keep", with 95 % intervals over documents (16 or more).

        Cost: one forward per sequence and variant (encoders: one row of a forward per token).
        """
        losses = self.losses(model, hooks=hooks, mask_id=mask_id)
        documents = next(iter(self.values())).documents
        kept = torch.stack([row.nanmean() for row in losses["keep"]])
        rows = []
        for name in self:
            means = torch.stack([row.nanmean() for row in losses[name]])
            found = None if name == "keep" else interval(means - kept, documents)
            rows.append(
                {
                    "variant": name,
                    "loss": float(means.mean()),
                    "difference": float((means - kept).mean()),
                    "low": found[0] if found else float("nan"),
                    "high": found[1] if found else float("nan"),
                    "sequences": len(means),
                    "targets": sum(len(row) for row in self.targets[name]),
                }
            )
        return pd.DataFrame(rows)


@public
def bos_variants(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    replacement: int | None = None,
) -> BosVariants:
    """The batch with its BOS (or first token) kept, removed, replaced, doubled, or moved to the middle.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: sequences of at least 4 tokens.
        replacement: the token id that replaces the first; default a line break, where that is one ordinary token, else
            an ordinary token drawn with seed 0.

    Raises:
        BadInputError: a shorter sequence, a replacement outside the vocabulary or equal to a first token.
    """
    capabilities(model)  # what becomes of the variants needs hooks
    batch = as_tokens(model, tokens).to("cpu")
    words = vocabulary(model)
    if int(batch.lengths.min()) < SHORTEST:
        raise BadInputError(f"bos_variants needs sequences of at least {SHORTEST} tokens")
    firsts = {int(batch.row(b)[0]) for b in range(len(batch))}
    chosen = _line_break(words, firsts) if replacement is None else replacement
    if not 0 <= chosen < model.cfg.d_vocab:
        raise BadInputError(f"replacement {chosen} is no token id: the vocabulary has {model.cfg.d_vocab}")
    rows: dict[str, list[list[int]]] = {name: [] for name in VARIANTS}
    targets: dict[str, list[list[int]]] = {name: [] for name in VARIANTS}
    for b in range(len(batch)):
        first, *rest = batch.row(b).tolist()
        if first == chosen:
            raise BadInputError(f"sequence {b} begins with the replacement {chosen} already; give another one")
        half = len(rest) // 2  # the first token is moved behind rest[:half]
        special = batch.special[b][batch.mask[b]].tolist()
        never = special if not capabilities(model).causal else [False] * len(special)  # an encoder's [SEP]
        scored = [j for j in range(2, len(rest) + 1) if j != half + 1 and not never[j]]
        made = {
            "keep": ([first, *rest], scored),
            "removed": (rest, [j - 1 for j in scored]),
            "replaced": ([chosen, *rest], scored),
            "doubled": ([first, first, *rest], [j + 1 for j in scored]),
            "middle": ([*rest[:half], first, *rest[half:]], [j - 1 if j <= half else j for j in scored]),
        }
        for name, (ids, where) in made.items():
            rows[name].append(ids)
            targets[name].append(where)
    made_tokens = {
        name: as_tokens(
            model, pad_rows(ids, words, batch.sources, batch.documents, {**batch.info, "variant": name})
        ).to("cpu")
        for name, ids in rows.items()
    }
    return BosVariants(made_tokens, targets, words.labels([chosen])[0])


def _line_break(words: Any, firsts: set[int]) -> int:
    """A line break where it is one ordinary token, else an ordinary token, drawn with seed 0, that begins no text."""
    ids = [] if words.tokenizer is None else words.body("\n", [], [])
    if len(ids) == 1 and ids[0] not in words.special_ids:
        return int(ids[0])
    drawn = words.draw("random", 1, len(firsts) + 64, 0)[0]
    return next((int(i) for i in drawn if i not in firsts), int(drawn[0]))
