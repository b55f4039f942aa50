"""Which layers and heads an edit acts in, from what the user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.bridge.capabilities import Capabilities
from sinklens.core.errors import BadInputError
from sinklens.find.locations import Places

Layers = int | Sequence[int] | None
Heads = int | Sequence[int] | Sequence[tuple[int, int]] | None


@dataclass(frozen=True)
class Selection:
    """Layers, and the heads of each."""

    layers: tuple[int, ...]
    heads: dict[int, tuple[int, ...]]

    def mask(self, layer: int, n_heads: int, device: torch.device) -> Bool[Tensor, " head"]:
        """The chosen heads of a layer."""
        chosen = torch.zeros(n_heads, dtype=torch.bool, device=device)
        chosen[list(self.heads[layer])] = True
        return chosen


def select(facts: Capabilities, places: Places | None, layers: Layers = None, heads: Heads = None) -> Selection:
    """The layers and heads asked for, in which the places have anything to edit.

    Raises:
        BadInputError: out of range, empty, pairs together with layers, or no layer in which a sink is alive.
    """
    named = _numbers(layers, "layers", facts.n_layers)
    everything = tuple(range(facts.n_heads))
    by_layer: dict[int, tuple[int, ...]]
    pairs = None if heads is None or isinstance(heads, int) else [h for h in heads if not isinstance(h, int)]
    if pairs:
        if layers is not None or heads is None or isinstance(heads, int) or len(pairs) != len(heads):
            raise BadInputError("give heads= as numbers with layers=, or as (layer, head) pairs alone")
        by_layer = {}
        for pair in pairs:
            layer, head = (int(n) for n in pair)
            _check_range([layer], "layers", facts.n_layers)
            _check_range([head], "heads", facts.n_heads)
            by_layer[layer] = (*by_layer.get(layer, ()), head)
    else:
        flat = [heads] if isinstance(heads, int) else None if heads is None else [int(str(h)) for h in heads]
        chosen = everything if flat is None else _numbers(flat, "heads", facts.n_heads)
        by_layer = dict.fromkeys(named, chosen)
    alive = {n: h for n, h in sorted(by_layer.items()) if places is None or places.acts_in(n)}
    if not alive:
        raise BadInputError(f"no sink is alive in layers {sorted(by_layer)}, so the edit would change nothing")
    return Selection(tuple(alive), alive)


def _numbers(given: Layers, what: str, size: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(size))
    found = tuple(dict.fromkeys([given] if isinstance(given, int) else [int(n) for n in given]))
    if not found:
        raise BadInputError(f"{what} is empty, so the edit would change nothing; leave it out for all")
    _check_range(found, what, size)
    return found


def _check_range(numbers: Sequence[int], what: str, size: int) -> None:
    wrong = [n for n in numbers if not 0 <= n < size]
    if wrong:
        raise BadInputError(f"{what} {wrong} are out of range: the model has {what} 0 to {size - 1}")
