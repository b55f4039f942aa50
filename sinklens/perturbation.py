"""``perturbation_spread``: what the exchange of one token does to the others (docs/definitions.md, section 6).

Figure 2 of Barbero et al. 2025 (2504.02732) with many random swaps in the place of one chosen by hand::

    absolute[l,i] = |x'_i - x_i|_2        relative[l,i] = |x'_i - x_i|_2 / |x_i|_2        x: block outputs

x' is the same sequence with one token exchanged for another, so that lengths and positions stay; both x and x' are
computed under the same edit, and every condition gets the same swaps.

An edit that belongs to a SinkMap recognises its sequences by their ids, which a swap changes; built anew at the same
positions (``hooks.at``) it would act in all layers, not in those of each sink's lives. So the forward starts with the
ids that the edit knows, and the token is exchanged between the edit's own hooks and the embedding: the edit acts where,
in which layers and with which means it acts on the sequence as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.arguments import public, public_methods
from sinklens.attention import block_output
from sinklens.console import progress_bar
from sinklens.errors import BadInputError, UnsupportedModelError
from sinklens.forward import EMBED
from sinklens.jupyter import ShownInJupyter
from sinklens.mixing_setup import Conditions, Places, Sinks, conditions_of, sinks_of
from sinklens.proof import capabilities
from sinklens.results import load_tensors, save_tensors
from sinklens.running import run_blocks
from sinklens.statistics import summary
from sinklens.tokens import Tokens, as_tokens
from sinklens.vocabulary import vocabulary

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SWAPS = 100
MOST_ROWS = 8  # swaps of a sequence in one forward, beside the sequence itself
MOST_TOKENS = 4096  # in one forward, since patterns grow with their product with the length
TOLERANCE = 1e-4
Swap = tuple[int, int, int, int]


@public_methods
@dataclass(frozen=True, eq=False)
class Perturbation(ShownInJupyter, table="_last_layer"):
    """What :func:`perturbation_spread` found.

    Attributes:
        labels: the conditions; the first, "base", is the model as it is.
        absolute, relative: change of each token's block output per swap; NaN past the end of a sequence and, in causal
            models, before the token that is exchanged, where nothing can change.
        swaps: (sequence, position, old id, new id).
        tokens: the sequences, before any swap.
        sinks: per sequence the sinks S.
        info: model, definition in force, where S comes from, seed, labels of the new tokens, versions.
    """

    labels: tuple[str, ...]
    absolute: Float[Tensor, "condition swap layer pos"]
    relative: Float[Tensor, "condition swap layer pos"]
    swaps: tuple[Swap, ...]
    tokens: Tokens
    sinks: tuple[tuple[int, ...], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"Perturbation: {len(self.swaps)} swaps in {len(self.tokens)} sequence(s), {self.info.get('model')}"]
        means = self.by_swap(self.relative)[:, :, -1]
        for c, label in enumerate(self.labels):
            ratio = f", {float((means[c] / means[0]).nanmedian()):.3g} times base (median)" if c else ""
            lines.append(f"  {label}: mean relative change at the last layer {float(means[c].mean()):.3g}{ratio}")
        return "\n".join(lines)

    def by_swap(self, changes: Float[Tensor, "condition swap layer pos"]) -> Float[Tensor, "condition swap layer"]:
        """The mean of ``absolute`` or ``relative`` over the tokens after the exchanged one (encoders: all others) that
        are no sink.
        """
        if changes.shape != self.absolute.shape:
            raise BadInputError(f"changes must be {list(self.absolute.shape)}, got {list(changes.shape)}")
        counted = torch.zeros(len(self.swaps), 1, changes.shape[-1], dtype=torch.bool)
        for n, (b, p, _, _) in enumerate(self.swaps):
            counted[n, 0, _others(p, int(self.tokens.lengths[b]), self.sinks[b], self.info["causal"])] = True
        return torch.where(counted, changes.double(), 0).sum(-1) / counted.sum(-1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition and layer, over swaps of :meth:`by_swap`'s means of the relative change.

        ``mean`` with its 95 % interval ``low``, ``high`` over documents (16 or more, else NaN); for edited conditions,
        paired with base, ``log_ratio``: the mean over swaps of ``log(condition / base)``, with its interval, and of the
        ratio ``median_ratio``, ``ratio_5`` and ``ratio_95`` (quantiles over swaps). ``absolute_...``: the same of the
        absolute change. Swaps without any effect have no ratio and are left out of it.
        """
        documents = [self.tokens.documents[b] for b, _, _, _ in self.swaps]
        kinds = {"": self.by_swap(self.relative), "absolute_": self.by_swap(self.absolute)}
        rows = []
        for c, label in enumerate(self.labels):
            for layer in range(self.relative.shape[2]):
                row: dict[str, Any] = {"condition": label, "layer": layer, "swaps": len(self.swaps)}
                for start, means in kinds.items():
                    found = summary(means[c, :, layer], documents)
                    ratio = means[c, :, layer] / means[0, :, layer] if c else torch.full((len(self.swaps),), math.nan)
                    found |= summary(ratio.log(), documents, "log_ratio")
                    known = ratio[ratio.log().isfinite()].double()
                    for name, share in (("median_ratio", 0.5), ("ratio_5", 0.05), ("ratio_95", 0.95)):
                        found[name] = float(known.quantile(share)) if len(known) else math.nan
                    row |= {f"{start}{name}": value for name, value in found.items()}
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Over depth the mean relative change with its interval, and its ratio to base: median, 5 to 95 % of swaps."""
        from plotly.subplots import make_subplots

        from sinklens.plots import INK, curve, themed

        table = self.to_dataframe().to_dict("records")
        titles = ("relative change of other tokens", "times base: median, 5 to 95 % of swaps")[: len(self.labels)]
        figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.08)
        for c, label in enumerate(self.labels):
            rows: list[dict[Any, Any]] = [row for row in table if row["condition"] == label]
            curve(figure, 1, c, label, rows, ("mean", "low", "high"))
            if c:
                curve(figure, 2, c, label, rows, ("median_ratio", "ratio_5", "ratio_95"))
        figure.update_yaxes(rangemode="tozero", col=1)
        if len(titles) > 1:
            dots = {"color": INK, "width": 1, "dash": "dot"}
            figure.add_shape(type="line", x0=0, x1=1, xref="x2 domain", y0=1, y1=1, yref="y2", line=dots)
            figure.update_yaxes(type="log", col=2)
        figure.update_xaxes(title="layer (block output)")
        figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})
        title = f"How far the exchange of one token spreads, {len(self.swaps)} swaps in {len(self.tokens)} sequence(s)"
        return themed(figure, f"{title}<br><sup>means over tokens that are no sink</sup>", height=440)

    def plot_swap(self, n: int = 0) -> Figure:
        """One swap as in the paper's Figure 2: the relative change, layer by token, a panel per condition.

        Raises:
            BadInputError: no such swap.
        """
        from plotly.subplots import make_subplots

        from sinklens.plots import SCALE, escape_hover, themed

        if not 0 <= n < len(self.swaps):
            raise BadInputError(f"swap {n} is out of range: there are {len(self.swaps)}, numbered from 0")
        b, p, _, _ = self.swaps[n]
        words = [escape_hover(repr(label)[1:-1]) for label in self.tokens.labels[b]]
        new = escape_hover(repr(self.info["new_labels"][n])[1:-1])
        others = _others(p, len(words), self.sinks[b], self.info["causal"])
        most = float(self.relative[:, n][..., others].double().quantile(0.99))
        shown = [escape_hover(label) for label in self.labels]
        height = 190 + len(shown) * max(150, 6 * self.relative.shape[2])
        figure = make_subplots(
            rows=len(shown), cols=1, subplot_titles=shown, shared_xaxes=True, vertical_spacing=34 / height
        )
        hover = [f"position {i}: {word}" + " (sink)" * (i in self.sinks[b]) for i, word in enumerate(words)]
        text = "%{text}<br>layer %{y}: %{z:.3g}<extra></extra>"
        for row, z in enumerate(self.relative[:, n, :, : len(words)].tolist(), start=1):
            figure.add_heatmap(z=z, text=[hover] * len(z), hovertemplate=text, coloraxis="coloraxis", row=row, col=1)
        first = p if self.info["causal"] else 0
        step = math.ceil((len(words) - first) / 64)
        ticks = list(range(first + (p - first) % step, len(words), step))
        names = [f"<b>{words[i]} → {new}</b>" if i == p else words[i] for i in ticks]
        bounds = [first - 0.5, len(words) - 0.5]
        figure.update_xaxes(tickvals=ticks, ticktext=names, tickangle=-60, range=bounds, showgrid=False, zeroline=False)
        figure.update_yaxes(title="layer", showgrid=False, zeroline=False)
        bar = {"title": "|x' - x| / |x|", "outlinewidth": 0}
        figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": most, "colorbar": bar})
        title = f"What one token changes: {escape_hover(self.tokens.sources[b])}, position {p}: {words[p]} → {new}"
        under = "<br><sup>relative change of block outputs; colours saturate at the 99 % quantile of other tokens</sup>"
        return themed(figure, title + under, height=height).update_layout(margin={"t": 110})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {"absolute": self.absolute, "relative": self.relative}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {"labels": list(self.labels), "swaps": [list(s) for s in self.swaps], "info": self.info}
        meta |= {"sinks": [list(s) for s in self.sinks], "tokens": self.tokens.meta()}
        return save_tensors(path, "Perturbation", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Perturbation:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "Perturbation")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            labels=tuple(meta["labels"]),
            absolute=tensors["absolute"],
            relative=tensors["relative"],
            swaps=tuple((int(b), int(p), int(old), int(new)) for b, p, old, new in meta["swaps"]),
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            sinks=tuple(tuple(int(p) for p in row) for row in meta["sinks"]),
            info=meta["info"],
        )


@public
def perturbation_spread(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    conditions: Conditions | None = None,
    *,
    sinks: Sinks = None,
    n_swaps: int = SWAPS,
    swaps: Sequence[tuple[int, int, int]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Perturbation:
    """How far the exchange of one token spreads, in the model as it is and under edits, by the same swaps.

    Per block l and token i ``|x'_i - x_i|_2``, and the same over ``|x_i|_2``; x, x': block outputs of the sequence as
    it is and with one token exchanged, both under the same edit.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences; each runs without padding.
        conditions: hook lists by label, such as ``{"zero": ablate_sinks(model, sinks, "zero")}``. "base", the model
            without hooks, is always measured. Hooks that look at ids see those before the swap.
        sinks: S, whose tokens are neither exchanged nor averaged over: a map, or positions; default: what
            :func:`find_sinks` finds, and the first token (encoders: the special ones) of sequences too short for that.
        n_swaps: how many random swaps, taking the sequences in turn: a position of 1 to T - 2 that is no sink and no
            special token, each once before any twice, and another id, drawn from the ordinary tokens of the whole batch
            that are no sink, as often as they occur.
        swaps: (sequence, position, new id), in the place of random ones.
        seed: of the draws.
        progress: show a bar.

    Cost: per sequence and condition one forward of up to 9 rows for every 8 of its swaps (fewer in sequences of more
    than 512 tokens), and two forwards as a probe. Memory: one block's output of those rows, and the result: two floats
    per condition, swap, block and position. Source: Barbero et al. 2025, figure 2.

    Raises:
        BadInputError: a label "base", sinks of other tokens, no swap, a sequence too short to have one, or a swap that
            is out of range, at a sink or special token, or changes nothing.
        UnsupportedModelError: the host embeds ids that hooks at the embedding do not see.
    """
    facts = capabilities(model)
    batch = as_tokens(model, tokens).to("cpu")
    named = conditions_of(conditions or {})
    own, words = sinks_of(model, batch, sinks)
    if swaps is None:
        chosen = _drawn(batch, own, facts.causal, n_swaps, seed)
    else:
        chosen = _checked(batch, own, facts.causal, swaps, facts.vocabulary)
    chunks = _chunks(chosen, batch)
    _probe(model, batch, chosen[0])
    shape = (len(named), len(chosen), facts.n_layers, int(batch.lengths.max()))
    absolute, relative = torch.full(shape, math.nan), torch.full(shape, math.nan)
    with progress_bar("swaps", len(chunks) * len(named), progress) as advance:
        for numbers in chunks:
            group = [chosen[n] for n in numbers]
            ids = batch.row(group[0][0])[None].to(model.cfg.device)
            for c, edit in enumerate(named.values()):
                changes, norms = swap_changes(model, ids, edit, group)
                for n, (_, p, _, _), change in zip(numbers, group, changes, strict=True):
                    seen = slice(p if facts.causal else 0, ids.shape[1])
                    absolute[c, n, :, seen] = change[:, seen].float()
                    relative[c, n, :, seen] = (change / norms)[:, seen].float()
                advance()
    info: dict[str, Any] = {"model": facts.model, "sinklens": version("sinklens"), "sinks": words, "seed": seed}
    info |= {"definition": "change of block outputs by the swap of one token; relative: over the unswapped norm"}
    info |= {"new_labels": list(vocabulary(model).labels([new for _, _, _, new in chosen]))}
    info |= {"causal": facts.causal, "drawn": swaps is None, "capabilities": asdict(facts)}
    return Perturbation(tuple(named), absolute, relative, chosen, batch, own, info)


def swap_changes(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], edit: Sequence[Any], swaps: Sequence[Swap]
) -> tuple[Float[Tensor, "swap layer pos"], Float[Tensor, "layer pos"]]:
    """``|x'_i - x_i|`` for swaps of one sequence, and ``|x_i|``, under an edit, in float64.

    The sequence as it is runs as the first row of the same forward, so that what a swap cannot reach does not change.
    """
    changes: list[Tensor] = []
    norms: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        x = tensor.detach().cpu().double()
        changes.append((x[1:] - x[0]).norm(dim=-1))
        norms.append(x[0].norm(dim=-1))

    outputs = [(block_output(layer), keep) for layer in range(model.cfg.n_layers)]
    run_blocks(model, ids.expand(1 + len(swaps), -1), [*edit, (EMBED, _exchange(swaps)), *outputs])
    return torch.stack(changes, 1), torch.stack(norms)


def _exchange(swaps: Sequence[Swap]) -> Any:
    """The hook that exchanges a token in every row but the first."""

    def hook(ids: Tensor, hook: Any) -> Tensor:
        new = ids.clone()
        for row, (_, position, _, token) in enumerate(swaps, start=1):
            new[row, position] = token
        return new

    return hook


def _probe(model: TransformerBridge, batch: Tokens, swap: Swap) -> None:
    """Refuse a host whose blocks see ids in another way than through the embedding's input."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor.detach().cpu().double())

    ids = batch.row(swap[0]).to(model.cfg.device).expand(2, -1)
    exchange = _exchange([swap])
    last = (block_output(model.cfg.n_layers - 1), keep)
    run_blocks(model, ids, [(EMBED, exchange), last])
    run_blocks(model, exchange(ids, None), [last])
    if not (kept[0] - kept[1]).abs().max() <= TOLERANCE * (1 + kept[1].abs().max()):
        raise UnsupportedModelError(
            f"{capabilities(model).model}: a token that is exchanged at {EMBED} is not exchanged everywhere, so swaps "
            f"under edits cannot be measured. Please report this architecture"
        )


def _others(position: int, length: int, sinks: Sequence[int], causal: bool) -> list[int]:
    first = position + 1 if causal else 0
    return [i for i in range(first, length) if i != position and i not in sinks]


def _refusal(batch: Tokens, b: int, position: int, sinks: Sequence[int], causal: bool) -> str:
    """Why a token cannot be exchanged; empty where it can."""
    length = int(batch.lengths[b])
    if not 1 <= position <= length - 2:
        return f"is out of range: positions 1 to {length - 2} of its {length} tokens can be exchanged"
    if position in sinks:
        return "is a sink, and S must stay as it is; choose another position, or other sinks="
    if bool(batch.special[b][batch.mask[b]][position]):
        return "is a special token; choose an ordinary one"
    if not _others(position, length, sinks, causal):
        return "has no token after it that is no sink, so there is nothing to measure; choose an earlier position"
    return ""


def _drawn(batch: Tokens, sinks: Places, causal: bool, n_swaps: int, seed: int) -> tuple[Swap, ...]:
    if n_swaps < 1:
        raise BadInputError(f"n_swaps must be at least 1, got {n_swaps}")
    draw = torch.Generator().manual_seed(seed)
    rows = [batch.row(b).tolist() for b in range(len(batch))]
    special = [batch.special[b][batch.mask[b]].tolist() for b in range(len(batch))]
    pool = [i for b, row in enumerate(rows) for p, i in enumerate(row) if not (special[b][p] or p in sinks[b])]
    orders = []
    for b, row in enumerate(rows):
        free = [p for p in range(len(row)) if not _refusal(batch, b, p, sinks[b], causal)]
        if not free:
            raise BadInputError(
                f"sequence {b} ({batch.sources[b]}, {len(row)} tokens) is too short: a swap needs an ordinary token "
                f"that is no sink, neither first nor last, and another one after it; give longer sequences"
            )
        orders.append([free[i] for i in torch.randperm(len(free), generator=draw).tolist()])
    found = []
    for n in range(n_swaps):
        turn, b = divmod(n, len(rows))
        p = orders[b][turn % len(orders[b])]
        others = [i for i in pool if i != rows[b][p]]
        if not others:
            raise BadInputError("all ordinary tokens of these sequences are the same, so a swap would change nothing")
        found.append((b, p, rows[b][p], others[int(torch.randint(len(others), (1,), generator=draw))]))
    return tuple(found)


def _checked(
    batch: Tokens, sinks: Places, causal: bool, swaps: Sequence[tuple[int, int, int]], vocabulary: int
) -> tuple[Swap, ...]:
    if not swaps:
        raise BadInputError("swaps is empty: give at least one (sequence, position, new id), or leave it out")
    found = []
    for b, p, new in swaps:
        if not 0 <= b < len(batch):
            raise BadInputError(f"swap {(b, p, new)}: sequence {b} is out of range: there are {len(batch)}")
        reason = _refusal(batch, b, p, sinks[b], causal)
        if reason:
            raise BadInputError(f"swap {(b, p, new)}: position {p} of sequence {b} {reason}")
        old = int(batch.row(b)[p])
        if not 0 <= new < vocabulary:
            raise BadInputError(f"swap {(b, p, new)}: id {new} is outside the vocabulary, 0 to {vocabulary - 1}")
        if new == old:
            raise BadInputError(f"swap {(b, p, new)}: the token there is {old} already; give another id")
        found.append((b, p, old, new))
    return tuple(found)


def _chunks(swaps: Sequence[Swap], batch: Tokens) -> list[list[int]]:
    """The numbers of the swaps that run together: of one sequence, as many as memory allows."""
    groups: dict[int, list[int]] = {}
    for n, (b, _, _, _) in enumerate(swaps):
        groups.setdefault(b, []).append(n)
    chunks = []
    for b, numbers in groups.items():
        size = max(1, min(MOST_ROWS, MOST_TOKENS // int(batch.lengths[b])))
        chunks += [numbers[n : n + size] for n in range(0, len(numbers), size)]
    return chunks
