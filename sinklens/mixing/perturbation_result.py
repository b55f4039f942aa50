"""``Perturbation``: what :func:`sinklens.mixing.perturbation_spread` found, its table and its figures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import summary
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

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
            ratios = (means[c] / means[0]).double()
            known = ratios[ratios.log().isfinite()]
            ratio = f", {float(known.quantile(0.5)):.3g} times base (median)" if c and len(known) else ""
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
            counted[n, 0, others(p, int(self.tokens.lengths[b]), self.sinks[b], self.info["causal"])] = True
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
        from plotly.subplots import make_subplots  # plotly is slow to load

        from sinklens.show.theme import INK, curve, themed  # plotly is slow to load

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
        from plotly.subplots import make_subplots  # plotly is slow to load

        from sinklens.show.theme import SCALE, escape_hover, themed  # plotly is slow to load

        if not 0 <= n < len(self.swaps):
            raise BadInputError(f"swap {n} is out of range: there are {len(self.swaps)}, numbered from 0")
        b, p, _, _ = self.swaps[n]
        words = [escape_hover(repr(label)[1:-1]) for label in self.tokens.labels[b]]
        new = escape_hover(repr(self.info["new_labels"][n])[1:-1])
        rest = others(p, len(words), self.sinks[b], self.info["causal"])
        most = float(self.relative[:, n][..., rest].double().quantile(0.99))
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


def others(position: int, length: int, sinks: Sequence[int], causal: bool) -> list[int]:
    """The tokens that an exchange at a position is judged by: those that can see it and are no sink."""
    first = position + 1 if causal else 0
    return [i for i in range(first, length) if i != position and i not in sinks]
