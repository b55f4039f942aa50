"""``ablate_residual``: edits of the residual stream at the sink token itself.

Source: Sun et al. 2024 (massive activations set to zero, or to their mean; the two differ by orders of magnitude, so
the mode's name says which); the sink direction: docs/definitions.md, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.hooks import Hooks
from sinklens.ablate.reference import reference_places
from sinklens.ablate.selection import Layers, select
from sinklens.ablate.sink_edit import same_vector
from sinklens.attention.run import collect
from sinklens.bridge.adapters import block_input
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.find.locations import Places, Sinks, find_places
from sinklens.forward.follow import Forward
from sinklens.forward.states import typical_mean
from sinklens.inputs.tokens import Tokens
from sinklens.show.progress import progress_bar

ResidualMode = Literal["massive_zero", "massive_mean", "project", "rescale"]
MASSIVE = 100.0  # times the median entry of the same hidden state
NORM_RATIO = 3.0


@dataclass(frozen=True, eq=False)
class State:
    """What one sequence's residual stream shows at one layer."""

    document: int
    groups: tuple[str, ...]
    states: Float[Tensor, "sink d_model"]
    mu: Float[Tensor, " d_model"]
    median_norm: float


@public
def ablate_residual(
    model: TransformerBridge,
    sinks: Sinks,
    mode: ResidualMode,
    *,
    layers: Layers = None,
    g: float | None = None,
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    allow_identity: bool = False,
    progress: bool | None = None,
) -> Hooks:
    """Hooks that edit the residual stream x before a block (``resid_pre``) at the sink tokens.

    ================  ================================================================================================
    ``massive_zero``  dimensions with ``|x_d| > 100 median |x|`` set to 0
    ``massive_mean``  the same dimensions set to their mean over the sinks of the same kind in other documents
    ``project``       ``x - <x - mu, u> u``; u: unit mean of ``x - mu`` over those sinks, mu: the mean over the tokens
                      of other documents whose norm is below 3 medians
    ``rescale``       ``x`` times g; without g, to the median norm of the tokens of other documents
    ================  ================================================================================================

    Args:
        model: from :func:`sinklens.load_model`.
        sinks: a SinkMap (each sink in the layers of its lives), positions, or a predicate on the ids.
        mode: see above.
        layers: before which blocks; default all (of a SinkMap: those of each sink's lives).
        g: for ``rescale``, at least 0.
        reference: other sequences; default: the other documents of the SinkMap, else 16 of python-docs.
        allow_identity: run an edit that changes nothing instead of refusing it.
        progress: show a bar while the reference is read.

    Raises:
        BadInputError: bad options; while running: no massive dimension, or a mean that equals what is there.

    Cost: one forward per reference sequence when the hooks are built (not for ``massive_zero``, nor with g).
    """
    facts = capabilities(model)
    places = find_places(sinks)
    if g is not None and (mode != "rescale" or not 0 <= g < math.inf):
        raise BadInputError(f"g >= 0 belongs to mode 'rescale'; got mode {mode!r}, g={g}")
    if places.learned or places.recent or not places.columns_wanted:
        raise BadInputError("ablate_residual edits the stream at tokens; the learned sink and 'recent' keys have none")
    chosen = select(facts, places, layers)
    found: dict[int, list[State]] = {}
    own = False
    if not (mode == "massive_zero" or g is not None):
        found, own = _look(model, places, reference, chosen.layers, progress)
    forward = Forward(model, places.tokens)

    def build(other: TransformerBridge | None, elsewhere: Places | None) -> Hooks:
        there = places if elsewhere is None else elsewhere
        options: dict[str, Any] = {"layers": layers, "g": g, "reference": reference, "allow_identity": allow_identity}
        return ablate_residual(other or model, there, mode, **options, progress=False)

    edit = _Edit(mode, g, places, found, own, forward, chosen.layers, allow_identity)
    items = [*forward.hooks(), *((block_input(layer), edit.at(layer)) for layer in chosen.layers)]
    name = mode if g is None else f"{mode}({g:g})"
    return Hooks(items, name=name, build=build, places=places, layers=chosen.layers, residual=True)


def massive(state: Float[Tensor, " d_model"]) -> Tensor:
    """Which dimensions exceed 100 times the median entry."""
    size = state.abs()
    return size > MASSIVE * size.median()


def _look(
    model: TransformerBridge,
    places: Places,
    reference: str | Sequence[str] | Tensor | Tokens | None,
    layers: Sequence[int],
    progress: bool | None,
) -> tuple[dict[int, list[State]], bool]:
    """The states of the sinks of other sequences, and whether those are the edit's own tokens."""
    tokens, where = reference_places(model, places, reference)
    names = [block_input(layer) for layer in layers]
    found: dict[int, list[State]] = {layer: [] for layer in layers}
    with progress_bar("reference", len(tokens), progress) as advance:
        for sequence in range(len(tokens)):
            one = tokens[sequence].trim().to(str(model.cfg.device))
            kept = collect(model, one.ids, names)
            forward = Forward(model)
            forward.ids, forward.rows = one.ids, [sequence]
            for layer, name in zip(layers, names, strict=True):
                if where.acts_in(layer):
                    x = kept[name].float()
                    groups: list[str] = []
                    columns: list[int] = []
                    for group, marked in where.marked_or_none(forward, layer).items():
                        here = marked[0].nonzero().flatten().tolist()
                        groups += [group] * len(here)
                        columns += here
                    norm = float(x.norm(dim=-1).median())
                    mu = typical_mean(x, NORM_RATIO)[0]
                    found[layer].append(State(tokens.documents[sequence], tuple(groups), x[columns], mu, norm))
            advance()
    return found, tokens is places.tokens


class _Edit:
    """The edit of the residual stream before each block."""

    def __init__(
        self,
        mode: ResidualMode,
        g: float | None,
        places: Places,
        found: dict[int, list[State]],
        own: bool,
        forward: Forward,
        layers: Sequence[int],
        allow_identity: bool,
    ) -> None:
        self.mode, self.g, self.places, self.found, self.forward = mode, g, places, found, forward
        self.layers, self.allow_identity, self.own = layers, allow_identity, own
        self.touched = self.differs = False

    def at(self, layer: int) -> Any:
        """The hook for one block."""

        def hook(tensor: Tensor, hook: Any) -> Tensor:
            forward = self.forward
            forward.visit(hook.name)
            if layer == self.layers[0]:
                self.touched = self.differs = False
            new = tensor.clone()
            for group, marked in self.places.groups(forward, layer).items():
                for b, column in marked[:, forward.past :].nonzero().tolist():
                    new[b, column] = self._edited(layer, group, b, tensor[b, column])
            if layer == self.layers[-1] and self.touched and not self.differs and not self.allow_identity:
                raise BadInputError(
                    f"{self.mode} would change nothing: "
                    + (
                        "no dimension of these tokens exceeds 100 times the median entry"
                        if self.mode.startswith("massive")
                        else "the tokens are what they would become"
                    )
                    + "; choose other sinks or layers, or pass allow_identity=True"
                )
            return new

        return hook

    def _edited(self, layer: int, group: str, row: int, own: Float[Tensor, " d_model"]) -> Tensor:
        x = own.float()
        if self.mode == "rescale" and self.g is not None:
            new = x * self.g
        elif self.mode == "massive_zero":
            new = torch.where(massive(x), 0, x)
        else:
            new = self._towards_others(layer, group, row, x)
        same = same_vector(new, x)
        self.touched = True
        self.differs |= not bool(same) or self.g == 1
        return torch.where(same, own, new.to(own))

    def _towards_others(self, layer: int, group: str, row: int, x: Float[Tensor, " d_model"]) -> Tensor:
        without = self._document(row)
        others = [state for state in self.found[layer] if state.document != without]
        states = [s.states[[g == group for g in s.groups]] for s in others]
        vectors = torch.cat(states) if states else x.new_zeros(0, x.shape[0])
        if self.mode == "rescale" and others:
            typical = sum(s.median_norm for s in others) / len(others)
            return x * (typical / x.norm())
        if not len(vectors):
            raise BadInputError(
                f"no other document has a sink of {group!r} at layer {layer} to compare with; give reference= more "
                f"sequences, or restrict layers="
            )
        if self.mode == "massive_mean":
            return torch.where(massive(x), vectors.mean(0), x)
        mu = torch.stack([s.mu for s in others]).mean(0)
        u = torch.nn.functional.normalize((vectors - mu).mean(0), dim=0)
        return x - ((x - mu) @ u) * u

    def _document(self, row: int) -> int | None:
        """The document of a running row; only the SinkMap's own documents can be among the others."""
        sequence, tokens = self.forward.rows[row], self.places.tokens
        return tokens.documents[sequence] if self.own and tokens is not None and sequence is not None else None
