"""``reproduce``: published results measured again, each with a verdict by rule."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, SinklensError, SinklensWarning
from sinklens.core.validation import public
from sinklens.models.load import load_model
from sinklens.reproductions.catalogue import chosen
from sinklens.reproductions.claims import Entry, Quantity, Setting, verdict
from sinklens.reproductions.originals import ORIGINALS, Subject, at_hand, subject_of
from sinklens.reproductions.result import Reproductions
from sinklens.show.progress import progress_bar


@public
def reproduce(
    entries: Sequence[str] | str | None = None,
    *,
    model: TransformerBridge | str | None = None,
    source: str = "python-docs",
    n_seqs: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Reproductions:
    """Measure published results again, and judge each claim by a rule that is code.

    Args:
        entries: names from the catalogue (``sinklens reproduce --list``); default all.
        model: a model, or the name, folder or hub id of one, on which all entries run. A published model is recognised
            by its hub id's or folder's name together with its sizes. Default: for each entry those of its original
            models that lie in the local Hugging Face cache, and the embedded models where there is none or where none
            loads.
        source: natural text, as for :func:`sinklens.load_tokens`.
        n_seqs: so many sequences in the place of each entry's own number; verdicts need 16 documents.
        seed: of documents, random ids and draws.
        progress: show a bar.

    Returns:
        Claims with what was published, what was measured and the verdict: "reproduced", "differs", or "not
        comparable", with the reason (another model, a protocol that the model cannot run, too few documents, an
        interval that leaves it undecided).

    Raises:
        BadInputError: an unknown entry; a given model that does not load.

    Cost: everything on the embedded models, about 15 CPU minutes.
    """
    wanted = chosen(entries)
    setting = Setting(source, n_seqs, seed)
    shelf = _Shelf(model)
    plan = [(entry, name) for entry in wanted for name in shelf.names(entry)]
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    with progress_bar("reproducing", len(plan), progress) as advance:
        for name in dict.fromkeys(name for _, name in plan):  # a model at a time
            for entry in [entry for entry, of in plan if of == name]:
                start = time.process_time()
                mine, more = _one(entry, shelf, name, setting)
                rows += mine
                others += more
                seconds[f"{entry.name} on {name}"] = time.process_time() - start
                advance()
            shelf.put_back(name)
    order = {entry.name: n for n, entry in enumerate(wanted)}
    rows.sort(key=lambda row: order[row["entry"]])
    others.sort(key=lambda row: order[row["entry"]])
    info = {"source": source, "seed": seed, "n_seqs": n_seqs, "sinklens": version("sinklens"), "cpu_seconds": seconds}
    info |= {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
    info["written"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Reproductions(tuple(rows), tuple(others), tuple(shelf.notes), wanted, info)


class _Shelf:
    """The models of a run: which, loaded when they are needed."""

    def __init__(self, given: TransformerBridge | str | None) -> None:
        self.given, self.notes, self.loaded = given, [], {}
        if isinstance(given, PlainModel):
            raise BadInputError("the published protocols need a TransformerBridge; this model has none")
        if given is not None:
            model: Any = load_model(given)
            if isinstance(model, PlainModel):
                raise BadInputError("the published protocols need a TransformerBridge; this model has none")
            self.name = given if isinstance(given, str) else str(model.cfg.model_name)
            self.loaded[self.name] = model, subject_of(model, self.name)

    def names(self, entry: Entry) -> list[str]:
        """The models on which an entry runs: the given one, or originals at hand, or stand-ins."""
        if self.given is not None:
            return [self.name]
        here = [hub for hub in map(at_hand, entry.originals) if hub]
        usable = [hub for hub in here if self._loads(hub)]
        if usable:
            return usable
        if not here:
            hubs = ", ".join(ORIGINALS[key].hub for key in entry.originals)
            self.notes.append(
                f"{entry.name}: none of its models ({hubs}) lies in the local cache; give one with model= (--model)"
            )
        return list(entry.stand_ins)

    def get(self, name: str) -> tuple[TransformerBridge, Subject]:
        """A model and what it is."""
        if name not in self.loaded:
            model: Any = load_model(name)
            if isinstance(model, PlainModel):
                raise BadInputError(f"{name}: the published protocols need a TransformerBridge; this model has none")
            self.loaded[name] = model, subject_of(model, name)
        return self.loaded[name]

    def put_back(self, name: str) -> None:
        """Let a model's memory go."""
        self.loaded.pop(name, None)

    def _loads(self, hub: str) -> bool:
        try:
            self.get(hub)
        except (SinklensError, MemoryError) as error:
            self.notes.append(f"{hub} lies in the local cache but could not be loaded: {error}")
            return False
        return True


def _one(entry: Entry, shelf: _Shelf, name: str, setting: Setting) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All claims of an entry on one model, and what else was measured."""
    found: dict[str, Quantity] = {}
    model, subject = shelf.get(name)
    reason = entry.unfit(subject)
    if not reason:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SinklensWarning)
                found = {quantity.name: quantity for quantity in entry.measure(model, setting)}
        except SinklensError as error:
            reason = str(error)
    rows = []
    for claim in entry.claims:
        quantity = found.get(claim.quantity)
        word, why = verdict(claim, quantity, subject, reason)
        row = {"entry": entry.name, "model": name, "claim": claim.statement, "published": claim.shown(subject)}
        row |= {"grade": claim.grade, "quantity": claim.quantity, **_numbers(quantity)}
        rows.append(row | {"rule": str(claim.rule), "verdict": word, "reason": why})
    judged = {claim.quantity for claim in entry.claims}
    others = [
        {"entry": entry.name, "model": name, "quantity": q.name, **_numbers(q)}
        for q in found.values()
        if q.name not in judged
    ]
    return rows, others


def _numbers(quantity: Quantity | None) -> dict[str, float]:
    if quantity is None:
        return {"measured": math.nan, "low": math.nan, "high": math.nan, "documents": 0}
    numbers = {"measured": quantity.value, "low": quantity.low, "high": quantity.high}
    return numbers | {"documents": quantity.documents}
