"""``measure_mixing``: over-mixing by Jacobians, with and without sinks (docs/definitions.md, section 6).

Three indices, always together, since how the sink's column is counted decides the sign of the conclusion::

    mix[l,i]      = sum_{j<i, j not in S} |J_ij|_F^2 / sum_{j<=i, j not in S} |J_ij|_F^2
    via_sink[l,i] = sum_{j in S} |J_ij|_F^2 / sum_j |J_ij|_F^2
    spread[l,i]   = sqrt(sum_{j<i, j not in S} |J_ij|_F^2 |e_j|^2) / |x_i^l|

as means over the rows i that are no sink, i >= 1 (encoders: j != i in the place of j < i). Source: Barbero et al. 2025
for what is asked; the estimator is ours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.console import progress_bar
from sinklens.errors import BadInputError
from sinklens.jacobians import CHUNK, PROBES, Stream, exact_block, probed_squares
from sinklens.proof import capabilities
from sinklens.results import load_tensors, save_tensors
from sinklens.sinkmap import SinkMap
from sinklens.statistics import interval
from sinklens.tokens import Tokens, as_tokens

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INDICES = ("mix", "via_sink", "spread")
MOST_COLUMNS = 128
BASE = "base"


@dataclass(frozen=True, eq=False)
class Mixing:
    """What :func:`measure_mixing` found.

    Attributes:
        labels: the conditions; the first, "base", is the model as it is.
        mix, via_sink, spread: means over rows: [condition, sequence, layer].
        maps: per condition and sequence ``|J[l,i,j]|_F^2``: [layer, row, column].
        tokens: the sequences.
        positions: per sequence the rows and columns of its maps.
        sinks: per sequence the sinks S.
        info: model, definition in force, versions.
    """

    labels: tuple[str, ...]
    mix: Float[Tensor, "condition batch layer"]
    via_sink: Float[Tensor, "condition batch layer"]
    spread: Float[Tensor, "condition batch layer"]
    maps: dict[tuple[int, int], Float[Tensor, "layer row column"]]
    tokens: Tokens
    positions: tuple[tuple[int, ...], ...]
    sinks: tuple[tuple[int, ...], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"Mixing of {len(self.tokens)} sequence(s), {self.mix.shape[2]} layers, {self.info.get('definition')}"]
        for c, label in enumerate(self.labels):
            last = ", ".join(f"{name} {float(getattr(self, name)[c, :, -1].nanmean()):.3g}" for name in INDICES)
            lines.append(f"  {label}: at the last layer {last}")
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition, layer and index: the mean over sequences, its 95 % interval over documents (16 or
        more, else NaN), and for edited conditions the paired log ratio to base with its interval.
        """
        rows = []
        for c, label in enumerate(self.labels):
            for layer in range(self.mix.shape[2]):
                for name in INDICES:
                    values = getattr(self, name)[:, :, layer].double()
                    row: dict[str, Any] = {"condition": label, "layer": layer + self.info["layer"], "index": name}
                    row |= _summary(values[c], self.tokens.documents, "")
                    ratio = (values[c] / values[0]).log() if c else torch.full_like(values[0], math.nan)
                    rows.append(row | _summary(ratio, self.tokens.documents, "log_ratio"))
        return pd.DataFrame(rows)

    def distances(self, layer: int = -1) -> pd.DataFrame:
        """Sensitivity against distance: mean ``|J_ij|_F^2`` over rows and columns that are no sinks, in octaves."""
        rows = []
        for c, label in enumerate(self.labels):
            bins: dict[int, list[float]] = {}
            for b, at in enumerate(self.positions):
                for r, i in enumerate(at):
                    for k, j in enumerate(at):
                        if i != j and not {i, j} & set(self.sinks[b]) and (j < i or not self.info["causal"]):
                            value = float(self.maps[c, b][layer, r, k])
                            bins.setdefault(int(math.log2(abs(i - j))), []).append(value)
            rows += [
                {"condition": label, "distance": 2**octave, "to": 2 ** (octave + 1) - 1, "n": len(values)}
                | {"mean": sum(values) / len(values)}
                for octave, values in sorted(bins.items())
            ]
        return pd.DataFrame(rows)

    def influence(self, sequence: int = 0, layer: int = -1) -> pd.DataFrame:
        """Influence of each measured token on the last measured one: ``|J_ij|_F^2`` and its share, per condition."""
        if not 0 <= sequence < len(self.positions):
            raise BadInputError(f"sequence {sequence} is out of range: there are {len(self.positions)}")
        rows = []
        for c, label in enumerate(self.labels):
            last = self.maps[c, sequence][layer, -1].double()
            for k, j in enumerate(self.positions[sequence]):
                row = {"condition": label, "position": j, "token": self.tokens.labels[sequence][j]}
                row |= {"sink": j in self.sinks[sequence], "squares": float(last[k])}
                rows.append(row | {"share": float(last[k] / last.sum())})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """The three indices against depth, a line per condition, with intervals where there are any."""
        from sinklens.mixing_plots import index_curves

        return index_curves(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in INDICES}
        tensors |= {f"map.{c}.{b}": m for (c, b), m in self.maps.items()}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {"labels": list(self.labels), "positions": [list(p) for p in self.positions], "info": self.info}
        meta |= {"sinks": [list(s) for s in self.sinks], "tokens": self.tokens.meta()}
        return save_tensors(path, "Mixing", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mixing:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "Mixing")
        maps = {}
        for name in tensors:
            if name.startswith("map."):
                _, c, b = name.split(".")
                maps[int(c), int(b)] = tensors[name]
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            labels=tuple(meta["labels"]),
            mix=tensors["mix"],
            via_sink=tensors["via_sink"],
            spread=tensors["spread"],
            maps=maps,
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            positions=tuple(tuple(int(p) for p in row) for row in meta["positions"]),
            sinks=tuple(tuple(int(p) for p in row) for row in meta["sinks"]),
            info=meta["info"],
        )


def _summary(values: Float[Tensor, " batch"], documents: Sequence[int], prefix: str) -> dict[str, float]:
    known = ~values.isnan()
    kept = [d for d, k in zip(documents, known.tolist(), strict=True) if k]
    span = interval(values[known], kept) if kept else None
    low, high = span or (math.nan, math.nan)
    start = f"{prefix}_" if prefix else ""
    mean = float(values[known].mean()) if kept else math.nan
    return {prefix or "mean": mean, f"{start}low": low, f"{start}high": high}


def measure_mixing(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    hooks: Mapping[str, Sequence[Any]] | Sequence[Any] | None = None,
    *,
    sinks: SinkMap | Sequence[int] = (0,),
    n_probes: int = PROBES,
    exact: bool = False,
    layer: int = 0,
    frozen_attention: bool = False,
    most_columns: int = MOST_COLUMNS,
    chunk: int = CHUNK,
    seed: int = 0,
    progress: bool | None = None,
) -> Mixing:
    """How much every token's representation depends on every other, in the model as it is and under edits.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences.
        hooks: a hook list, or several by label, such as ``{"zero": ablate_sinks(model, sinks, "zero")}``; each is
            measured with the same probes as the model without hooks, "base".
        sinks: S, whose columns are counted apart: a map, or positions; it stays the same under every condition.
        n_probes: random vectors per token.
        exact: no probes but all of ``J`` (d_model tangents per token).
        layer: the block whose input is varied; 0: the embedding.
        frozen_attention: keep every pattern as it is in each condition.
        most_columns: longer sequences are measured on so many tokens that are no sink, drawn at random (and all of S):
            sums over them are scaled to the whole.
        chunk: tangents at once.
        seed: of probes and draws.
        progress: show a bar.

    Cost: per sequence and condition ``n_probes`` tangents per token, each about one forward of the blocks. Memory:
    ``chunk`` times one sequence's activations and ``chunk x layers x positions x d_model`` floats.

    Raises:
        BadInputError: no sequence with two tokens that are no sink, a label "base", sinks of other tokens.
        UnsupportedModelError: the host has no forward-mode derivative.
    """
    facts = capabilities(model)
    batch = as_tokens(model, tokens).to("cpu")
    named = _conditions(hooks)
    if n_probes < 2 and not exact:
        raise BadInputError(f"n_probes must be at least 2, got {n_probes}")
    own = _sinks(sinks, batch)
    draw = torch.Generator().manual_seed(seed)
    positions = tuple(_drawn(int(n), s, most_columns, draw) for n, s in zip(batch.lengths.tolist(), own, strict=True))
    depth = facts.n_layers - layer
    found = {name: torch.full((len(named), len(batch), depth), math.nan) for name in INDICES}
    maps: dict[tuple[int, int], Tensor] = {}
    with progress_bar("Jacobians", len(batch) * len(named), progress) as advance:
        for b in range(len(batch)):
            ids = batch[b].trim().ids.to(model.cfg.device)
            for c, edit in enumerate(named.values()):
                stream = Stream(model, ids, edit, layer=layer, frozen_attention=frozen_attention)
                squares = _squares(stream, positions[b], exact, n_probes, seed, chunk)
                for name, values in indices(stream, squares, positions[b], own[b], causal=facts.causal).items():
                    found[name][c, b] = values
                maps[c, b] = squares.float()
                advance()
    info: dict[str, Any] = {"model": facts.model, "sinklens": version("sinklens"), "seed": seed, "layer": layer}
    how = "exact" if exact else f"{n_probes} probes"
    frozen = "attention frozen" if frozen_attention else "attention live"
    info |= {"definition": f"d block output / d input of block {layer}, {frozen}, norms live, {how}"}
    info |= {"causal": facts.causal, "capabilities": asdict(facts)}
    return Mixing(tuple(named), **found, maps=maps, tokens=batch, positions=positions, sinks=own, info=info)


def indices(
    stream: Stream,
    squares: Float[Tensor, "layer row column"],
    positions: Sequence[int],
    sinks: Sequence[int],
    *,
    causal: bool,
) -> dict[str, Float[Tensor, " layer"]]:
    """The three indices of one sequence, as means over its measured rows that are no sink."""
    at = torch.tensor(positions)
    is_sink = torch.tensor([p in sinks for p in positions])
    norms = stream.start[at.to(stream.start.device)].double().square().sum(-1).cpu()
    size = stream.outputs[:, at.to(stream.start.device)].double().norm(dim=-1).cpu()
    everyone = [p for p in range(stream.start.shape[0]) if p not in sinks]
    rows: dict[str, list[Tensor]] = {name: [] for name in INDICES}
    for r, i in enumerate(positions):
        if i < 1 or bool(is_sink[r]):
            continue
        others = ~is_sink & (at != i) & ((at < i) if causal else torch.ones_like(is_sink))
        whole = sum(p != i and (p < i or not causal) for p in everyone)
        if whole and not bool(others.any()):
            continue
        scale = whole / max(int(others.sum()), 1)
        line = squares[:, r].double()
        mixed = line[:, others].sum(-1) * scale
        through = line[:, is_sink].sum(-1)
        rows["mix"].append(mixed / (mixed + line[:, r]))
        rows["via_sink"].append(through / (through + mixed + line[:, r]))
        rows["spread"].append(((line[:, others] * norms[others]).sum(-1) * scale).sqrt() / size[:, r])
    return {name: torch.stack(values).mean(0) for name, values in rows.items()}


def _squares(
    stream: Stream, positions: Sequence[int], exact: bool, count: int, seed: int, chunk: int
) -> Float[Tensor, "layer row column"]:
    rows = list(positions)
    if exact:
        blocks = [exact_block(stream, j, chunk=chunk)[:, rows].double().square().sum((-2, -1)).cpu() for j in positions]
        return torch.stack(blocks, -1)
    step = max(1, chunk // count)  # columns at once: no more probes are held than are averaged next
    parts = [
        probed_squares(stream, positions[n : n + step], count=count, seed=seed, chunk=chunk)[:, :, rows].mean(0)
        for n in range(0, len(positions), step)
    ]
    return torch.cat(parts, -1)


def _conditions(hooks: Mapping[str, Sequence[Any]] | Sequence[Any] | None) -> dict[str, Sequence[Any]]:
    if hooks is None:
        return {BASE: []}
    if not isinstance(hooks, Mapping):
        return {BASE: [], "edited": hooks}
    if BASE in hooks:
        raise BadInputError(f"the label {BASE!r} is taken: the model without hooks is always measured")
    return {BASE: [], **hooks}


def _sinks(sinks: SinkMap | Sequence[int], batch: Tokens) -> tuple[tuple[int, ...], ...]:
    lengths = [int(n) for n in batch.lengths.tolist()]
    if isinstance(sinks, SinkMap):
        if sinks.tokens.digest != batch.digest:
            raise BadInputError("sinks must be those of these very tokens")
        found = [tuple(sorted(set(sinks.positions(b)))) for b in range(len(batch))]
    else:
        found = [tuple(sorted(set(sinks))) for _ in lengths]
    for b, (own, length) in enumerate(zip(found, lengths, strict=True)):
        if any(not 0 <= p < length for p in own):
            raise BadInputError(f"sinks {own} are out of range: sequence {b} has {length} tokens")
        if length - len(own) < 2:
            raise BadInputError(f"sequence {b} has fewer than two tokens that are no sink: nothing can mix")
    return tuple(found)


def _drawn(length: int, sinks: Sequence[int], most: int, draw: torch.Generator) -> tuple[int, ...]:
    """The sinks, the last token, and at most ``most`` others."""
    free = [p for p in range(length - 1) if p not in sinks]
    if len(free) + 1 > most:
        order = torch.randperm(len(free), generator=draw)[: most - 1].tolist()
        free = [free[i] for i in order]
    return tuple(sorted({*free, *sinks, length - 1}))
