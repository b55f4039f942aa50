"""The lab's tasks: what they promise of every token, and floors that nothing beats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.lab import Backcopy, Batch, BigramBackcopy, Recall, Text, write_tokens


def drawn(task: Any, n: int = 64, seed: int = 0) -> Batch:
    return task.sample(n, torch.Generator().manual_seed(seed))


PACKINGS = [
    Backcopy(),
    Backcopy(packing="bos"),
    Backcopy(locked="none"),
    Backcopy(packing="random", masking="document", document_length=16),
    Backcopy(packing="document-bos", masking="document", document_length=16),
    Backcopy(packing="bos", masking="document", document_length=16),
]


@pytest.mark.parametrize("task", PACKINGS, ids=lambda task: f"{task.packing}-{task.masking}-{task.locked}")
def test_backcopy_copies_after_triggers_and_nowhere_else(task: Backcopy) -> None:
    batch = drawn(task)
    unigram = math.log(60 / 0.8) * 0.8 + math.log(3 / 0.2) * 0.2
    for ids, classes, floor, documents in zip(batch.ids, batch.classes, batch.floor, batch.documents, strict=True):
        begins = 0
        for t in range(64):
            if t and documents[t] != documents[t - 1]:
                begins = t
            has_bos = task.packing == "document-bos" or (task.packing == "bos" and int(documents[t]) == 0)
            assert (int(ids[t]) == 0) == (has_bos and t == begins)
            inside = t - begins - has_bos
            copied = inside >= 2 and 1 <= int(ids[t - 1]) <= 3
            if int(classes[t]) >= 0:
                assert bool(classes[t]) == copied
                first = task.locked == "none" and inside < 2
                expected = 0.0 if copied else math.log(60) if first else unigram
                assert float(floor[t]) == pytest.approx(expected)
            else:
                assert t == 0 or int(ids[t]) == 0
            if copied:
                assert ids[t] == ids[t - 2]


def test_documents_end_after_four_tokens_at_least_and_hide_each_other() -> None:
    batch = drawn(Backcopy(masking="document", document_length=12))
    hidden = batch.hidden("document")
    assert hidden is not None
    assert batch.hidden("causal") is None
    lengths = [int((row == d).sum()) for row in batch.documents for d in row.unique()[:-1]]
    assert min(lengths) >= 4
    assert 10 < sum(lengths) / len(lengths) < 14
    for b, i, j in ((0, 40, 3), (5, 63, 60)):
        assert bool(hidden[b, 0, i, j]) == bool(batch.documents[b, i] != batch.documents[b, j])


def test_locked_sequences_are_scored_unscored_or_absent() -> None:
    def pairs(batch: Batch) -> torch.Tensor:
        trigger = (batch.ids >= 1) & (batch.ids <= 3)
        return (trigger[:, 1:] & trigger[:, :-1]).any(1)

    scored, unscored, none = (drawn(Backcopy(locked=how), 512) for how in ("scored", "unscored", "none"))
    assert 0.02 < pairs(scored).double().mean() < 0.08
    assert torch.equal(scored.ids, unscored.ids)
    assert (unscored.classes[pairs(unscored)] == -1).all()
    assert (unscored.classes[~pairs(unscored), 1:] >= 0).all()
    assert not pairs(none).any()
    locked = scored.ids[pairs(scored)]
    assert torch.equal(locked[:, 2:], locked[:, :-2])


@pytest.mark.parametrize("task", [Backcopy(), Backcopy(locked="none"), BigramBackcopy(), Recall()],
                         ids=["backcopy", "unlocked", "bigram", "recall"])  # fmt: skip
def test_the_true_distribution_reaches_the_floor(task: Any) -> None:
    """What an observer with the task's own tables loses, sequence by sequence."""
    batch = drawn(task, 512, seed=1)
    if isinstance(task, Backcopy):
        ordinary = task.unigram.clone()
        ordinary[:4] = 0
        tables = task.unigram.log().expand(64, -1)
        early = (ordinary / ordinary.sum()).log()
    else:
        tables = (task.tables[1] if isinstance(task, BigramBackcopy) else task.bigram).log()
        early = tables[0]
    losses = []
    for b in range(512):
        for t in range(1, 64):
            if batch.classes[b, t] < 0:
                continue
            row = tables[batch.ids[b, t - 1]]
            if isinstance(task, Backcopy) and task.locked == "none" and t < 2:
                row = early
            if isinstance(task, Recall) and t == 1:
                row = torch.full_like(row, -math.log(60))
            losses.append(0.0 if batch.classes[b, t] == 1 else -float(row[batch.ids[b, t]]))
    scored = batch.classes >= 0
    error = np.std(losses) / math.sqrt(len(losses))
    assert np.mean(losses) == pytest.approx(float(batch.floor[scored].mean()), abs=4 * error)


def test_recall_recalls_the_first_token() -> None:
    batch = drawn(Recall())
    recalled = batch.classes == 1
    assert (batch.ids[:, 0] == 0).all()
    assert (batch.ids[:, 1] > 3).all()
    after = (batch.ids[:, 1:-1] >= 1) & (batch.ids[:, 1:-1] <= 3)
    assert torch.equal(recalled[:, 2:], after)
    assert torch.equal(batch.ids[recalled], batch.ids[:, 1:2].expand(-1, 64)[recalled])


@pytest.mark.parametrize("task", [*PACKINGS, BigramBackcopy(), Recall(), Text(seq_len=32)], ids=lambda t: repr(t)[:40])
def test_the_seed_decides_the_sequences(task: Any) -> None:
    assert torch.equal(drawn(task, 4, 7).ids, drawn(task, 4, 7).ids)
    assert not torch.equal(drawn(task, 4, 7).ids, drawn(task, 4, 8).ids)


def test_leaving_the_first_token_out_leaves_the_same_targets() -> None:
    batch = drawn(Backcopy())
    shorter = batch.without_first()
    assert torch.equal(shorter.ids, batch.ids[:, 1:])
    assert torch.equal(shorter.classes, batch.classes[:, 1:])


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    """Documents of 9 tokens, each of one letter: document d holds the letter d mod 26."""
    return str(write_tokens((chr(97 + d % 26) * 9 for d in range(400)), tmp_path / "tokens.npy"))


@pytest.mark.parametrize("packing", ["random", "bos", "document-bos"])
@pytest.mark.parametrize("masking", ["causal", "document"])
def test_windows_of_text_are_packed_as_said(token_file: str, packing: str, masking: str) -> None:
    task = Text(token_file, packing=packing, masking=masking, seq_len=40, n_ids=257)
    batch = drawn(task, 32)
    assert batch.ids.shape == (32, 40)
    for ids, classes, documents in zip(
        batch.ids.tolist(), batch.classes.tolist(), batch.documents.tolist(), strict=True
    ):
        assert classes[0] == -1
        letters = [(i, t) for t, i in enumerate(ids) if i != 0]
        assert all(
            (a == b) == (documents[t] == documents[u]) for (a, t), (b, u) in zip(letters, letters[1:], strict=False)
        )
        if packing == "random":
            assert 0 not in ids
        elif packing == "bos":
            assert ids[0] == 0
            assert 0 not in ids[1:]
        else:
            begins = [t for t in range(1, 40) if documents[t] != documents[t - 1]]
            assert [t for t in range(1, 40) if ids[t] == 0] == begins
            assert all(classes[t] == -1 for t in begins)
        if masking == "document" and packing != "document-bos":
            assert all((classes[t] == -1) == (documents[t] != documents[t - 1]) for t in range(1, 40))


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npy"
    np.save(path, np.concatenate([[-1], np.arange(10000)]).astype(np.int32))
    task = Text(str(path), packing="random", seq_len=50, n_ids=10000)
    generator = torch.Generator().manual_seed(0)
    trained, held = task.sample(200, generator).ids, task.sample(200, generator, held_out=True).ids
    assert int(trained.max()) < int(held.min())
    assert torch.equal(trained[:, 1:], trained[:, :-1] + 1)


def test_text_is_read_byte_by_byte() -> None:
    from pydoc_data.topics import topics

    row = drawn(Text(seq_len=64), 1).ids[0].tolist()
    assert row[0] == 0
    assert bytes(i - 1 for i in row[1:]) in "".join(topics.values()).encode()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Backcopy(packing="middle"), "packing must be"),
        (lambda: Backcopy(masking="document"), "document_length"),
        (lambda: Backcopy(triggers=63), "triggers"),
        (lambda: Backcopy(locked="maybe"), "locked must be"),
        (lambda: Backcopy(seq_len=3), "at least 4"),
        (lambda: BigramBackcopy(triggers=60), "triggers must be"),
        (lambda: Recall(concentration=0.0), "concentration"),
        (lambda: drawn(Text("tokens.npy")), "n_ids"),
        (lambda: drawn(Text("tokens.npy", n_ids=5)), "no .npy file"),
        (lambda: drawn(Text(tokenizer="klingon")), "tokenizer must be"),
        (lambda: Text(seq_len=2), "seq_len"),
    ],
)
def test_impossible_tasks_are_refused(make: Any, word: str) -> None:
    with pytest.raises(sl.BadInputError, match=word):
        make()


def test_token_files_are_checked(tmp_path: Path, token_file: str) -> None:
    with pytest.raises(sl.BadInputError, match="beyond n_ids"):
        drawn(Text(token_file, n_ids=100, seq_len=20))
    with pytest.raises(sl.BadInputError, match="too few"):
        drawn(Text(token_file, n_ids=257, seq_len=4000))
    np.save(tmp_path / "floats.npy", np.zeros(100))
    with pytest.raises(sl.BadInputError, match="integers"):
        drawn(Text(str(tmp_path / "floats.npy"), n_ids=5))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(sl.BadInputError, match="no .npy file"):
        drawn(Text(str(tmp_path / "objects.npy"), n_ids=5))
    with pytest.raises(sl.BadInputError, match="no document"):
        write_tokens([], tmp_path / "empty.npy")
    with pytest.raises(sl.BadInputError, match="surrogates not allowed"):
        write_tokens(["\ud800"], tmp_path / "half a pair.npy")
    assert not list(tmp_path.glob("half*"))
