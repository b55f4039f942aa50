"""``Sweep``: the effect of one ablation along layers, heads or doses."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Key = int | float | tuple[int, int]


@public_methods
@dataclass(frozen=True, eq=False)
class Sweep(ShownInJupyter):
    """What :func:`sinklens.sweep_ablation` found.

    Attributes:
        over, mode: what was swept.
        keys: the layers, heads, (layer, head) pairs or doses.
        metrics: ``loss`` (change from base) and ``kl``, mean over scored tokens: [key, batch]; NaN where a sequence
            has nothing to edit.
        base: the unedited loss: [batch].
        estimate: the first-order estimate of the change of loss: [key, batch], or None.
        tokens: the sequences.
        info: model, seed.
    """

    over: str
    mode: str
    keys: tuple[Key, ...]
    metrics: dict[str, Float[Tensor, "key batch"]]
    base: Float[Tensor, " batch"]
    estimate: Float[Tensor, "key batch"] | None
    tokens: Tokens
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        top = self.to_dataframe().sort_values("d_loss", ascending=False).head(5)
        lines = [f"Sweep of {self.mode} over {len(self.keys)} {self.over}s; the largest changes of loss:"]
        return "\n".join([*lines, *("  " + line for line in top.to_string(index=False).split("\n"))])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per key: mean change of loss and KL over sequences, 95 % intervals over 16 documents or more."""
        rows = []
        for i, key in enumerate(self.keys):
            names = {"layer": key[0], "head": key[1]} if isinstance(key, tuple) else {self.over: key}
            row: dict[str, Any] = dict(names)
            for name, column in (("loss", "d_loss"), ("kl", "kl")):
                values = self.metrics[name][i]
                low, high = self._interval(values)
                row |= {column: float(values.nanmean()), f"{column}_low": low, f"{column}_high": high}
            if self.estimate is not None:
                row["estimate"] = float(self.estimate[i].nanmean())
            rows.append(row)
        return pd.DataFrame(rows)

    def correlation(self) -> dict[str, float]:
        """Pearson and Spearman correlation, over keys, of the first-order estimate with the exact change of loss."""
        if self.estimate is None:
            raise BadInputError("this sweep has no first-order estimate: sweep_ablation(..., estimate=True)")
        both = pd.DataFrame({"exact": self.metrics["loss"].nanmean(1), "guess": self.estimate.nanmean(1)})
        return {name: float(both.exact.corr(both.guess, method=name)) for name in ("pearson", "spearman")}

    def plot(self, metric: str = "loss") -> Figure:
        """Bars over layers or heads, a map over both, a curve over doses."""
        from sinklens.experiment.figures import sweep_figure  # plotly is slow to load

        return sweep_figure(self, metric)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {f"metric.{name}": values for name, values in self.metrics.items()} | {"base": self.base}
        tensors |= {} if self.estimate is None else {"estimate": self.estimate}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {
            "over": self.over,
            "mode": self.mode,
            "keys": [list(k) if isinstance(k, tuple) else k for k in self.keys],
        }
        meta |= {"info": self.info, "tokens": self.tokens.meta()}
        return save_tensors(path, "Sweep", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sweep:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "Sweep")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            over=meta["over"],
            mode=meta["mode"],
            keys=tuple((int(k[0]), int(k[1])) if isinstance(k, list) else k for k in meta["keys"]),
            metrics={n.removeprefix("metric."): t for n, t in tensors.items() if n.startswith("metric.")},
            base=tensors["base"],
            estimate=tensors.get("estimate"),
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            info=meta["info"],
        )

    def _interval(self, values: Float[Tensor, " batch"]) -> tuple[float, float]:
        known = (~values.isnan()).nonzero().flatten().tolist()
        found = interval(values[known], [self.tokens.documents[i] for i in known]) if known else None
        return found if found is not None else (math.nan, math.nan)
