"""``SinkDecomposition``: where a sink's score comes from, what it writes, and whether it acts by key or by value.

Numbers per (sink, layer, head); means over the queries at least 16 tokens from the sink that see it and a token that
is no sink:

========================  ==========================================================================================
``margin``                ``= gap - log_rest - peakedness - learned``: competitor-free margin, nats
``content_content`` ...   the gap by parameters: content or b_Q (with the norm's bias) times content or b_K
``distance``              by means: ``qbar R kbar``; ``key_side``: ``qbar R dk``; ``query_distance``: ``dq R kbar``;
                          ``query_specific``: ``dq R dk``. qbar, kbar: over ordinary tokens of other documents
``norm, angle,            by geometry: ``|k| cos`` of the sink against its mean over the rest
covariance``
``softcap, position``     what the softcap and ALiBi add; each split sums to the gap together with these two
``k_norm, cosine, ...``   of the sink's key, and the mean over the rest (``_rest``), after rotation
``bias_share``            ``1 - sum (sigma - sigma_qbar)^2 / sum (sigma - mean)^2``: how much of sigma's variation over
                          queries a mean query explains; unclipped; NaN where mean sigma < 0.05 or its sd < 0.02
``bias_error``            mean ``|sigma - sigma_qbar|``; ``sigma``, ``sigma_sd``: of the sink against the rest
``mass``                  mean attention on the sink; ``event_share``: of all queries after the first that see it,
                          near ones too (as in sink_anatomy), how many give it at least 0.5
``written``               mean ``|p (v - b_V) W_O|``; ``written_rest``: of all tokens that are no sink
``value_ratio``           ``|(v - b_V) W_O|`` over its mean over the rest
``stable_rank``           of the head's full output without b_V, over queries after the first
``off_manifold``          mean ``|z(0,1)| / |z|`` of the 2x2's cell "value without mass", S: the decomposed sinks of the
                          sequence that are alive in the layer
``same_elsewhere``        cosine of what it writes with what sinks of its kind write in other documents
``direction``             length of the mean over queries of the unit vectors of what all sinks together write: 1 where
                          it is the same for all queries (by construction where there is one sink)
``residual_share``        mean length of what all heads add from the sink, over the stream's (same for all heads)
``logit_target``          late layers: mean direct contribution to the right token's logit, the vocabulary's mean
                          taken away; ``logit_rms``: its root mean square over the vocabulary
========================  ==========================================================================================
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.decompose.margin import BEYOND, GEOMETRY, MEANS, PARAMETERS, SPLITS
from sinklens.decompose.summary import summary
from sinklens.decompose.two_by_two import Claims, TwoByTwo
from sinklens.find.anatomy import head_class
from sinklens.inputs.tokens import Tokens
from sinklens.residual.components import Component, component_name
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MARGIN = ("margin", "gap", "log_rest", "peakedness", "learned")
SHAPE = ("k_norm", "k_norm_rest", "cosine", "cosine_rest", "q_norm")
BIAS = ("bias_share", "bias_error", "sigma", "sigma_sd")
WRITES = (
    "mass",
    "written",
    "written_rest",
    "value_ratio",
    "event_share",
    "stable_rank",
    "off_manifold",
    "same_elsewhere",
    "residual_share",
    "logit_target",
    "logit_rms",
    "direction",
)
NUMBERS = (*MARGIN, *PARAMETERS, *MEANS, *GEOMETRY, *BEYOND, *SHAPE, *BIAS, *WRITES)


@dataclass(frozen=True)
class Subject(ShownInJupyter, table="_fields"):
    """One sink that was decomposed: where it stands, and the layers in which it is one."""

    sequence: int
    position: int
    token: str
    kind: str
    document: int
    layers: tuple[int, ...]


@public_methods
@dataclass(frozen=True, eq=False)
class SinkDecomposition(ShownInJupyter, table="means"):
    """What :func:`sinklens.decompose_sinks` found.

    Attributes:
        subjects: the sinks.
        layers: the layers that were taken apart.
        values: [sink, layer, head, number], the numbers named by ``NUMBERS``.
        key_side, rest_side: the raw gap by component of the sink's own key, and (with a minus) of the keys of the rest;
            together they sum to it: [sink, layer, head, component]. The last component is "bias", what parameters put
            there; NaN for components above the layer.
        query_side: the raw gap by component of the queries: sums to it by itself.
        components: their names, without the last.
        effects: by scope ("all", "layer", "head"): the 2x2.
        claims: the four claims' tests, all heads at once; None without effects.
        tokens: the sequences.
        notes, info: what the reader should know; model and versions.
    """

    subjects: tuple[Subject, ...]
    layers: tuple[int, ...]
    values: Float[Tensor, "sink layer head number"]
    key_side: Float[Tensor, "sink layer head component"]
    rest_side: Float[Tensor, "sink layer head component"]
    query_side: Float[Tensor, "sink layer head component"]
    components: tuple[Component, ...]
    effects: dict[str, TwoByTwo]
    claims: Claims | None
    tokens: Tokens
    notes: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.summary()

    def number(self, name: str) -> Float[Tensor, "sink layer head"]:
        """One number of every sink, layer and head."""
        if name not in NUMBERS:
            raise BadInputError(f"no number {name!r}; there are {', '.join(NUMBERS)}")
        return self.values[..., NUMBERS.index(name)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sinks here, in order of appearance."""
        return tuple(dict.fromkeys(s.kind for s in self.subjects))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per (sink, layer, head); ``alive``: the sink's life covers the layer."""
        rows = []
        for s, subject in enumerate(self.subjects):
            for n, layer in enumerate(self.layers):
                for head in range(self.values.shape[2]):
                    label = {
                        "sequence": subject.sequence,
                        "position": subject.position,
                        "token": subject.token,
                        "kind": subject.kind,
                        "layer": layer,
                        "head": head,
                        "alive": layer in subject.layers,
                    }
                    rows.append(label | dict(zip(NUMBERS, self.values[s, n, head].tolist(), strict=True)))
        return pd.DataFrame(rows)

    def heads(self, kind: str | None = None) -> pd.DataFrame:
        """One row per (layer, head): means over the sinks of a kind that are alive there, and the head's class.

        ``bias_share`` is the median, since it has no lower bound; ``sinks`` counts them.
        """
        self._check_kind(kind)
        table = self.to_dataframe()
        table = table[table.alive & ~table.margin.isna() & ((table.kind == kind) if kind else True)]
        rows = []
        for place, group in table.groupby(["layer", "head"]):
            layer, head = place if isinstance(place, tuple) else (place, 0)
            means = group[list(NUMBERS)].mean().to_dict()
            means["bias_share"] = group.bias_share.median()
            columns = (group[name].tolist() for name in ("event_share", "value_ratio", "stable_rank"))
            classes = [head_class(*row) for row in zip(*columns, strict=True)]
            common = max(sorted(set(classes)), key=classes.count)
            rows.append({"layer": layer, "head": head, "sinks": len(group), "class": common, **means})
        return pd.DataFrame(rows, columns=pd.Index(["layer", "head", "sinks", "class", *NUMBERS]))

    def component_table(self, side: Literal["key", "rest", "query"] = "key", kind: str | None = None) -> pd.DataFrame:
        """One row per (layer, component): its part of the gap in nats, mean over heads and the sinks alive there.

        ``side``: "key" (what stands in the sink's own key), "rest" (minus what stands in the other keys) or "query"
        (what stands in the queries). "key" and "rest" of a layer sum to the raw gap, and so does "query". ``low`` and
        ``high``: 95 % interval over documents; ``sinks``: how many have queries far enough.
        """
        sides = {"key": self.key_side, "rest": self.rest_side, "query": self.query_side}
        self._check_kind(kind)
        values = sides[side]
        names = [*(component_name(c) for c in self.components), "bias"]
        rows = []
        for n, layer in enumerate(self.layers):
            known = ~self.number("margin")[:, n, 0].isnan()
            chosen = [s for s in self._alive(layer, kind) if bool(known[s])]
            if not chosen:
                continue
            parts = values[chosen, n].double().mean(1)
            documents = [self.subjects[s].document for s in chosen]
            for c, name in enumerate(names):
                if not parts[:, c].isnan().all():
                    low, high = interval(parts[:, c], documents) or (float("nan"), float("nan"))
                    mean = float(parts[:, c].mean())
                    rows.append({"layer": layer, "component": name, "nats": mean, "low": low, "high": high})
                    rows[-1]["sinks"] = len(chosen)
        return pd.DataFrame(rows, columns=pd.Index(["layer", "component", "nats", "low", "high", "sinks"]))

    def _check_kind(self, kind: str | None) -> None:
        if kind is not None and kind not in self.kinds:
            raise BadInputError(f"no sinks of kind {kind!r} here; there are {', '.join(self.kinds)}")

    def _alive(self, layer: int, kind: str | None) -> list[int]:
        return [s for s, u in enumerate(self.subjects) if layer in u.layers and kind in (None, u.kind)]

    def means(self, kind: str | None = None) -> pd.DataFrame:
        """One row per number: mean over the sinks of a kind (each over its heads and layers), with 95 % intervals.

        The bias share is left to :meth:`heads`: it has no lower bound, so means of it say little.
        """
        self._check_kind(kind)
        rows = []
        for name in NUMBERS:
            if name == "bias_share":
                continue
            per_sink, documents = [], []
            for s, subject in enumerate(self.subjects):
                layers = [n for n, layer in enumerate(self.layers) if layer in subject.layers]
                if kind in (None, subject.kind) and layers:
                    value = self.number(name)[s, layers].double().nanmean()
                    if value == value:
                        per_sink.append(value)
                        documents.append(subject.document)
            if per_sink:
                stacked = torch.stack(per_sink)
                low, high = interval(stacked, documents) or (float("nan"), float("nan"))
                rows.append({"number": name, "mean": float(stacked.mean()), "low": low, "high": high})
        return pd.DataFrame(rows, columns=pd.Index(["number", "mean", "low", "high"]))

    def summary(self) -> str:
        """What the numbers say, in words; a verdict only where the intervals carry it."""
        return summary(self)

    def plot(self, what: str = "gap", *, split: str = "means", kind: str | None = None, metric: str = "loss") -> Figure:
        """``"gap"``: contributions to the gap of every head, stacked, by ``split`` ("means", "parameters", "geometry").

        ``"components"``: layer x component map of what stands in the sink's own key; ``"plane"``: mass part against
        value part, a dot per head (or layer, where heads were not measured); ``"parts"``: both, of all heads at once.
        """
        from sinklens.decompose import figures as decompose_plots  # plotly is slow to load

        if what == "gap" and split in SPLITS:
            return decompose_plots.gap_bars(self, split, kind)
        if what == "components":
            return decompose_plots.component_map(self, kind)
        if what == "plane":
            return decompose_plots.plane(self, metric)
        if what == "parts":
            return decompose_plots.parts(self)
        raise BadInputError(
            f"plot() draws 'gap' (split={', '.join(SPLITS)}), 'components', 'plane' or 'parts'; got {what!r}, {split!r}"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {name: getattr(self, name) for name in ("values", "key_side", "rest_side", "query_side")}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta: dict[str, Any] = {
            "subjects": [asdict(s) for s in self.subjects],
            "layers": list(self.layers),
            "components": [list(c) for c in self.components],
            "tokens": self.tokens.meta(),
            "notes": list(self.notes),
            "info": self.info,
            "effects": {},
            "claims": None,
        }
        for scope, effect in self.effects.items():
            more, meta["effects"][scope] = effect.parts()
            tensors |= {f"effects.{scope}.{name}": t for name, t in more.items()}
        if self.claims is not None:
            more, meta["claims"] = self.claims.parts()
            tensors |= {f"claims.{name}": t for name, t in more.items()}
        return save_tensors(path, "SinkDecomposition", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SinkDecomposition:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "SinkDecomposition")

        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        return cls(
            subjects=tuple(Subject(**{**s, "layers": tuple(s["layers"])}) for s in meta["subjects"]),
            layers=tuple(meta["layers"]),
            values=_widened(tensors["values"]),
            key_side=tensors["key_side"],
            rest_side=tensors["rest_side"],
            query_side=tensors["query_side"],
            components=tuple((str(a), int(b)) for a, b in meta["components"]),
            effects={
                scope: TwoByTwo.from_parts(under(f"effects.{scope}."), content)
                for scope, content in meta["effects"].items()
            },
            claims=None if meta["claims"] is None else Claims.from_parts(under("claims."), meta["claims"]),
            tokens=Tokens.from_parts(under("tokens."), meta["tokens"]),
            notes=tuple(meta["notes"]),
            info=meta["info"],
        )


def _widened(values: Tensor) -> Float[Tensor, "sink layer head number"]:
    """Numbers that a file of an earlier version does not hold are NaN."""
    return torch.nn.functional.pad(values, (0, len(NUMBERS) - values.shape[-1]), value=torch.nan)
