"""``measure_mixing``: over-mixing by Jacobians, with and without sinks (docs/definitions.md, section 6).

Three indices of J, in :mod:`sinklens.mixing.indices`, always together. Source: Barbero et al. 2025 for what is asked;
the estimator is ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.mixing.conditions import BASE, Conditions, Sinks, conditions_of, sinks_of
from sinklens.mixing.indices import INDICES, indices
from sinklens.mixing.jacobians import (
    PROBES,
    Stream,
    exact_columns,
    fitting_chunk,
    probed_squares,
    probed_squares_reverse,
)
from sinklens.mixing.result import Mixing, MixingComparison
from sinklens.models.load import untrained_twin
from sinklens.show.progress import progress_bar

MOST = 128
Route = Literal["auto", "forward", "reverse"]


@dataclass(frozen=True)
class _Way:
    """How J is measured."""

    probes: int
    exact: bool | Literal["sinks"]
    layer: int
    frozen_attention: bool
    frozen_norms: bool
    route: Route
    most: int
    chunk: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.probes < 2 and self.exact is not True:
            raise BadInputError(f"probes must be at least 2, got {self.probes}")
        if self.exact and self.route == "reverse":
            raise BadInputError("exact columns take forward mode; leave out exact= or route='reverse'")
        if self.most < 2:
            raise BadInputError(f"most must be at least 2, got {self.most}")

    def words(self, reverse: bool) -> str:
        """The definition in force."""
        how = {True: "exact", "sinks": f"sink columns exact, else {self.probes} probes"}
        state = [
            f"attention {'frozen' if self.frozen_attention else 'live'}",
            f"norms {'frozen' if self.frozen_norms else 'live'}",
            how.get(self.exact, f"{self.probes} probes") + (", reverse mode" if reverse else ""),
        ]
        return f"d block output / d input of block {self.layer}, " + ", ".join(state)


@public
def measure_mixing(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    sinks: Sinks = None,
    hooks: Sequence[Any] = (),
    probes: int = PROBES,
    seed: int = 0,
    exact: bool | Literal["sinks"] = False,
    layer: int = 0,
    frozen_attention: bool = False,
    frozen_norms: bool = False,
    route: Route = "auto",
    most: int = MOST,
    chunk: int | None = None,
    progress: bool | None = None,
) -> Mixing:
    """How much every token's representation depends on every other, under a hook list.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences.
        sinks: S, whose columns are counted apart: a map of these tokens, or positions. None: what
            :func:`sinklens.find_sinks` finds without hooks, and in sequences too short for it the first token
            (encoders: the special tokens). The same S under every hooks that are to be compared.
        hooks: edits in force, such as those of :func:`sinklens.ablate_sinks`.
        probes: random vectors per token; ``E |J v|^2 = |J|_F^2`` for v ~ N(0, I).
        seed: of probes and of the sample of tokens: the same seed gives the same probes in every condition.
        exact: no probes but all of J (d_model tangents per token); "sinks": the columns of S only.
        layer: the block whose input is varied; 0: the embedding.
        frozen_attention: keep every pattern as it is in this condition.
        frozen_norms: keep the scale of every norm on the stream.
        route: "forward"; "reverse", L times as many passes, for hosts without forward mode (some mixtures of experts,
            Bloom); "auto" takes forward mode where it exists, and says so where it does not.
        most: longer sequences are measured on so many tokens that are no sink, drawn at random (and all of S): sums
            over them are scaled to the whole.
        chunk: tangents at once; default: as many as fit into half of the free memory, at most 16.
        progress: show a bar.

    Cost: per sequence ``probes`` tangents per token, each about one forward of the blocks. Memory: ``chunk`` times one
    sequence's activations and block outputs.

    Raises:
        BadInputError: fewer than two tokens that are no sink, sinks of other tokens, or more memory needed than is
            free: the message says how much.
        UnsupportedModelError: what shall be frozen cannot be on this host, or no derivative of either mode.

    Warns:
        SinklensWarning: the reverse route was taken.
    """
    way = _Way(probes, exact, layer, frozen_attention, frozen_norms, route, most, chunk, seed)
    return _measure(model, tokens, {BASE: hooks}, sinks, way, progress)[BASE]


@public
def compare_mixing(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    conditions: Conditions,
    *,
    sinks: Sinks = None,
    probes: int = PROBES,
    seed: int = 0,
    exact: bool | Literal["sinks"] = False,
    layer: int = 0,
    frozen_attention: bool = False,
    frozen_norms: bool = False,
    route: Route = "auto",
    most: int = MOST,
    chunk: int | None = None,
    twin: bool = False,
    progress: bool | None = None,
) -> MixingComparison:
    """:func:`measure_mixing` of the model as it is ("base") and under several hook lists, with the same probes and S.

    Args:
        conditions: hook lists by label, such as ``{"without": ablate_sinks(model, sinks)}``. A BOS that is renormalised
            away in every layer is a BOS removed, for all rows after it.
        twin: also an untrained twin of the model (same shape, random weights, no hooks), "untrained twin": what an
            index shows there is not learned.

    The other arguments, cost and errors are those of :func:`measure_mixing`.
    """
    way = _Way(probes, exact, layer, frozen_attention, frozen_norms, route, most, chunk, seed)
    found = _measure(model, tokens, conditions_of(conditions), sinks, way, progress)
    if twin:
        base = found[BASE]
        shadow = untrained_twin(model, seed)
        found |= _measure(shadow, base.tokens, {"untrained twin": []}, base.sinks, way, progress)
    return MixingComparison(found)


def _measure(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    conditions: Conditions,
    sinks: Sinks,
    way: _Way,
    progress: bool | None,
) -> dict[str, Mixing]:
    facts = capabilities(model)
    batch = as_tokens(model, tokens).to("cpu")
    own, source = sinks_of(model, batch, sinks)
    draw = torch.Generator().manual_seed(way.seed)
    positions = tuple(_drawn(int(n), s, way.most, draw) for n, s in zip(batch.lengths.tolist(), own, strict=True))
    if not 0 <= way.layer < facts.n_layers:
        raise BadInputError(f"layer {way.layer} is out of range: the model has {facts.n_layers}")
    depth = facts.n_layers - way.layer
    found = {label: {name: torch.full((len(batch), depth), math.nan) for name in INDICES} for label in conditions}
    maps: dict[str, list[Tensor]] = {label: [] for label in conditions}
    errors: dict[str, list[Tensor]] = {label: [] for label in conditions}
    reverse = way.route == "reverse"
    with progress_bar("Jacobians", len(batch) * len(conditions), progress) as advance:
        for b in range(len(batch)):
            ids = batch[b].trim().ids.to(model.cfg.device)
            for label, edit in conditions.items():
                stream = Stream(
                    model, ids, edit, layer=way.layer, frozen_attention=way.frozen_attention,
                    frozen_norms=way.frozen_norms, sequence=b,
                )  # fmt: skip
                try:
                    squares, var = _squares(stream, positions[b], own[b], way, reverse=reverse)
                except UnsupportedModelError as error:
                    if way.route != "auto" or reverse or way.exact:
                        raise
                    warnings.warn(f"{error}: taking it, {depth} times the passes", SinklensWarning, stacklevel=3)
                    reverse = True
                    squares, var = _squares(stream, positions[b], own[b], way, reverse=True)
                for name, values in indices(
                    squares, positions[b], own[b], stream.start, stream.outputs, causal=facts.causal
                ).items():
                    found[label][name][b] = values
                maps[label].append(squares.float())
                errors[label] += [] if var is None else [var.float()]
                advance()
    info: dict[str, Any] = {"model": facts.model, "sinklens": version("sinklens"), "seed": way.seed, "S": source}
    info |= {"layer": way.layer, "definition": way.words(reverse), "probes": 0 if way.exact is True else way.probes}
    info |= {"causal": facts.causal, "capabilities": asdict(facts)}
    return {
        label: Mixing(
            **found[label], maps=tuple(maps[label]), errors=tuple(errors[label]), tokens=batch, positions=positions,
            sinks=own, info=info,
        )
        for label in conditions
    }  # fmt: skip


def _squares(
    stream: Stream, positions: Sequence[int], sinks: Sequence[int], way: _Way, *, reverse: bool
) -> tuple[Float[Tensor, "layer row column"], Float[Tensor, "layer row column"] | None]:
    """The map of the measured tokens, and its variance over probes (0 in exact columns)."""
    rows = list(positions)
    if reverse:
        layers = range(stream.layer, stream.n_layers)
        drawn = probed_squares_reverse(stream, layers, rows, count=way.probes, seed=way.seed)[..., rows]
        return drawn.mean(0), drawn.var(0)
    chunk = fitting_chunk(stream, way.chunk)
    if way.exact is True:
        return exact_columns(stream, positions, chunk=chunk)[:, rows], None
    step = max(1, chunk // way.probes)  # columns at once: no more probes are held than are averaged next
    means, variances = [], []
    probed = [p for p in positions if not (way.exact and p in sinks)]
    for n in range(0, len(probed), step):
        drawn = probed_squares(stream, probed[n : n + step], count=way.probes, seed=way.seed, chunk=chunk)[:, :, rows]
        means.append(drawn.mean(0))
        variances.append(drawn.var(0))
    mean, var = torch.cat(means, -1), torch.cat(variances, -1)
    if way.exact:
        known = [p for p in positions if p in sinks]
        columns = exact_columns(stream, known, chunk=chunk)[:, rows]
        order = torch.tensor([*probed, *known]).argsort()
        mean = torch.cat([mean, columns], -1)[..., order]
        var = torch.cat([var, torch.zeros_like(columns)], -1)[..., order]
    return mean, var


def _drawn(length: int, sinks: Sequence[int], most: int, draw: torch.Generator) -> tuple[int, ...]:
    """The sinks, the last token, and at most ``most`` others."""
    free = [p for p in range(length - 1) if p not in sinks]
    if len(free) + 1 > most:
        order = torch.randperm(len(free), generator=draw)[: most - 1].tolist()
        free = [free[i] for i in order]
    return tuple(sorted({*free, *sinks, length - 1}))
