"""A model's vocabulary: encoding without surprises, special tokens by id, token labels, random ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from sinklens.errors import BadInputError
from sinklens.models import native_tokenizer
from sinklens.proof import capabilities


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as the model was trained with it, or none.

    ``prefix`` and ``suffix`` are the special tokens that it puts around a text: ``<bos>`` for Gemma, none for
    SmolLM2, ``[CLS]`` and ``[SEP]`` for BERT.
    """

    tokenizer: Any | None
    size: int
    bos_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    special_ids: frozenset[int]
    pad_id: int
    _cache: dict[int, str] = field(default_factory=dict)

    def special_tokens(self, prepend_bos: bool | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The prefix and suffix for a BOS wish; None is the model's custom."""
        if prepend_bos is None or bool(self.prefix) == prepend_bos:
            return self.prefix, self.suffix
        if not prepend_bos:
            return (), self.suffix
        if self.bos_id is None:
            raise BadInputError(
                "prepend_bos=True, but the tokenizer has no BOS token; put its id into the ids yourself"
            )
        return (self.bos_id,), self.suffix

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone, without special tokens around it."""
        if self.tokenizer is None:
            raise BadInputError("this model came without a tokenizer: pass token ids, or load_model(..., tokenizer=)")
        if not text:
            raise BadInputError("the text is empty; give it at least two tokens' worth of words")
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def wrap(self, ids: Sequence[int], prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Special tokens around ids, never doubling one that the text already brings."""
        doubled = len(prefix) > 0 and tuple(ids[: len(prefix)]) == tuple(prefix)
        closed = len(suffix) > 0 and tuple(ids[-len(suffix) :]) == tuple(suffix)
        return [*(() if doubled else prefix), *ids, *(() if closed else suffix)]

    def labels(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token, leading space kept; ids where there is no tokenizer."""
        return tuple(self._label(int(i)) for i in ids)

    def _label(self, token: int) -> str:
        if token not in self._cache:
            self._cache[token] = self._decode(token)
        return self._cache[token]

    def _decode(self, token: int) -> str:
        if self.tokenizer is None:
            return str(token)
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is not None and "\u2581" in piece:  # sentencepiece's space, which decode() strips
            return piece.replace("\u2581", " ")
        return self.tokenizer.decode([token])

    def draw(self, kind: str, n_seqs: int, length: int, seed: int) -> list[list[int]]:
        """``random``: uniform over the ordinary ids; ``repeat``: one such id per sequence, repeated."""
        if length < 1:
            raise BadInputError("seq_len leaves no room beside the special tokens; ask for a longer one")
        ordinary = torch.tensor([i for i in range(self.size) if i not in self.special_ids])
        generator = torch.Generator().manual_seed(seed)
        columns = length if kind == "random" else 1
        drawn = ordinary[torch.randint(0, len(ordinary), (n_seqs, columns), generator=generator)]
        return drawn.expand(n_seqs, length).tolist()


def vocabulary(model: TransformerBridge) -> Vocabulary:
    """The vocabulary of a model."""
    tokenizer: Any = native_tokenizer(model)
    size = capabilities(model).vocabulary
    if tokenizer is None:
        return Vocabulary(None, size, None, (), (), frozenset(), pad_id=0)
    plain = tokenizer.encode("a", add_special_tokens=False)
    wrapped = tokenizer.encode("a", add_special_tokens=True)
    start = next(i for i in range(len(wrapped)) if wrapped[i : i + len(plain)] == plain)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    special = frozenset(i for i in tokenizer.all_special_ids if i < size)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Vocabulary(
        tokenizer,
        min(size, len(tokenizer)),
        bos,
        tuple(wrapped[:start]),
        tuple(wrapped[start + len(plain) :]),
        special,
        pad_id=pad,
    )
