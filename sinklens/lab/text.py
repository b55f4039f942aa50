"""Next-token prediction on texts and token files, in windows that are packed as a user says."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from transformers import AutoTokenizer

from sinklens.core.errors import BadInputError
from sinklens.core.storage import atomic_path
from sinklens.core.validation import public
from sinklens.inputs.corpora import read_corpus
from sinklens.lab.tasks import Batch
from sinklens.models.catalogue import CATALOGUE
from sinklens.models.fetch import fetch

BYTES = 257  # id 0 is BOS, id b + 1 the byte b
HELD_OUT = 0.05


@dataclass(frozen=True)
class Text:
    """Next-token prediction on natural text. There is no exact floor.

    Attributes:
        source: "python-docs", a text or JSONL file, a dataset id, or a ``.npy`` file of token ids as
            :func:`write_tokens` makes it (memory-mapped, so that it may be larger than memory).
        tokenizer: "bytes", or an embedded model's name or a folder with a tokenizer; not used for token files.
        packing: "random": windows of the documents one after another; "bos": BOS before each window;
            "document-bos": BOS before each document.
        masking: "causal", or "document": tokens of another document are not seen.
        bos, n_ids: of token files: the id of BOS, and how many ids there are.
        seq_len: length of a window, BOS included.

    The last 5 % of the tokens are kept for evaluation. Every document ends with one mark, so that windows know where
    they begin.
    """

    source: str = "python-docs"
    tokenizer: str = "bytes"
    packing: str = "bos"
    masking: str = "causal"
    seq_len: int = 256
    bos: int = 0
    n_ids: int | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of tokens."""
        return ("token",)

    def __post_init__(self) -> None:
        if self.packing not in ("random", "bos", "document-bos") or self.masking not in ("causal", "document"):
            raise BadInputError(
                f"packing must be random, bos or document-bos and masking causal or document; got {self.packing!r}, "
                f"{self.masking!r}"
            )
        if self.seq_len < 4:
            raise BadInputError(f"seq_len must be at least 4, got {self.seq_len}")

    @property
    def n_vocab(self) -> int:
        """How many ids there are."""
        return self._stream[2]

    @cached_property
    def _stream(self) -> tuple[Any, int, int]:
        """The ids with -1 where a document begins, BOS, and the size of the vocabulary."""
        if self.source.endswith(".npy"):
            return self._token_file()
        documents, _ = read_corpus(self.source)
        encode, bos, size = tokenizer_named(self.tokenizer)
        if bos is None and self.packing != "random":
            raise BadInputError(f"the tokenizer {self.tokenizer!r} has no BOS; choose packing 'random'")
        return stream_of(encode(text) for _, text in documents), bos if bos is not None else 0, size

    def _token_file(self) -> tuple[Any, int, int]:
        if self.n_ids is None:
            raise BadInputError("a token file needs n_ids, the size of its vocabulary")
        try:
            ids = np.load(self.source, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadInputError(f"{self.source!r} is no .npy file of token ids ({error})") from error
        if ids.ndim != 1 or ids.dtype.kind != "i":
            raise BadInputError(f"{self.source!r} must hold one row of integers, -1 where a document begins")
        return ids, self.bos, self.n_ids

    def sample(self, n: int, generator: torch.Generator, *, held_out: bool = False) -> Batch:
        """``n`` windows at random places."""
        stream, bos, size = self._stream
        border = int(len(stream) * (1 - HELD_OUT))
        low, high = (border, len(stream)) if held_out else (0, border)
        room = high - low - 2 * self.seq_len
        if room < 1:
            raise BadInputError(
                f"{self.source!r} holds {len(stream)} tokens, {high - low} of them for "
                f"{'evaluation' if held_out else 'training'}: too few for windows of {self.seq_len}"
            )
        starts = low + torch.randint(room, (n,), generator=generator)
        rows = [self._window(stream, int(start), bos) for start in starts]
        ids, documents, scored = (torch.stack([row[i] for row in rows]) for i in range(3))
        if int(ids.max()) >= size:
            raise BadInputError(f"{self.source!r} holds the id {int(ids.max())}, beyond n_ids={size}")
        classes = torch.where(scored, 0, -1)
        return Batch(ids, classes, torch.full(ids.shape, torch.nan, dtype=torch.float64), documents)

    def _window(self, stream: Any, start: int, bos: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, documents and what is scored: as many ids as are wanted, marks left out or turned into BOS."""
        raw = torch.from_numpy(np.asarray(stream[start : start + 2 * self.seq_len], dtype=np.int64))
        mark = raw < 0
        document = mark.long().cumsum(0)
        if self.packing == "document-bos":
            ids, scored = raw.masked_fill(mark, bos), ~mark
        else:
            ids, document, scored = raw[~mark], document[~mark], torch.ones(int((~mark).sum()), dtype=torch.bool)
        if self.packing == "bos":
            first = torch.zeros(1, dtype=torch.long)
            ids, document = torch.cat([first + bos, ids]), torch.cat([document[:1], document])
            scored = torch.cat([first.bool(), scored])
        scored[0] = False  # nothing predicts the first token
        begins = torch.nn.functional.pad(document[1:] != document[:-1], (1, 0))
        if self.masking == "document" and self.packing != "document-bos":
            scored = scored & ~begins
        if len(ids) < self.seq_len:
            raise BadInputError(f"{self.source!r} holds documents that are too short for windows of {self.seq_len}")
        return ids[: self.seq_len], document[: self.seq_len] - document[0], scored[: self.seq_len]


def stream_of(documents: Iterable[list[int]]) -> Integer[np.ndarray, " token"]:
    """Documents one after another, each behind a mark of -1."""
    parts = [np.asarray([-1, *ids], dtype=np.int32) for ids in documents if len(ids)]
    if not parts:
        raise BadInputError("there is no document with a token in it")
    return np.concatenate(parts)


@public
def write_tokens(documents: Iterable[str], path: str | os.PathLike[str], tokenizer: str = "bytes") -> Path:
    """Tokenise texts once into a ``.npy`` file for :class:`Text`: int32 ids, -1 before each document.

    Raises:
        BadInputError: unknown tokenizer, or no token at all.
    """
    encode, _, _ = tokenizer_named(tokenizer)
    stream = stream_of(encode(text) for text in documents)
    content = io.BytesIO()
    np.save(content, stream, allow_pickle=False)  # into a file it would not notice a full disk
    with atomic_path(path) as partial:
        partial.write_bytes(content.getbuffer())
    return Path(path)


def tokenizer_named(name: str) -> tuple[Any, int | None, int]:
    """A function from text to ids, the id of BOS (None without), and the size of the vocabulary."""
    if name == "bytes":
        return _bytes, 0, BYTES
    folder = fetch(name) if name in CATALOGUE else Path(name)
    if not folder.is_dir():
        raise BadInputError(f"tokenizer must be 'bytes', an embedded model's name or a folder; got {name!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInputError(f"no tokenizer in {name!r}: {error}") from error
    return (lambda text: tokenizer(text, add_special_tokens=False).input_ids), tokenizer.bos_token_id, len(tokenizer)


def _bytes(text: str) -> list[int]:
    try:
        return [byte + 1 for byte in text.encode()]
    except UnicodeEncodeError as error:
        raise BadInputError(f"a text cannot be encoded: {error}") from error
