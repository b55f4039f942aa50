"""``Hooks``: the list of hook functions that an intervention is, which also remembers the edit that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public_methods
from sinklens.find.locations import Places
from sinklens.show.notebook import ShownInJupyter

Build = Callable[[TransformerBridge | None, Places | None], "Hooks"]


@public_methods
class Hooks(ShownInJupyter, list[Any], table="_points"):
    """A list ``[(name, function), ...]`` as TransformerLens takes it, so it composes with any other list.

    ``model.run_with_hooks(tokens.ids, attention_mask=tokens.mask, fwd_hooks=hooks)`` or
    ``with model.hooks(fwd_hooks=hooks): ...``; the order within the list matters (the first ones only read).

    Attributes:
        name: what the edit is, in words.
        places: where it acts; None where an edit has no positions (another softmax, a window).
        layers: the layers in which it may act.
        backend: the one that the edit is bound to; "auto" for either.
        residual: whether it edits the residual stream or a component's output instead of attention.
        notes: what the reader of a result should know; edits add to it while they run.
    """

    def __init__(
        self,
        items: Sequence[tuple[str, Callable[..., Any]]],
        *,
        name: str,
        build: Build,
        places: Places | None = None,
        layers: Sequence[int] = (),
        residual: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(items)
        self.name = name
        self.places = places
        self.layers = tuple(layers)
        self.residual = residual
        self.backend = backend
        self.notes: list[str] = []
        self._build = build

    def at(self, positions: Sequence[int] | Sequence[Sequence[int]]) -> Hooks:
        """The same edit elsewhere.

        Args:
            positions: one list for every sequence (then on any tokens, in all of the edit's layers), or one list per
                sequence of the SinkMap's tokens: these stand in for its sinks in order, each in the layers of its own.

        Raises:
            BadInputError: an edit without positions, or lists that do not fit.
        """
        if self.places is None:
            raise BadInputError(f"{self.name} has no positions, so there is no elsewhere")
        return self.rebuilt(self.places.at(positions))

    def rebuilt(self, places: Places | None = None, model: TransformerBridge | None = None) -> Hooks:
        """The same edit at other places, or on another model of the same shape."""
        return self._build(model, places if places is not None else self.places)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def _points(self) -> pd.DataFrame:
        """One row per kind of hook point: in which layers, how many functions."""
        found: dict[str, list[str]] = {}
        for name, _ in self:
            layer, _, point = (
                name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
            )
            found.setdefault(point, []).append(layer)
        rows = [(point, ", ".join(dict.fromkeys(layers)), len(layers)) for point, layers in found.items()]
        return pd.DataFrame(rows, columns=pd.Index(["hook point", "layers", "functions"]))

    def __repr__(self) -> str:
        notes = "".join(f"\n  note: {note}" for note in self.notes)
        return f"Hooks({self.name}: {len(self)} hook functions){notes}"
