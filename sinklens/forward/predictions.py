"""What a model is judged by: the next token (decoders) or the masked token (encoders), and how logits are read.

A decoder predicts token p + 1 from tokens 0 to p, all of them in one forward. An encoder sees the token itself, so its
pseudo-loss (Salazar et al. 2020, 1910.14659, section 2) hides it first::

    -log p(token p | the rest),  with [MASK] at position p:  one row of a batch per position

Edits recognise sequences, and predicates choose tokens, by the ids of the forward. So a masked row starts with the text
as it is and [MASK] is put in between the edit's own hooks and the embedding: the edit acts at the same positions, in
the same layers and with the same means as on the text (as :mod:`sinklens.mixing.perturbation` exchanges tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.adapters import text_config
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.forward.follow import EMBED
from sinklens.inputs.tokens import Tokens
from sinklens.models.load import has_trained_head, native_tokenizer

MOST_ROWS = 16  # masked copies of a sequence in one forward
MOST_TOKENS = 4096  # in one forward, since patterns grow with their product with the length
TOLERANCE = 1e-4
UNEMBED = "unembed.hook_in"


@dataclass(frozen=True)
class Predictions:
    """Which tokens of a sequence a model predicts, and from where.

    Attributes:
        mask_id: the token that hides what an encoder predicts; None for a decoder.
        unscored: ids that are never predicted: [MASK] itself, and padding.
    """

    mask_id: int | None
    unscored: frozenset[int] = frozenset()

    @property
    def masked(self) -> bool:
        """Whether tokens are masked to be predicted."""
        return self.mask_id is not None

    @property
    def words(self) -> str:
        """What ``loss`` means, for results."""
        return "pseudo-loss of masked tokens" if self.masked else "next-token loss"

    def scorable(self, tokens: Tokens, sequence: int) -> list[int]:
        """The positions with a prediction: of the next token, or of an ordinary token that can be masked."""
        ids = tokens.row(sequence).tolist()
        if not self.masked:
            return list(range(len(ids) - 1))
        special = tokens.special[sequence][tokens.mask[sequence]].tolist()
        return [p for p, i in enumerate(ids) if not special[p] and i not in self.unscored]

    def targets(self, ids: Int[Tensor, "1 pos"], scored: Int[Tensor, " scored"]) -> Int[Tensor, " scored"]:
        """The tokens that are predicted at some positions."""
        return ids[0][scored.to(ids.device) + (not self.masked)]

    def logits(
        self, model: TransformerBridge, ids: Int[Tensor, "1 pos"], scored: Int[Tensor, " scored"], hooks: Sequence[Any]
    ) -> Float[Tensor, "scored vocabulary"]:
        """The logits of the predictions at some positions of one unpadded sequence, under an edit.

        Cost: one forward for decoders; for encoders one row of a forward per position, up to 16 at once.
        """
        if self.mask_id is None:
            return scored_logits(model, ids, scored, hooks)
        size = max(1, min(MOST_ROWS, MOST_TOKENS // ids.shape[1]))
        return torch.cat([_masked_logits(model, ids, part, self.mask_id, hooks) for part in scored.split(size)])


def predictions(model: TransformerBridge, mask_id: int | None = None) -> Predictions:
    """How a model's predictions are made.

    Args:
        model: from :func:`sinklens.load_model`.
        mask_id: the id of [MASK], for encoders whose tokenizer names none or which came without one.

    Raises:
        BadInputError: a mask for a decoder, or one outside the vocabulary.
        UnsupportedModelError: no trained language-model head, an encoder without a known mask token, or one whose head
            does not predict tokens.
    """
    facts = capabilities(model)
    if not has_trained_head(model):
        raise UnsupportedModelError(
            f"{facts.model} predicts no next token and no masked one: its weights hold no trained language-model head, "
            f"so loss and KL would mean nothing; sink_scores and the hook builders work on it"
        )
    if facts.causal:
        if mask_id is not None:
            raise BadInputError(f"{facts.model} is a decoder and predicts the next token; mask_id= is for encoders")
        return Predictions(None)
    if not has_hook(model, UNEMBED):
        raise UnsupportedModelError(f"{facts.model} ({facts.architecture}) has no head that predicts masked tokens")
    tokenizer: Any = native_tokenizer(model)
    chosen = getattr(tokenizer, "mask_token_id", None) if mask_id is None else mask_id
    if chosen is None:
        raise UnsupportedModelError(
            f"{facts.model} is an encoder: it predicts no next token but masked ones, and no tokenizer names its mask "
            f"token. Pass its id as mask_id="
        )
    if not 0 <= chosen < facts.vocabulary:
        raise BadInputError(
            f"mask_id={chosen} is outside the vocabulary of {facts.model} (0 to {facts.vocabulary - 1})"
        )
    padding = getattr(text_config(model), "pad_token_id", None)
    return Predictions(int(chosen), frozenset({int(chosen)} | ({int(padding)} if padding is not None else set())))


def check_masking(model: TransformerBridge, ids: Int[Tensor, "1 pos"], position: int, mask_id: int) -> None:
    """Refuse a host that sees ids in another way than through the embedding's input, or predicts no tokens.

    Cost: two forwards of one sequence.
    """
    facts = capabilities(model)
    at = torch.tensor([position])
    ours = _masked_logits(model, ids, at, mask_id, [])
    given = ids.clone()
    given[0, position] = mask_id
    with torch.no_grad():
        plain = model(given)
    if plain.ndim != 3 or plain.shape[1:] != (ids.shape[1], facts.vocabulary):
        raise UnsupportedModelError(
            f"{facts.model} ({facts.architecture}): its head gives {tuple(plain.shape)}, not a logit per token of the "
            f"vocabulary, so it predicts no masked tokens"
        )
    theirs = plain[0, position]
    tolerance = TOLERANCE if plain.dtype in (torch.float32, torch.float64) else 5e-2
    if not (ours[0] - theirs).abs().max() <= tolerance * (1 + theirs.abs().max()):
        raise UnsupportedModelError(
            f"{facts.model}: a token that is masked at {EMBED} is not masked everywhere, so predictions under edits "
            f"cannot be measured. Please report this architecture"
        )


def drawn(kept: Int[Tensor, " kept"], most: int | None, seed: int) -> Int[Tensor, " scored"]:
    """At most ``most`` of the positions, drawn at random, in order."""
    if most is None or most >= len(kept):
        return kept
    if most < 1:
        raise BadInputError(f"most_scored must be at least 1, got {most}")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
    return kept[order[:most]].sort().values


def scored_logits(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], scored: Int[Tensor, " scored"], hooks: Sequence[Any]
) -> Float[Tensor, "scored vocabulary"]:
    """A decoder's logits at some positions only: the unembedding sees no others (unless hooks look at it)."""
    return row_logits(model, ids, [scored], hooks)[0]


def row_logits(
    model: TransformerBridge,
    ids: Int[Tensor, "batch pos"],
    scored: Sequence[Int[Tensor, " _"]],
    hooks: Sequence[Any],
) -> list[Float[Tensor, "_ vocabulary"]]:
    """A decoder's logits at some positions of each of a few unpadded sequences of one length."""
    rows = torch.cat([torch.full_like(where, b) for b, where in enumerate(scored)])
    columns, sizes = torch.cat(list(scored)), [len(where) for where in scored]
    late = _late(hooks)

    def choose(tensor: Tensor, hook: Any) -> Tensor:
        return tensor[rows.to(tensor.device), columns.to(tensor.device)][None]

    few = [] if late else [(UNEMBED, choose)]
    with torch.no_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=[*hooks, *few])
    chosen = logits[rows.to(logits.device), columns.to(logits.device)] if late else logits[0]
    return list(chosen.split(sizes))


def _masked_logits(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], scored: Int[Tensor, " row"], mask_id: int, hooks: Sequence[Any]
) -> Float[Tensor, "row vocabulary"]:
    """One row per position: the text with [MASK] there, and the logits there."""
    rows, late = torch.arange(len(scored)), _late(hooks)

    def mask(shown: Tensor, hook: Any) -> Tensor:
        new = shown.clone()
        new[rows, scored] = mask_id
        return new

    def choose(tensor: Tensor, hook: Any) -> Tensor:
        return tensor[rows, scored][:, None]

    few = [] if late else [(UNEMBED, choose)]
    with torch.no_grad():
        logits = model.run_with_hooks(ids.expand(len(scored), -1), fwd_hooks=[*hooks, (EMBED, mask), *few])
    return logits[rows, scored] if late else logits[:, 0]


def _late(hooks: Sequence[Any]) -> bool:
    return any(isinstance(name, str) and name.startswith("unembed") for name, _ in hooks)
