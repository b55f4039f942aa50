"""Where text comes from, and how documents are cut into sequences."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sinklens.core.errors import BadInputError
from sinklens.core.validation import shortened

DEFAULT_SEQS = 16
DATASET_DOCUMENTS = 2048


@dataclass(frozen=True)
class Piece:
    """A cut of a document: its ids, where they came from, and which document that was."""

    ids: tuple[int, ...]
    source: str
    document: int


def read_corpus(source: str | os.PathLike[str]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The documents ``(title, text)`` of a named corpus, a file or a dataset, and what identifies them.

    Raises:
        BadInputError: no such source, or nothing in it.
    """
    name = os.fspath(source)
    if name == "python-docs":
        documents = _python_docs()
    elif is_file(name):
        documents = _read_file(Path(name))
    elif re.fullmatch(r"[\w-]+/[\w.-]+", name) and Path(name).suffix not in (".txt", ".jsonl", ".json", ".md"):
        documents = _read_dataset(name)
    else:
        raise BadInputError(
            f"no text source {shortened(name)}: give python-docs, random, repeat, an existing text or .jsonl file, a "
            f"dataset id such as NeelNanda/pile-10k, or the text itself in a list"
        )
    documents = [(title, text) for title, text in documents if text.strip()]
    if not documents:
        raise BadInputError(f"{name!r} holds no text")
    digest = hashlib.sha256("\0".join(text for _, text in documents).encode()).hexdigest()
    return documents, {"source": name, "corpus_sha256": digest, "documents": len(documents)}


def is_file(name: str) -> bool:
    """Whether the name is that of an existing file; False for what can be no name at all, such as a long text."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def pieces_in_order(
    documents: Sequence[tuple[str, Sequence[int]]], n_seqs: int | None, length: int | None
) -> list[Piece]:
    """One piece per text, in the order given; ``length`` cuts each, and each must have that many.

    Raises:
        BadInputError: no text, fewer than ``n_seqs``, or one shorter than ``length``.
    """
    if not documents:
        raise BadInputError("the list of texts is empty")
    if n_seqs is not None and len(documents) < n_seqs:
        raise BadInputError(f"{n_seqs} sequences were asked for, the list has {len(documents)} texts")
    for title, ids in documents:
        if not ids:
            raise BadInputError(f"{title} is empty; remove it or give it some words")
        if length is not None and len(ids) < length:
            raise BadInputError(f"{title} has {len(ids)} tokens, {length} were asked for; shorten seq_len")
    chosen = documents[:n_seqs]
    return [Piece(tuple(ids[:length]), title, i) for i, (title, ids) in enumerate(chosen)]


def sample_pieces(
    documents: Sequence[tuple[str, Sequence[int]]], n_seqs: int | None, length: int, *, exact: bool, seed: int
) -> list[Piece]:
    """Pieces of ``length`` ids: the beginning of each document first, in seeded order, then what follows it.

    One piece per document as long as there are documents, so that sequences are independent. Unless ``exact``, whole
    documents that are shorter follow the first pieces, before any document gives a second one.

    Raises:
        BadInputError: not enough text.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces: list[Piece] = []
    for part in range(max(len(ids) for _, ids in documents) // length if length > 0 else 0):
        for d in order:
            title, ids = documents[d]
            if len(ids) >= (part + 1) * length:
                chosen = tuple(ids[part * length : (part + 1) * length])
                pieces.append(Piece(chosen, _cut_label(title, part, length), d))
        if part == 0 and not exact:
            pieces += _short_ones(documents, order, length)
    if not pieces and not exact:
        pieces = _short_ones(documents, order, length)
    wanted = n_seqs or min(DEFAULT_SEQS, max(1, len(pieces)))
    if len(pieces) < wanted:
        total = sum(len(ids) for _, ids in documents)
        raise BadInputError(
            f"the text is shorter than asked: {total} tokens in {len(documents)} document(s) give {len(pieces)} "
            f"sequences of {length} tokens, not {wanted}; lower n_seqs or seq_len"
        )
    return pieces[:wanted]


def _short_ones(documents: Sequence[tuple[str, Sequence[int]]], order: Sequence[int], length: int) -> list[Piece]:
    return [Piece(tuple(documents[d][1]), documents[d][0], d) for d in order if 1 < len(documents[d][1]) < length]


def beginnings(
    documents: Sequence[tuple[str, Sequence[int]]], n_seqs: int | None, length: int, shortest: int, *, seed: int
) -> list[Piece]:
    """One piece per document with at least ``shortest`` ids: its first ``length`` ids at most, in seeded order.

    Raises:
        BadInputError: fewer such documents than ``n_seqs``, or none.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces = [
        Piece(tuple(ids[:length]), f"{title} [0:{min(length, len(ids))}]", d)
        for d, (title, ids) in ((d, documents[d]) for d in order)
        if len(ids) >= shortest
    ]
    if len(pieces) < (n_seqs or 1):
        raise BadInputError(
            f"{len(pieces)} of {len(documents)} document(s) have at least {shortest} tokens, {n_seqs or 1} were asked "
            f"for; lower n_seqs or min_len"
        )
    return pieces[:n_seqs]


def _cut_label(title: str, part: int, length: int) -> str:
    return f"{title} [{part * length}:{(part + 1) * length}]"


def _python_docs() -> list[tuple[str, str]]:
    """The language reference that ships inside Python, one document per help topic."""
    from pydoc_data.topics import topics  # half a megabyte of text

    return [(f"python-docs/{name}", topics[name]) for name in sorted(topics)]


def _read_file(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{str(path)!r} is not UTF-8 text ({error}); convert it first") from error
    if path.suffix != ".jsonl":
        return [(path.name, text.rstrip("\r\n"))]  # a file's last newline belongs to the file, not to the text
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInputError(f"{str(path)!r}, line {number} is not JSON ({error.msg}); half a file?") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise BadInputError(f"{str(path)!r}, line {number} has no string under the key 'text'")
        documents.append((f"{path.name}:{number}", entry["text"]))
    return documents


def _read_dataset(name: str) -> list[tuple[str, str]]:
    """The first documents of a hub dataset's train split, streamed."""
    import datasets  # slow to load

    try:
        stream = datasets.load_dataset(name, split="train", streaming=True)
        rows = list(islice(stream, DATASET_DOCUMENTS))
    except Exception as error:  # the hub's errors have no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInputError(
            f"cannot read the dataset {name!r} ({reason}). Without a hub these work: python-docs, random, repeat, a "
            f"text or .jsonl file"
        ) from error
    if rows and not isinstance(rows[0].get("text"), str):
        raise BadInputError(f"the dataset {name!r} has no 'text' column; it has {', '.join(rows[0])}")
    return [(f"{name}#{i}", row["text"]) for i, row in enumerate(rows)]
