"""``TwoByTwo`` and ``Claims``: does a sink act through its key or through its value, and is it a bias?

``o(K, V) = (1 - sigma K) o_R + sigma V o_S``, f = the metric of the whole model::

    mass part   phi_K = ((f10 - f00) + (f11 - f01)) / 2       value part phi_V = ((f01 - f00) + (f11 - f10)) / 2
    interaction f11 - f10 - f01 + f00                         phi_K + phi_V = f11 - f00

(1, 1) is the model itself, (0, 0) ``renormalize``, (1, 0) ``zero``, (0, 1) ``value_only``. A negative part lowers the
loss: the model is better for having it. (0, 1) is off-manifold (weights sum to 1 + sigma).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.ablate.partition import Mode
from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.validation import public_methods
from sinklens.show.notebook import ShownInJupyter

CELLS: tuple[Mode, ...] = ("renormalize", "zero", "value_only")
PARTS = ("mass_part", "value_part", "interaction", "total")
MARGIN = 0.1  # of renormalize's effect: within it an edit "keeps" the metric
Key = int | str | tuple[int, int]


def shapley(cells: Float[Tensor, "3 *any"]) -> dict[str, Float[Tensor, "*any"]]:
    """The four parts from the changes of the metric in the cells (0,0), (1,0), (0,1), in the order of ``CELLS``."""
    f00, f10, f01 = cells
    return {
        "mass_part": ((f10 - f00) - f01) / 2,
        "value_part": ((f01 - f00) - f10) / 2,
        "interaction": f00 - f10 - f01,
        "total": -f00,
    }


@public_methods
@dataclass(frozen=True, eq=False)
class TwoByTwo(ShownInJupyter):
    """The 2x2 of every key: all heads at once, every layer, or every (layer, head).

    Attributes:
        scope: "all", "layer" or "head".
        keys: ("all",), layers, or (layer, head) pairs.
        values: by metric, the change from the unedited model in each cell: [cell, key, batch]; NaN where a sequence
            has nothing to edit.
        exact: whether a key was measured, or estimated to first order.
        documents: of each sequence.
        length: the longest sequence, in tokens.
        together: the same for all keys at once, on the same predictions: [cell, batch].
    """

    scope: str
    keys: tuple[Key, ...]
    values: dict[str, Float[Tensor, "cell key batch"]]
    together: dict[str, Float[Tensor, "cell batch"]]
    exact: Bool[Tensor, " key"]
    documents: tuple[int, ...]
    length: int

    def __repr__(self) -> str:
        return f"TwoByTwo by {self.scope}: {', '.join(self.values)} over {len(self.documents)} sequence(s)"

    def part(self, metric: str, name: str) -> Float[Tensor, "key batch"]:
        """One of ``mass_part``, ``value_part``, ``interaction``, ``total``, per sequence."""
        if metric not in self.values:
            raise BadInputError(f"no metric {metric!r}; there are {', '.join(self.values)}")
        parts = shapley(self.values[metric].double())
        if name not in parts:
            raise BadInputError(f"no part {name!r}; there are {', '.join(parts)}")
        return parts[name]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per metric and key: the parts with 95 % intervals over documents (16 or more, else NaN).

        ``mass_share`` is the mass part's share of the total where the total's interval excludes 0 and both parts have
        its sign, else NaN.
        """
        rows = []
        for metric in self.values:
            for k, key in enumerate(self.keys):
                row: dict[str, Any] = {"metric": metric}
                row |= {"layer": key[0], "head": key[1]} if isinstance(key, tuple) else {self.scope: key}
                row["exact"] = bool(self.exact[k])
                for name in PARTS:
                    values = self.part(metric, name)[k]
                    low, high = _interval(values, self.documents)
                    row |= {name: float(values.nanmean()), f"{name}_low": low, f"{name}_high": high}
                known = row["total_low"] > 0 or row["total_high"] < 0
                alike = row["mass_part"] * row["value_part"] > 0
                row["mass_share"] = row["mass_part"] / row["total"] if known and alike else math.nan
                rows.append(row)
        return pd.DataFrame(rows)

    def additive_gap(self) -> pd.DataFrame:
        """How far the parts of these keys, summed, are from the parts of all of them at once, on the same predictions.

        ``estimated``: how many of the keys entered as first-order estimates.
        """
        rows = []
        for metric in self.values:
            for name in PARTS:
                parts, direct = self.part(metric, name), shapley(self.together[metric].double())[name]
                summed = torch.where(parts.isnan().all(0), torch.nan, parts.nansum(0))
                gap = summed - direct
                low, high = _interval(gap, self.documents)
                rows.append(
                    {
                        "metric": metric,
                        "part": name,
                        "estimated": int((~self.exact).sum()),
                        "summed": float(summed.nanmean()),
                        "all_at_once": float(direct.nanmean()),
                    }
                    | {"gap": float(gap.nanmean()), "gap_low": low, "gap_high": high}
                )
        return pd.DataFrame(rows)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata, for writing."""
        meta = {
            "scope": self.scope,
            "keys": [list(k) if isinstance(k, tuple) else k for k in self.keys],
            "documents": list(self.documents),
            "length": self.length,
            "metrics": list(self.values),
        }
        both = {f"together.{name}": t for name, t in self.together.items()}
        return {**self.values, **both, "exact": self.exact}, meta

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> TwoByTwo:
        """What :meth:`parts` gave."""
        return cls(
            scope=meta["scope"],
            keys=tuple((int(k[0]), int(k[1])) if isinstance(k, list) else k for k in meta["keys"]),
            values={name: tensors[name] for name in meta["metrics"]},
            together={name: tensors[f"together.{name}"] for name in meta["metrics"]},
            exact=tensors["exact"],
            documents=tuple(meta["documents"]),
            length=meta["length"],
        )


@dataclass(frozen=True, eq=False)
class Claims(ShownInJupyter):
    """Mass, key bias, offset, parameter: four claims, each with its own test.

    Attributes:
        metric: what was measured: "loss", or "embedding" (1 - cos) for encoders.
        changes: by edit, the change from the unedited model: [batch].
        parameters, gaps: per sink, the parameter terms of the gap (all that hold b_Q or b_K) and the gap itself, means
            over the heads and layers of its life: [sink].
        documents, sink_documents: of each sequence, of each sink.
        notes: what holds by construction, or could not run.
    """

    metric: str
    changes: dict[str, Float[Tensor, " batch"]]
    parameters: Float[Tensor, " sink"]
    gaps: Float[Tensor, " sink"]
    documents: tuple[int, ...]
    sink_documents: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        return f"Claims, by {self.metric} over {len(self.documents)} sequence(s)"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per claim: what was tested, its effect with a 95 % interval over documents, and the verdict.

        ``zero``, ``zero_low``, ``zero_high``: parking the mass and writing nothing, against the unedited model.
        An edit *keeps* the metric if the interval of its effect lies within a tenth of renormalize's mean effect;
        a verdict is "supported", "contradicted" or, where the interval does not decide, "undecided"; "nothing to
        explain" where removing the sinks has no effect that can be told from 0.
        """
        whole = self.changes["renormalize"]
        low, high = _interval(whole, self.documents)
        effect = float(whole.nanmean())
        room = MARGIN * abs(effect)
        explained = low > 0 or high < 0
        rows = [
            self._row("mass effect", "renormalize - zero", whole - self.changes["zero"]),
            self._row("key bias", "fixed_key, neutral value", self.changes.get("fixed_key, neutral value")),
            self._row("constant offset", "fixed_logit", self.changes.get("fixed_logit")),
        ]
        zero = self.changes["zero"]
        zero_low, zero_high = _interval(zero, self.documents)
        rows[0] |= {"zero": float(zero.nanmean()), "zero_low": zero_low, "zero_high": zero_high}
        for row in rows:
            row |= {"removal": effect, "removal_low": low, "removal_high": high}
            keeps = row["low"] >= -room and row["high"] <= room
            breaks = row["low"] > room or row["high"] < -room
            if row["effect"] != row["effect"]:
                row["verdict"] = "not tested"
            elif low != low:
                row["verdict"] = "undecided"
            elif not explained:
                row["verdict"] = "nothing to explain"
            elif row["claim"] == "mass effect":
                helps = row["low"] > room if effect > 0 else row["high"] < -room
                against = keeps or (breaks and not helps)
                row["verdict"] = "supported" if helps else "contradicted" if against else "undecided"
            else:
                row["verdict"] = "supported" if keeps else "contradicted" if breaks else "undecided"
        return pd.DataFrame([*rows, self._parameter_row()])

    def _row(self, claim: str, test: str, values: Tensor | None) -> dict[str, Any]:
        if values is None:
            return {"claim": claim, "test": test, "effect": math.nan, "low": math.nan, "high": math.nan}
        low, high = _interval(values, self.documents)
        return {"claim": claim, "test": test, "effect": float(values.nanmean()), "low": low, "high": high}

    def _parameter_row(self) -> dict[str, Any]:
        low, high = _interval(self.parameters, self.sink_documents)
        row: dict[str, Any] = {"claim": "parameter bias", "test": "bilinear terms with b_Q or b_K, of the gap"}
        row |= {"effect": float(self.parameters.nanmean()), "low": low, "high": high}
        row["removal"] = float(self.gaps.nanmean())
        row["removal_low"], row["removal_high"] = _interval(self.gaps, self.sink_documents)
        known = ~(self.parameters + self.gaps).isnan()
        most = _interval(self.parameters - 0.5 * self.gaps, self.sink_documents)
        little = _interval(self.parameters.abs() - MARGIN * self.gaps.abs(), self.sink_documents)
        if not known.any():
            row["verdict"] = "not tested"
        elif bool((self.parameters[known] == 0).all()):  # there are no such parameters: nothing to estimate
            row["verdict"] = "contradicted"
        elif most[0] > 0 and row["removal_low"] > 0:
            row["verdict"] = "supported"
        elif little[1] < 0 and row["removal_low"] > 0:
            row["verdict"] = "contradicted"
        else:
            row["verdict"] = "undecided"
        return row

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata, for writing."""
        meta = {
            "metric": self.metric,
            "documents": list(self.documents),
            "sink_documents": list(self.sink_documents),
            "notes": list(self.notes),
        }
        tensors = {f"change.{name}": t for name, t in self.changes.items()}
        return {**tensors, "parameters": self.parameters, "gaps": self.gaps}, meta

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Claims:
        """What :meth:`parts` gave."""
        return cls(
            metric=meta["metric"],
            changes={n.removeprefix("change."): t for n, t in tensors.items() if n.startswith("change.")},
            parameters=tensors["parameters"],
            gaps=tensors["gaps"],
            documents=tuple(meta["documents"]),
            sink_documents=tuple(meta["sink_documents"]),
            notes=tuple(meta["notes"]),
        )


def _interval(values: Tensor, documents: tuple[int, ...]) -> tuple[float, float]:
    known = (~values.isnan()).nonzero().flatten().tolist()
    found = interval(values[known], [documents[i] for i in known]) if known else None
    return found if found is not None else (math.nan, math.nan)
