"""A model's vocabulary: encoding without surprises, special tokens by id, token labels, random ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import record
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public, public_methods
from sinklens.models.load import native_tokenizer
from sinklens.show.notebook import ShownInJupyter


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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(f"the text is no valid Unicode ({error}); decode it with errors='replace'") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def body(self, text: str, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """The ids of a text without the special tokens that will be put around it, should the text bring them."""
        ids = self.encode(text)
        if prefix and tuple(ids[: len(prefix)]) == tuple(prefix):
            ids = ids[len(prefix) :]
        if suffix and tuple(ids[-len(suffix) :]) == tuple(suffix):
            ids = ids[: -len(suffix)]
        return ids

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
        text = self.tokenizer.decode([token])
        # part of a character: the byte-level piece tells such tokens apart, the replacement character does not
        return str(piece) if "\ufffd" in text else text

    def id_of(self, name: str | int) -> int:
        """The id of a token by its name (``"[CLS]"``), its text (``" the"``), or its id.

        Raises:
            BadInputError: no such token, or a text of several.
        """
        if isinstance(name, int):
            if not 0 <= name < self.size:
                raise BadInputError(f"token id {name} is outside the vocabulary (0 to {self.size - 1})")
            return name
        if self.tokenizer is None:
            raise BadInputError(f"this model came without a tokenizer, so {name!r} is unknown: give the token's id")
        found = self.tokenizer.convert_tokens_to_ids(name)
        if found is not None and self.tokenizer.convert_ids_to_tokens(found) == name:
            return int(found)
        ids = self.encode(name)
        if len(ids) != 1:
            raise BadInputError(f"{name!r} is no token of this model but {len(ids)}: {list(self.labels(ids))}")
        return int(ids[0])

    def draw(self, kind: str, n_seqs: int, length: int, seed: int) -> list[list[int]]:
        """``random``: uniform over the ordinary ids; ``repeat``: one such id per sequence, repeated."""
        if length < 1:
            raise BadInputError("seq_len leaves no room beside the special tokens; ask for a longer one")
        ordinary = torch.tensor([i for i in range(self.size) if i not in self.special_ids])
        generator = torch.Generator().manual_seed(seed)
        columns = length if kind == "random" else 1
        drawn = ordinary[torch.randint(0, len(ordinary), (n_seqs, columns), generator=generator)]
        return drawn.expand(n_seqs, length).tolist()


_vocabularies: WeakKeyDictionary[TransformerBridge | PlainModel, Vocabulary] = WeakKeyDictionary()


def vocabulary(model: TransformerBridge | PlainModel) -> Vocabulary:
    """The vocabulary of a model; made at the first call and kept."""
    facts = record(model)
    if model not in _vocabularies:
        _vocabularies[model] = _vocabulary(model, facts.vocabulary)
    return _vocabularies[model]


def _vocabulary(model: TransformerBridge | PlainModel, size: int) -> Vocabulary:
    tokenizer: Any = native_tokenizer(model)
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


@public_methods
@dataclass(frozen=True)
class NamedTokens(ShownInJupyter, table="_fields"):
    """A predicate on ids, for ``ablate_sinks(model, ...)``: true at every token with one of these ids."""

    ids: tuple[int, ...]
    labels: tuple[str, ...]

    def __call__(self, ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Where these tokens stand."""
        return torch.isin(ids, torch.tensor(self.ids, dtype=ids.dtype, device=ids.device))


@public
def named_tokens(model: TransformerBridge, *names: str | int) -> NamedTokens:
    """Tokens by name, as places of an edit: ``ablate_sinks(model, named_tokens(model, "[CLS]", "[SEP]"))``.

    Args:
        model: from :func:`sinklens.load_model`.
        names: names of special tokens, the text of one token (``" the"``), or ids. Without any: every special token of
            the tokenizer (BOS, [CLS], [SEP], ``<s>``, ...).

    Returns:
        A predicate ``ids -> bool mask``; it acts wherever these ids stand in the sequences that run.

    Raises:
        BadInputError: an unknown name, a text of several tokens, a tokenizer without special tokens.
        UnsupportedModelError: a model of images.
    """
    if not record(model).vocabulary:
        raise UnsupportedModelError(f"{record(model).model} reads images: its tokens are patches and have no ids")
    words = vocabulary(model)
    ids = tuple(dict.fromkeys(words.id_of(name) for name in names)) if names else tuple(sorted(words.special_ids))
    if not ids:
        raise BadInputError(
            "this model's tokenizer names no special tokens (or it came without one); give names or ids"
        )
    return NamedTokens(ids, words.labels(ids))
