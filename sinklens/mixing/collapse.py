"""``measure_collapse``: do the tokens of a sequence become alike with depth (docs/definitions.md, section 6)?

Three measures of the rows X [n, d_model] of a block's output::

    residual = |X - 1 mean(X)^T|_F / |X|_F                   0: all rows are the same
    cosine   = mean over i != j of <x_i, x_j> / |x_i| |x_j|   1: all rows point the same way
    entropy  = -sum_k p_k log p_k,  p_k = s_k^2 / sum s^2     0: rank one; log min(n, d_model): as spread as can be

s: the singular values of X, so the entropy is von Neumann's of ``K / tr K``, ``K = X X^T``, in nats, not normalised.
Each is taken over the rows that are no sink first, over the same rows with norm 1 second, over all rows last: a massive
row swamps what all the others do. Source: the residual is that of Dong et al. 2021 (2103.03404) in the Frobenius norm
(theirs is composite), of which the mean row is the minimiser, relative to ``|X|_F``; entropy: Skean et al. 2025.
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
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import block_output
from sinklens.bridge.capabilities import capabilities
from sinklens.core.intervals import summary
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.forward.follow import numbered
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.mixing.conditions import Conditions, Sinks, conditions_of, sinks_of
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROWS = ("no_sink", "no_sink_unit", "all")
MEASURES = ("residual", "cosine", "entropy")
NAMES = {
    "residual": "residual: distance from one common row",
    "cosine": "cosine: mean over pairs of tokens",
    "entropy": "entropy of the matrix (nats)",
}


@public_methods
@dataclass(frozen=True, eq=False)
class Collapse(ShownInJupyter, table="_last_layer"):
    """What :func:`measure_collapse` found.

    Attributes:
        labels: the conditions; the first, "base", is the model as it is.
        values: by condition, sequence, block, rows (``ROWS``) and measure (``MEASURES``).
        tokens: the sequences.
        sinks: per sequence the sinks S.
        info: model, definition in force, where S comes from, versions.
    """

    labels: tuple[str, ...]
    values: Float[Tensor, "condition batch layer rows measure"]
    tokens: Tokens
    sinks: tuple[tuple[int, ...], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers = self.values.shape[2]
        lines = [f"Collapse of {len(self.tokens)} sequence(s) in {self.info.get('model')}, {layers} layers"]
        for c, label in enumerate(self.labels):
            means = self.values[c, :, -1, 0].double().mean(0).tolist()
            found = ", ".join(f"{name} {value:.3g}" for name, value in zip(MEASURES, means, strict=True))
            lines.append(f"  {label}: at the last layer, rows that are no sink: {found}")
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition, layer, rows and measure: the mean over sequences with its 95 % interval over documents
        (16 or more, else NaN), and for edited conditions the paired difference to base with its interval.
        """
        rows = []
        for c, label in enumerate(self.labels):
            for layer in range(self.values.shape[2]):
                for r, which in enumerate(ROWS):
                    for m, measure in enumerate(MEASURES):
                        row: dict[str, Any] = {"condition": label, "layer": layer, "rows": which, "measure": measure}
                        both = self.values[:, :, layer, r, m].double()
                        row |= summary(both[c], self.tokens.documents)
                        change = both[c] - both[0] if c else torch.full_like(both[0], math.nan)
                        rows.append(row | summary(change, self.tokens.documents, "difference"))
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """The three measures against depth over the rows that are no sink, a line per condition, with intervals where
        there are any.
        """
        return _curves(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {"values": self.values} | {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {"labels": list(self.labels), "sinks": [list(s) for s in self.sinks], "info": self.info}
        return save_tensors(path, "Collapse", tensors, meta | {"tokens": self.tokens.meta()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Collapse:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "Collapse")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            labels=tuple(meta["labels"]),
            values=tensors["values"],
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            sinks=tuple(tuple(int(p) for p in row) for row in meta["sinks"]),
            info=meta["info"],
        )


@public
def measure_collapse(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    conditions: Conditions | None = None,
    *,
    sinks: Sinks = None,
    progress: bool | None = None,
) -> Collapse:
    """How alike the tokens of each sequence are after every block, in the model as it is and under edits.

    ``residual = |X - 1 mean(X)^T|_F / |X|_F``, mean pairwise cosine, and von Neumann entropy of ``X X^T`` in nats; X:
    the block's output at the tokens that are no sink, the same with norm 1, and at all tokens. Sequences of different
    length are not comparable in entropy, whose largest value is ``log min(n, d_model)``.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences; each runs alone, without padding.
        conditions: hook lists by label, such as ``{"zero": ablate_sinks(model, sinks, "zero")}``. "base", the model
            without hooks, is always measured.
        sinks: S, left out of the first two kinds of rows: a map, or positions; default: what :func:`find_sinks` finds,
            and the first token (encoders: the special tokens) of sequences too short for that. It is the same under
            every condition.
        progress: show a bar.

    Cost: one forward per sequence and condition, and per block three eigenvalue problems of size ``min(n, d_model)`` in
    float64 on the CPU. Memory: one sequence's block outputs. Source: see the module.

    Raises:
        BadInputError: a label "base", sinks of other tokens or out of range, fewer than two tokens that are no sink.
    """
    facts = capabilities(model)
    batch = as_tokens(model, tokens).to("cpu")
    named = conditions_of(conditions or {})
    own, words = sinks_of(model, batch, sinks)
    values = torch.zeros(len(named), len(batch), facts.n_layers, len(ROWS), len(MEASURES))
    with progress_bar("collapse", len(batch) * len(named), progress) as advance:
        for b in range(len(batch)):
            one = batch[b].trim().to(str(model.cfg.device))
            kept = [p for p in range(one.ids.shape[1]) if p not in own[b]]
            for c, edit in enumerate(named.values()):
                with numbered([b]):
                    states = _outputs(model, one, edit)
                ordinary = states[:, kept]
                unit = torch.nn.functional.normalize(ordinary, dim=-1)
                values[c, b] = torch.stack([collapse_measures(x) for x in (ordinary, unit, states)], 1).float()
                advance()
    info: dict[str, Any] = {"model": facts.model, "sinklens": version("sinklens"), "sinks": words}
    info |= {"definition": "block outputs; residual |X - 1 mean|_F / |X|_F, mean pairwise cosine, entropy in nats"}
    info |= {"causal": facts.causal, "capabilities": asdict(facts)}
    return Collapse(tuple(named), values, batch, own, info)


def collapse_measures(x: Float[Tensor, "*layer row d_model"]) -> Float[Tensor, "*layer 3"]:
    """Residual, mean pairwise cosine and entropy (nats) of some rows, at least two, in float64."""
    x = x.double()
    centred = x - x.mean(-2, keepdim=True)
    residual = torch.linalg.matrix_norm(centred) / torch.linalg.matrix_norm(x)
    unit = torch.nn.functional.normalize(x, dim=-1)
    pairs = x.shape[-2] * (x.shape[-2] - 1)
    cosine = (unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))) / pairs
    smaller = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x  # both have the squared singular values of X
    squares = torch.linalg.eigvalsh(smaller).clamp(min=0)
    entropy = torch.special.entr(squares / squares.sum(-1, keepdim=True)).sum(-1)
    return torch.stack([residual, cosine, entropy], -1)


def _outputs(model: TransformerBridge, one: Tokens, edit: Sequence[Any]) -> Float[Tensor, "layer pos d_model"]:
    """The block outputs of one unpadded sequence, after the edit, in float64 on the CPU."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor[0].detach().cpu().double())

    names = [block_output(layer) for layer in range(model.cfg.n_layers)]
    run_blocks(model, one.ids, [*edit, *((name, keep) for name in names)])
    return torch.stack(kept)


def _curves(found: Collapse) -> Figure:
    from plotly.subplots import make_subplots  # plotly is slow to load

    from sinklens.show.theme import curve, escape_hover, themed  # plotly is slow to load

    table = [row for row in found.to_dataframe().to_dict("records") if row["rows"] == "no_sink"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=tuple(NAMES.values()), horizontal_spacing=0.07)
    for column, measure in enumerate(MEASURES, start=1):
        for c, label in enumerate(found.labels):
            rows = [row for row in table if (row["measure"], row["condition"]) == (measure, label)]
            curve(figure, column, c, label, rows, ("mean", "low", "high"))
    figure.update_xaxes(title="layer (block output)")
    for column in (1, 2):
        figure.update_yaxes(rangemode="tozero", col=column)
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})
    title = (
        f"How alike tokens become, {len(found.tokens)} sequence(s)<br><sup>tokens that are no sink; S: "
        f"{escape_hover(str(found.info.get('sinks')))}; bands: 95 % over documents, where there are 16</sup>"
    )
    return themed(figure, title, height=440).update_layout(margin={"t": 100})
