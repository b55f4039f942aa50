"""``load_tokens``: sequences for a model from text, files, corpora or ids; and whatever a user passes, as Tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import record
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.inputs.corpora import DEFAULT_SEQS, Piece, beginnings, pieces_in_order, read_corpus, sample_pieces
from sinklens.inputs.images import as_images
from sinklens.inputs.tokens import Tokens, check_shapes, pad_rows, reads_images
from sinklens.inputs.vocabulary import Vocabulary, vocabulary

DEFAULT_LENGTH = 512
DEFAULT_SEQUENCES = 16  # of a default reference


@public
def load_tokens(
    model: TransformerBridge | PlainModel,
    source: str | os.PathLike[str] | Sequence[str] = "python-docs",
    *,
    n_seqs: int | None = None,
    seq_len: int | None = None,
    min_len: int | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> Tokens:
    """Sequences for a model, reproducible from the seed.

    Args:
        model: whose tokenizer and BOS custom to follow.
        source: ``python-docs`` (the prose that ships inside Python), ``random`` (uniform over the ordinary
            vocabulary), ``repeat`` (one ordinary token, drawn per sequence, repeated), a list of texts (one
            sequence each, in order), a text file (one document), a ``.jsonl`` file (a document per line, key
            ``text``), or the id of a Hugging Face dataset with a ``text`` column.
        n_seqs: how many sequences. Default: all texts of a list, else as many as there are, up to 16.
        seq_len: tokens per sequence, special tokens included; a source that cannot give that many raises. Default:
            whole texts for a list, else at most 512.
        min_len: for a corpus or file: take every document with at least so many tokens, its first ``seq_len`` at most;
            ``n_seqs`` is then how many of them, default all.
        seed: which documents (the first ``seq_len`` tokens of each; further pieces of a document only when all
            documents are used), and which random ids.
        prepend_bos: None follows how the model was trained; True and False force it. Never doubled.

    Raises:
        BadInputError: unknown source, empty text, text shorter than asked, ``seq_len`` past the context window.
    """
    if reads_images(model):
        raise UnsupportedModelError(
            f"{record(model).model} reads images: load_images(model, [path, ...]) makes its tokens"
        )
    words = vocabulary(model)
    _check_request(model, n_seqs, seq_len)
    if min_len is not None and (source in ("random", "repeat") or not isinstance(source, (str, os.PathLike))):
        raise BadInputError("min_len chooses documents of a corpus or file; ids and lists of texts have none to choose")
    prefix, suffix = words.special_tokens(prepend_bos)
    info: dict[str, Any] = {"seed": seed, "prepend_bos": bool(prefix), "model": record(model).model}
    special = len(prefix) + len(suffix)
    pieces: list[Piece]
    if isinstance(source, (str, os.PathLike)):
        longest = seq_len or min(DEFAULT_LENGTH, record(model).context or DEFAULT_LENGTH)
        if source in ("random", "repeat"):
            rows = words.draw(str(source), n_seqs or DEFAULT_SEQS, longest - special, seed)
            pieces = [Piece(tuple(row), f"{source} #{i}", i) for i, row in enumerate(rows)]
            info["source"] = source
        else:
            texts, named = read_corpus(source)
            info |= named
            documents = [(title, words.body(text, prefix, suffix)) for title, text in texts]
            if min_len is None:
                pieces = sample_pieces(documents, n_seqs, longest - special, exact=seq_len is not None, seed=seed)
            else:
                pieces = beginnings(documents, n_seqs, longest - special, min_len - special, seed=seed)
    else:
        strange = [type(text).__name__ for text in source if not isinstance(text, str)]
        if strange:
            raise BadInputError(f"a list of texts must hold strings, got {strange[0]}; give ids as a LongTensor")
        texts = [(f"text {i}", text) for i, text in enumerate(source)]
        info["source"] = "texts"
        documents = [(title, words.body(text, prefix, suffix)) for title, text in texts]
        pieces = pieces_in_order(documents, n_seqs, None if seq_len is None else seq_len - special)
    rows = [[*prefix, *piece.ids, *suffix] for piece in pieces]
    sources, documents_of_rows = [p.source for p in pieces], [p.document for p in pieces]
    return _checked(model, pad_rows(rows, words, sources, documents_of_rows, info))


def as_tokens(model: TransformerBridge | PlainModel, tokens: str | Sequence[str] | Tensor | Tokens) -> Tokens:
    """Whatever a user passes as ``tokens``: a text, a list of texts, a tensor of ids (as it is), or Tokens.

    Raises:
        BadInputError: empty or one-token input, ids outside the vocabulary, input past the context window.
    """
    if isinstance(model, PlainModel) and reads_images(model):
        return as_images(model, tokens)
    words = vocabulary(model)
    if isinstance(tokens, Tokens):
        if hasattr(tokens, "pictures"):
            raise BadInputError(f"{record(model).model} reads text and these are images; give texts or token ids")
        batch = tokens
    elif isinstance(tokens, Tensor):
        batch = _from_ids(tokens, words, record(model).vocabulary)
    elif isinstance(tokens, str):
        batch = load_tokens(model, [tokens])
    elif isinstance(tokens, Sequence):
        batch = load_tokens(model, tokens)
    else:
        raise BadInputError(f"tokens must be a text, a list of texts, token ids or Tokens, got {type(tokens).__name__}")
    return _checked(model, batch).to(str(model.device if isinstance(model, PlainModel) else model.cfg.device))


def _from_ids(ids: Tensor, words: Vocabulary, size: int) -> Tokens:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise BadInputError(f"token ids must be integers, got a tensor of {ids.dtype}")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.numel() == 0:
        raise BadInputError(f"token ids must have the shape [batch, pos] and not be empty, got {tuple(ids.shape)}")
    if ids.is_meta:
        raise BadInputError("token ids must hold numbers; a tensor on the device 'meta' holds none")
    outside = ids[(ids < 0) | (ids >= size)].tolist()
    if outside:
        raise BadInputError(f"token id {outside[0]} is outside the vocabulary (0 to {size - 1})")
    rows = [row.tolist() for row in ids.cpu()]
    return pad_rows(rows, words, [f"ids {i}" for i in range(len(rows))], range(len(rows)), {"source": "ids"})


def _check_request(model: TransformerBridge | PlainModel, n_seqs: int | None, seq_len: int | None) -> None:
    context = record(model).context
    if n_seqs is not None and n_seqs < 1:
        raise BadInputError(f"n_seqs must be at least 1, got {n_seqs}")
    if seq_len is not None and seq_len < 2:
        raise BadInputError(f"seq_len must be at least 2 (one token has nothing to attend to), got {seq_len}")
    if seq_len is not None and context is not None and seq_len > context:
        raise BadInputError(f"seq_len={seq_len} is past the context window of {record(model).model}: {context} tokens")


def _checked(model: TransformerBridge | PlainModel, batch: Tokens) -> Tokens:
    """The batch, or BadInputError where the model cannot take it."""
    facts = record(model)
    check_shapes(batch)
    lengths = batch.lengths
    if (lengths < 2).any():
        row = int((lengths < 2).nonzero()[0])
        raise BadInputError(
            f"{batch.sources[row]} has {int(lengths[row])} token(s); attention needs at least 2. Give a longer text"
        )
    if facts.context is not None and int(lengths.max()) > facts.context:
        row = int(lengths.argmax())
        raise BadInputError(
            f"{batch.sources[row]} has {int(lengths[row])} tokens, past the context window of {facts.model} "
            f"({facts.context}); shorten it, or give load_tokens a seq_len"
        )
    ids = batch.ids[batch.mask]
    if int(ids.min()) < 0 or int(ids.max()) >= facts.vocabulary:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise BadInputError(f"token id {bad} is outside the vocabulary of {facts.model} (0 to {facts.vocabulary - 1})")
    return batch
