"""``Tokens``: a batch of sequences with exactly one correct BOS, made from text, files, corpora or ids.

Positions count from the first unpadded token of a sequence, so the padding side never changes a result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.offload import check_device
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.inputs.vocabulary import Vocabulary
from sinklens.show.notebook import ShownInJupyter

# Kinds of batches that register themselves, by the tensor that only they have: Tokens knows no images.
STORED: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Tokens]] = {}


@public_methods
@dataclass(frozen=True, eq=False)
class Tokens(ShownInJupyter, table="_listing"):
    """A batch of token sequences.

    Attributes:
        ids: token ids, padded.
        mask: True where a token is real; each row is one unbroken run.
        labels: each sequence's tokens as text, unpadded.
        sources: where each sequence came from, such as ``python-docs/typesseq [0:512]``.
        documents: the document of each sequence; intervals are taken over these.
        special: True at special tokens (BOS, [CLS], padding, ...), by id.
        info: how the batch was made (source, seed, hash of the corpus, BOS).
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    labels: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...]
    documents: tuple[int, ...]
    special: Bool[Tensor, "batch pos"]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        return f"{type(self).__name__}: {len(self)} sequence(s) of {min(lengths)} to {max(lengths)} tokens"

    def _listing(self) -> pd.DataFrame:
        """One row per sequence: where it is from, its length, how it begins."""
        begins = ["".join(labels[:12]) for labels in self.labels]
        return pd.DataFrame({"source": self.sources, "tokens": self.lengths.tolist(), "begins": begins})

    def __len__(self) -> int:
        """The number of sequences."""
        return self.ids.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int]) -> Tokens:
        """Some of the sequences, in the order asked for.

        Raises:
            BadInputError: no sequence, one out of range, or booleans instead of numbers.
        """
        everything = range(len(self))
        if isinstance(index, slice) and index.step == 0:
            raise BadInputError("the step of a slice cannot be 0")
        chosen = everything[index] if isinstance(index, slice) else [index] if isinstance(index, int) else index
        rows = [row for row in chosen if type(row) is int and -len(self) <= row < len(self)]
        if not rows or len(rows) != len(chosen):
            raise BadInputError(f"{index!r} does not choose from {len(self)} sequences: give their numbers as integers")
        return replace(
            self,
            ids=self.ids[rows],
            mask=self.mask[rows],
            labels=tuple(self.labels[r] for r in rows),
            sources=tuple(self.sources[r] for r in rows),
            documents=tuple(self.documents[r] for r in rows),
            special=self.special[rows],
        )

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Unpadded tokens per sequence."""
        return self.mask.sum(1)

    @property
    def starts(self) -> Int[Tensor, " batch"]:
        """The index of each sequence's first unpadded token: position 0."""
        return self.mask.int().argmax(1)

    @cached_property
    def digest(self) -> str:
        """A hash of the unpadded ids: the same for the same sequences, however they are padded."""
        rows = [self.ids[i][self.mask[i]].tolist() for i in range(len(self))]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def row(self, sequence: int) -> Int[Tensor, " pos"]:
        """The unpadded ids of one sequence."""
        one = self[sequence]
        return one.ids[0][one.mask[0]]

    def to(self, device: torch.device | str) -> Tokens:
        """The same batch on another device."""
        check_device(device)
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), special=self.special.to(device))

    def trim(self) -> Tokens:
        """The same batch without the columns that are padding in every sequence."""
        used = self.mask.any(0).nonzero().flatten()
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return replace(self, ids=self.ids[:, columns], mask=self.mask[:, columns], special=self.special[:, columns])

    def pad(self, side: Literal["left", "right"], columns: int, pad_id: int = 0) -> Tokens:
        """The same batch with ``columns`` more padding on the left or right."""
        if columns < 0:
            raise BadInputError(f"pad needs columns >= 0, got {columns}")
        amount = (columns, 0) if side == "left" else (0, columns)
        grow = torch.nn.functional.pad
        return replace(
            self,
            ids=grow(self.ids, amount, value=pad_id),
            mask=grow(self.mask, amount, value=False),
            special=grow(self.special, amount, value=True),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Tokens]) -> Tokens:
        """Several batches as one, right-padded; documents of different batches stay different."""
        if not parts:
            raise BadInputError("there is nothing to concatenate")
        longest = max(int(part.lengths.max()) for part in parts)
        aligned = [part.aligned(longest) for part in parts]
        documents: list[int] = []
        for part in parts:
            offset = max(documents, default=-1) + 1 - min(part.documents)
            documents += [d + offset for d in part.documents]
        return cls(
            ids=torch.cat([part.ids for part in aligned]),
            mask=torch.cat([part.mask for part in aligned]),
            labels=tuple(row for part in parts for row in part.labels),
            sources=tuple(source for part in parts for source in part.sources),
            documents=tuple(documents),
            special=torch.cat([part.special for part in aligned]),
            info={"source": "concatenated", "parts": [part.info for part in parts]},
        )

    def aligned(self, columns: int) -> Tokens:
        """The same batch with every sequence starting in column 0, padded on the right to ``columns``."""
        if columns < int(self.lengths.max()):
            raise BadInputError(f"{columns} columns cannot hold the longest sequence, {int(self.lengths.max())} tokens")
        index = (self.starts[:, None] + torch.arange(columns, device=self.ids.device)) % self.ids.shape[1]
        mask = torch.arange(columns, device=self.ids.device) < self.lengths[:, None]
        return replace(self, ids=self.ids.gather(1, index), mask=mask, special=self.special.gather(1, index) | ~mask)

    def first(self, columns: int) -> Tokens:
        """The first ``columns`` tokens of every sequence."""
        if columns < 1:
            raise BadInputError(f"first() needs at least one column, got {columns}")
        batch = self.aligned(int(self.lengths.max()))
        return replace(
            batch,
            ids=batch.ids[:, :columns],
            mask=batch.mask[:, :columns],
            special=batch.special[:, :columns],
            labels=tuple(row[:columns] for row in self.labels),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the batch, for saving."""
        return {"ids": self.ids, "mask": self.mask, "special": self.special}

    def meta(self) -> dict[str, Any]:
        """Everything else, as JSON."""
        return {
            "labels": [list(row) for row in self.labels],
            "sources": list(self.sources),
            "documents": list(self.documents),
            "info": self.info,
        }

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Tokens:
        """The inverse of :meth:`tensors` and :meth:`meta`; images come back as Images."""
        for name, build in STORED.items():
            if name in tensors:
                return build(tensors, meta)
        return cls(
            ids=tensors["ids"],
            mask=tensors["mask"],
            special=tensors["special"],
            labels=tuple(tuple(row) for row in meta["labels"]),
            sources=tuple(meta["sources"]),
            documents=tuple(meta["documents"]),
            info=meta["info"],
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the batch as one safetensors file."""
        return save_tensors(path, "Tokens", self.tensors(), self.meta())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokens:
        """Read what :meth:`save` wrote."""
        return cls.from_parts(*load_tensors(path, "Tokens"))


def reads_images(model: TransformerBridge | PlainModel) -> bool:
    """Whether a model's tokens are patches of pictures."""
    return isinstance(model, PlainModel) and model.capabilities.reads == "images"


def pad_rows(
    rows: Sequence[Sequence[int]],
    words: Vocabulary,
    sources: Sequence[str],
    documents: Sequence[int],
    info: dict[str, Any],
) -> Tokens:
    """Right-pad the rows into a batch."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), words.pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    special = torch.isin(ids, torch.tensor(sorted(words.special_ids), dtype=torch.long)) | ~mask
    labels = tuple(words.labels(row) for row in rows)
    return Tokens(ids, mask, labels, tuple(sources), tuple(documents), special, info)


def check_shapes(batch: Tokens) -> None:
    """Refuse Tokens made by hand whose parts do not belong together."""
    shape, kinds = batch.ids.shape, (batch.mask.dtype, batch.special.dtype)
    if batch.ids.ndim != 2 or not batch.mask.shape == batch.special.shape == shape or 0 in shape:
        shapes = ", ".join(f"{tuple(t.shape)}" for t in (batch.ids, batch.mask, batch.special))
        raise BadInputError(f"ids, mask and special of Tokens must have one shape [batch, pos], got {shapes}")
    integral = not (batch.ids.is_floating_point() or batch.ids.is_complex() or batch.ids.dtype == torch.bool)
    if not integral or kinds != (torch.bool, torch.bool):
        raise BadInputError(f"Tokens hold integer ids and bool masks, got {batch.ids.dtype}, {kinds[0]} and {kinds[1]}")
    if (batch.mask.int().diff(dim=1) == 1).sum(1).add(batch.mask[:, 0].int()).max() > 1:
        raise BadInputError("a mask has holes; each sequence must be one unbroken run of tokens")
    listed = (len(batch.labels), len(batch.sources), len(batch.documents))
    if set(listed) != {len(batch)} or any(
        len(row) < n for row, n in zip(batch.labels, batch.lengths.tolist(), strict=True)
    ):
        raise BadInputError("labels, sources and documents of Tokens must have an entry for each sequence (and token)")


def check_positions(positions: Iterable[int]) -> tuple[int, ...]:
    """Positions as a tuple, each once."""
    found = tuple(dict.fromkeys(int(p) for p in positions))
    if any(p < 0 for p in found):
        raise BadInputError(f"positions count from a sequence's first unpadded token, 0; got {min(found)}")
    return found
