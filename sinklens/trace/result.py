"""``SinkTrace``: who writes each sink, who erases it, and what happens when they do not."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.find.lifetimes import Kind
from sinklens.find.sinkmap import Sink, sink_from_json
from sinklens.inputs.tokens import Tokens
from sinklens.residual.components import Component, component_name
from sinklens.show.notebook import ShownInJupyter
from sinklens.trace.circuit import circuit
from sinklens.trace.phases import Phase, Traced

if TYPE_CHECKING:
    import networkx as nx
    from plotly.graph_objects import Figure

    from sinklens.find.scores import SinkScores
    from sinklens.trace.neurons import Neurons

FALL = 1.0  # nats that the competitor-free margin falls when a writer's output is replaced
CONTROL = 0.1  # nats that no control may move it


@public_methods
@dataclass(frozen=True, eq=False)
class SinkTrace(ShownInJupyter, table="writers"):
    """What :func:`sinklens.trace_sinks` found.

    Attributes:
        traced: one entry per phase of each sink's life.
        causes: one row per replacement, see :meth:`effects`.
        primaries: one entry per sequence with a primary and written secondary sinks: the primary's attention and
            competitor-free margin by layer, as it is and with the secondary sinks' writers replaced at them.
        sinks: the map's sinks.
        tokens: the sequences.
        notes, info: what the reader should know; model and versions.
    """

    traced: tuple[Traced, ...]
    causes: tuple[dict[str, Any], ...]
    sinks: tuple[Sink, ...]
    tokens: Tokens
    primaries: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"SinkTrace of {len({t.sink for t in self.traced})} sink(s), {len(self.traced)} phase(s)"]
        for row in self.writers().to_dict("records")[:12]:
            proof = "" if row["proven"] is None else ", proven" if row["proven"] else ", not proven"
            lines.append(
                f"  sequence {row['sequence']}, position {row['position']} {row['token']!r} ({row['kind']}, layers "
                f"{row['onset']} to {row['end']}): {row['writer']} writes {row['share']:.2f}{proof}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per (phase, component): ``contribution`` along u, ``share``, the running sum, and whether it writes
        before the reference layer; ``cosine`` with u and ``norm`` of what it adds, and their means over tokens of the
        same id that are no sink. Token and position embeddings are one component, "embed".
        """
        columns = ["sequence", "position", "token", "kind", "phase", "reference", "component", "layer", "contribution"]
        columns += ["share", "cumulative", "before", "cosine", "norm", "same_id_cosine", "same_id_norm"]
        rows = []
        for one in self.traced:
            running = 0.0
            embedded = sum(float(x) for c, x in zip(one.components, one.contributions, strict=True) if c[1] < 0)
            amounts = [(("embed", -1), embedded, True)]
            known = zip(one.components, one.contributions.tolist(), one.before.tolist(), strict=True)
            amounts += [(c, x, early) for c, x, early in known if c[1] >= 0]
            for (kind, layer), amount, early in amounts:
                running += amount
                rows.append(
                    self._label(one)
                    | {"reference": one.phase.reference, "component": kind, "layer": layer, "contribution": amount}
                    | {"share": amount / one.projection, "cumulative": running, "before": early}
                    | self._alignment(one, (kind, layer))
                )
        return pd.DataFrame(rows, columns=pd.Index(columns))

    @staticmethod
    def _alignment(one: Traced, component: Component) -> dict[str, float]:
        names = ("cosine", "norm", "same_id_cosine", "same_id_norm")
        if component not in one.components:  # the embeddings, summed
            return dict.fromkeys(names, math.nan)
        at = one.components.index(component)
        values = (one.cosines, one.norms, one.same_cosines, one.same_norms)
        return {name: float(tensor[at]) for name, tensor in zip(names, values, strict=True)}

    @staticmethod
    def _label(one: Traced) -> dict[str, Any]:
        return {
            "sequence": one.sequence,
            "position": one.position,
            "token": one.token,
            "kind": one.kind,
            "phase": one.number,
        }

    def effects(self) -> pd.DataFrame:
        """One row per replacement.

        ``at``: "sink", "all sinks", "random layer" or "random token" (controls); ``margin``, ``alpha``, ``beta``: means
        over the phase's layers behind the component, ``d_``: change from the clean run; ``d_margin_after``: in the
        three layers behind the phase; ``life``: active layers from the phase's onset on (to three behind its end; with
        doses, to the last); ``rho``: of the stream at the reference layer; ``d_loss`` where it was asked for.
        """
        rows = []
        by = {(t.sink, t.number): t for t in self.traced}
        for row in self.causes:
            one = by[row["trace"], row["phase"]]
            if row["at"]:
                rows.append(self._label(one) | {k: v for k, v in row.items() if k not in ("trace", "phase")})
        return pd.DataFrame(rows)

    def writers(self) -> pd.DataFrame:
        """One row per (phase, writer by share): share, fall of the margin, controls, and whether it is proven.

        ``proven``: share >= 0.25, the competitor-free margin falls by 1 nat or more when its output is replaced by that
        of tokens of the same id, and both controls stay below 0.1 nat; None without ``causal``.
        """
        rows = []
        for one in self.traced:
            mine = [r for r in self.causes if (r["trace"], r["phase"]) == (one.sink, one.number)]
            named = one.writers()
            for component, share in one.shares():
                if component not in named:
                    continue
                fall = self._effect(mine, component, "sink", "same_id")
                layer = [
                    r["d_margin"] for r in mine
                    if r["at"] == "random layer" and r["replacement"].endswith(component_name(component))
                ]  # fmt: skip
                token = self._effect(mine, component, "random token", "mean")
                controls = [x for x in (*layer, token) if x == x]
                proven = None
                if mine:
                    proven = bool(-fall >= FALL and controls and max(abs(x) for x in controls) < CONTROL)
                rows.append(
                    self._label(one)
                    | {"onset": one.phase.onset, "end": one.phase.end, "writer": component_name(component)}
                    | {"contribution": share * one.projection, "share": share, "d_margin": fall}
                    | {"d_margin_all": self._effect(mine, component, "all sinks", "same_id")}
                    | {"random_layer": layer[0] if layer else math.nan, "random_token": token, "proven": proven}
                )
        columns = ["sequence", "position", "token", "kind", "phase", "onset", "end", "writer", "contribution", "share"]
        columns += ["d_margin", "d_margin_all", "random_layer", "random_token", "proven"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    @staticmethod
    def _effect(rows: list[dict[str, Any]], component: Component, at: str, replacement: str) -> float:
        for r in rows:
            if (r["component"], r["layer"], r["at"], r["replacement"]) == (*component, at, replacement):
                return r["d_margin"]
        return math.nan

    def erasers(self) -> pd.DataFrame:
        """One row per (phase, eraser): its contribution, and how the margin behind the phase moves without it."""
        rows = []
        for one in self.traced:
            mine = [r for r in self.causes if (r["trace"], r["phase"]) == (one.sink, one.number)]
            for component in one.erasers():
                after = [
                    r["d_margin_after"] for r in mine
                    if (r["component"], r["layer"], r["at"], r["replacement"]) == (*component, "sink", "same_id")
                ]  # fmt: skip
                share = one.share(component)
                rows.append(
                    self._label(one)
                    | {"eraser": component_name(component), "contribution": share * one.projection, "share": share}
                    | {"d_margin_after": after[0] if after else math.nan}
                )
        columns = [
            "sequence",
            "position",
            "token",
            "kind",
            "phase",
            "eraser",
            "contribution",
            "share",
            "d_margin_after",
        ]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def by_component(self, kind: Kind | None = None) -> pd.DataFrame:
        """One row per component: in how many phases it is a writer by share and proven, its mean share there, with a
        95 % interval over documents.
        """
        table = self.writers()
        table = table[(table.kind == kind) if kind else slice(None)]
        rows = []
        for name, group in table.groupby("writer"):
            documents = [self.tokens.documents[int(b)] for b in group.sequence.tolist()]
            low, high = interval(torch.tensor(group.share.tolist()), documents) or (math.nan, math.nan)
            falls = torch.tensor(group.d_margin.tolist(), dtype=torch.float64)
            rows.append(
                {"writer": name, "phases": len(group), "share": group.share.mean(), "low": low, "high": high}
                | {"d_margin": float(falls.nanmean()), "proven": int(sum(p is True for p in group.proven.tolist()))}
            )
        columns = pd.Index(["writer", "phases", "share", "low", "high", "d_margin", "proven"])
        return pd.DataFrame(rows, columns=columns).sort_values("phases", ascending=False, ignore_index=True)

    def shares(self, kind: Kind | None = None) -> pd.DataFrame:
        """One row per component: its mean share before the reference layer over all phases of a kind, writer or not,
        with a 95 % interval over documents; the largest first. Says whether writing is one layer's or spread over many.
        """
        chosen = [one for one in self.traced if kind is None or one.kind == kind]
        by: dict[Component, list[tuple[float, int]]] = {}
        for one in chosen:
            for component, share in one.shares():
                by.setdefault(component, []).append((share, one.document))
        rows = []
        for component, entries in by.items():
            values = torch.tensor([share for share, _ in entries])
            low, high = interval(values, [document for _, document in entries]) or (math.nan, math.nan)
            row: dict[str, Any] = {"component": component_name(component), "share": float(values.mean())}
            rows.append(row | {"low": low, "high": high, "phases": len(entries)})
        columns = pd.Index(["component", "share", "low", "high", "phases"])
        return pd.DataFrame(rows, columns=columns).sort_values("share", ascending=False, ignore_index=True)

    def plot(self, sink: int | None = None) -> Figure:
        """Contributions of every component over depth with their running sum: the first sink, or the one numbered."""
        from sinklens.trace.figures import contribution_bars  # plotly is slow to load

        return contribution_bars(self, sink)

    def phases(self, sink: int | None = None) -> list[Traced]:
        """The phases of one sink: the first, or the one numbered.

        Raises:
            BadInputError: an empty trace, or a number that it does not hold.
        """
        if not self.traced:
            raise BadInputError("this trace is empty: the map held no sink")
        number = self.traced[0].sink if sink is None else sink
        found = [one for one in self.traced if one.sink == number]
        if not found:
            raise BadInputError(f"no sink {number} in this trace; there are {sorted({t.sink for t in self.traced})}")
        return found

    def part(self, documents: Iterable[int]) -> SinkTrace:
        """The trace of some documents only, such as one half of them: find a rule in one, test it in the other."""
        kept = set(documents)
        traced = tuple(one for one in self.traced if one.document in kept)
        numbers = {one.sink for one in traced}
        causes = tuple(row for row in self.causes if row["trace"] in numbers)
        primaries = tuple(entry for entry in self.primaries if entry["document"] in kept)
        return replace(self, traced=traced, causes=causes, primaries=primaries)

    def circuit(
        self, sink: int | None = None, *, neurons: Neurons | None = None, scores: SinkScores | None = None
    ) -> nx.DiGraph:
        """A small graph of one sink (the first, or the one numbered): who writes and erases it, which heads read it.

        Args:
            sink: its number in the map.
            neurons: from :func:`sinklens.trace.writer_neurons`: also the writers' largest neurons and what feeds them.
            scores: of the same tokens: weights of the reading heads (else those with far importance above 0.3).

        Returns:
            A networkx DiGraph. Nodes have ``kind`` (token, component, neuron, head) and ``layer``; edges ``role``
            (writes, erases, is part of, feeds, is read by) and ``weight``: share of ``<x_ref, u>``, share of the
            writer's contribution, difference of the pre-activation to tokens that are no sink, far importance.
        """
        return circuit(self, sink, neurons, scores)

    def plot_doses(self, kind: Kind | None = None) -> Figure:
        """Attention, life and competitor-free margin against the dose of the main writer's output (``doses=``)."""
        from sinklens.trace.figures import dose_curves  # plotly is slow to load

        return dose_curves(self, kind)

    def plot_circuit(
        self, sink: int | None = None, *, neurons: Neurons | None = None, scores: SinkScores | None = None
    ) -> Figure:
        """The graph of :meth:`circuit`, drawn."""
        from sinklens.trace.figures import circuit_figure  # plotly is slow to load

        return circuit_figure(self.circuit(sink, neurons=neurons, scores=scores))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for i, one in enumerate(self.traced):
            tensors |= {f"{i}.{name}": tensor for name, tensor in vars(one).items() if isinstance(tensor, Tensor)}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        plain = [
            {k: v for k, v in vars(one).items() if not isinstance(v, Tensor)} | {"phase": asdict(one.phase)}
            for one in self.traced
        ]
        meta = {"traced": plain, "causes": list(self.causes), "primaries": list(self.primaries)}
        meta |= {"sinks": [asdict(s) for s in self.sinks]}
        meta |= {"tokens": self.tokens.meta(), "notes": list(self.notes), "info": self.info}
        return save_tensors(path, "SinkTrace", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SinkTrace:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "SinkTrace")
        traced = []
        for i, content in enumerate(meta["traced"]):
            content["phase"] = Phase(**content["phase"])
            content["components"] = tuple((str(a), int(b)) for a, b in content["components"])
            start = f"{i}."
            own: dict[str, Any] = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            traced.append(Traced(**content, **own))
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            traced=tuple(traced),
            causes=tuple(meta["causes"]),
            primaries=tuple(meta["primaries"]),
            sinks=tuple(sink_from_json(s) for s in meta["sinks"]),
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            notes=tuple(meta["notes"]),
            info=meta["info"],
        )
