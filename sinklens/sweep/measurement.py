"""``Measurement``: what a task works on: the piece of a text, its sinks, the edit; one sequence at a time.

Sequences that run in one batch share matrix products, and the last bits of a number then depend on its neighbours. So
everything here runs each sequence by itself: a text that is split over several jobs gives the very same numbers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sinklens.ablate.hooks import Hooks
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import SinklensWarning, UnsupportedModelError
from sinklens.find.scores import SinkScores, sink_scores
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import from_scores
from sinklens.inputs.tokens import Tokens
from sinklens.sweep.edits import build_edit
from sinklens.sweep.specs import InterventionSpec


@dataclass(eq=False)
class Measurement:
    """One job's inputs, loaded.

    Attributes:
        model: the model.
        whole: all sequences of the text.
        rows: (first, end) of the piece.
        edit: the intervention.
        seed: the job's; the sequence ``first + b`` of the text draws by ``seed + first + b``, in whichever piece it is.
        notes: what the reader of the numbers should know.
    """

    model: Any
    whole: Tokens
    rows: tuple[int, int]
    edit: InterventionSpec
    seed: int
    notes: list[str] = field(default_factory=list)

    @cached_property
    def tokens(self) -> Tokens:
        """The sequences of the piece."""
        return self.whole[slice(*self.rows)]

    @property
    def seed_here(self) -> int:
        """The seed of the piece's first sequence."""
        return self.seed + self.rows[0]

    def one(self, sequence: int) -> Tokens:
        """One sequence of the piece, without padding."""
        return self.tokens[sequence].trim()

    @cached_property
    def found(self) -> SinkMap:
        """The sinks of the unedited model in the piece, by attention."""
        parts = [sink_scores(self.model, self.one(b), progress=False) for b in range(len(self.tokens))]
        scores = replace(SinkScores.concatenate(parts), tokens=self.tokens.to("cpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)  # the notes say it
            found = from_scores(scores)
        self.note(*found.notes)
        return found

    @cached_property
    def chosen(self) -> SinkMap:
        """The found sinks that the intervention acts on."""
        return self.found if self.edit.sinks == "all" else self.found.where(kind=self.edit.sinks)

    def edits(self, sequence: int) -> bool:
        """Whether the intervention has anything to edit in a sequence."""
        if self.edit.build == "none":
            return False
        return not self.edit.finds or any(s.sequence == sequence for s in self.chosen)

    @cached_property
    def hooks(self) -> Sequence[Any]:
        """The intervention's hooks; none where no sequence of the piece has anything to edit."""
        if not any(self.edits(b) for b in range(len(self.tokens))):
            return ()
        if isinstance(self.model, PlainModel):
            raise UnsupportedModelError(f"{self.edit.label}: {self.model.capabilities.model} has no hooks to edit with")
        return build_edit(self.edit, self)

    @contextlib.contextmanager
    def edited(self, sequence: int) -> Iterator[None]:
        """Within, the model runs with the intervention, if there is any in this sequence."""
        if not self.edits(sequence):
            yield
            return
        with self.model.hooks(fwd_hooks=list(self.hooks)):
            yield

    def note(self, *texts: str) -> None:
        """Keep notes, each once."""
        self.notes += [text for text in texts if text not in self.notes]

    def collect_notes(self) -> list[str]:
        """All notes, those of the hooks included."""
        if "hooks" in self.__dict__ and isinstance(self.hooks, Hooks):
            self.note(*self.hooks.notes)
        return self.notes
