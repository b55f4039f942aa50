"""``Mixing`` and ``MixingComparison``: Jacobian sensitivity of one model state, and of several with the same probes."""

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
from sinklens.mixing.indices import INDICES, at_last_layer
from sinklens.mixing.jacobians import squares_interval
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@public_methods
@dataclass(frozen=True, eq=False)
class Mixing(ShownInJupyter, table="_last_layer"):
    """What :func:`sinklens.measure_mixing` found.

    Attributes:
        mix, via_sink, spread: means over rows that are no sink: [sequence, layer].
        maps: per sequence ``|J[l,i,j]|_F^2`` of the measured tokens: [layer, row, column].
        errors: per sequence the variance of the map's entries over probes; empty where J is exact.
        tokens: the sequences.
        positions: per sequence the rows and columns of its map.
        sinks: per sequence the sinks S.
        info: model, definition in force, where S comes from, seed, versions.
    """

    mix: Float[Tensor, "batch layer"]
    via_sink: Float[Tensor, "batch layer"]
    spread: Float[Tensor, "batch layer"]
    maps: tuple[Float[Tensor, "layer _ _"], ...]
    errors: tuple[Float[Tensor, "layer _ _"], ...]
    tokens: Tokens
    positions: tuple[tuple[int, ...], ...]
    sinks: tuple[tuple[int, ...], ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {value:.3g}" for name, value in at_last_layer(self).items())
        return (
            f"Mixing of {len(self.tokens)} sequence(s) in {self.info.get('model')}, {self.info.get('definition')}\n"
            f"  at the last layer {last}"
        )

    @property
    def squared_norms(self) -> Float[Tensor, "batch layer out in"]:
        """``|J[l,i,j]|_F^2`` by position in the unpadded sequence; NaN where nothing was measured.

        Memory: ``batch x layers x T x T`` floats; :attr:`maps` holds only what was measured.
        """
        longest = int(self.tokens.lengths.max())
        whole = torch.full((len(self.maps), self.mix.shape[1], longest, longest), math.nan)
        for b, (part, at) in enumerate(zip(self.maps, self.positions, strict=True)):
            index = torch.tensor(at)
            whole[b][:, index[:, None], index] = part
        return whole

    def interval(
        self, sequence: int = 0, confidence: float = 0.95
    ) -> tuple[Float[Tensor, "layer row column"], Float[Tensor, "layer row column"]]:
        """The interval of every entry of a sequence's map, from the probes: scaled chi-square with shrunk degrees of
        freedom (definitions.md, section 6). The same probes serve all layers and rows, so errors are shared.
        """
        found = self.maps[self._known(sequence)]
        if not 0 < confidence < 1:
            raise BadInputError(f"confidence must be between 0 and 1, got {confidence}")
        if not self.errors:
            return found, found
        low, high = squares_interval(
            found.double(), self.errors[sequence].double(), int(self.info["probes"]), confidence
        )
        return low.float(), high.float()

    def _known(self, sequence: int) -> int:
        if not 0 <= sequence < len(self.maps):
            raise BadInputError(f"sequence {sequence} is out of range: there are {len(self.maps)}")
        return sequence

    def _layer(self, layer: int) -> int:
        first, n_layers = int(self.info["layer"]), self.mix.shape[1]
        at = layer + n_layers if layer < 0 else layer - first
        if not 0 <= at < n_layers:
            raise BadInputError(f"layer {layer} is out of range: measured are {first} to {first + n_layers - 1}")
        return at

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and index: the mean over sequences and its 95 % interval over documents (16 or more)."""
        rows = []
        for layer in range(self.mix.shape[1]):
            for name in INDICES:
                row: dict[str, Any] = {"layer": layer + self.info["layer"], "index": name}
                rows.append(row | summary(getattr(self, name)[:, layer], self.tokens.documents))
        return pd.DataFrame(rows)

    def distances(self, layer: int = -1) -> pd.DataFrame:
        """Sensitivity against distance: mean ``|J_ij|_F^2`` over rows and columns that are no sinks, in octaves."""
        at = self._layer(layer)
        bins: dict[int, list[float]] = {}
        for b, positions in enumerate(self.positions):
            values = self.maps[b][at].tolist()
            for r, i in enumerate(positions):
                for k, j in enumerate(positions):
                    if i != j and not {i, j} & set(self.sinks[b]) and (j < i or not self.info["causal"]):
                        bins.setdefault(int(math.log2(abs(i - j))), []).append(values[r][k])
        return pd.DataFrame(
            [
                {
                    "distance": 2**octave,
                    "to": 2 ** (octave + 1) - 1,
                    "n": len(values),
                    "mean": sum(values) / len(values),
                }
                for octave, values in sorted(bins.items())
            ]
        )

    def influence(self, sequence: int = 0, layer: int = -1) -> pd.DataFrame:
        """Influence of each measured token on the last one: ``|J_ij|_F^2`` and its share of the row."""
        last = self.maps[self._known(sequence)][self._layer(layer), -1].double()
        return pd.DataFrame(
            [
                {"position": j, "token": self.tokens.labels[sequence][j], "sink": j in self.sinks[sequence]}
                | {"squares": float(last[k]), "share": float(last[k] / last.sum())}
                for k, j in enumerate(self.positions[sequence])
            ]
        )

    def plot(self) -> Figure:
        """The three indices against depth, with intervals where there are any."""
        from sinklens.mixing.figures import index_curves  # plotly is slow to load

        return index_curves({"": self})

    def plot_map(self, sequence: int = 0, layer: int = -1) -> Figure:
        """``|J_ij|_F`` of every measured row and column at one layer, on a log scale."""
        from sinklens.mixing.figures import sensitivity_map  # plotly is slow to load

        return sensitivity_map(self, self._known(sequence), self._layer(layer))

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of one condition."""
        found: dict[str, Tensor] = {name: getattr(self, name) for name in INDICES}
        for name in ("maps", "errors"):
            found |= {f"{name}.{b}": part for b, part in enumerate(getattr(self, name))}
        return found

    def meta(self) -> dict[str, Any]:
        """Everything else but the tokens, as JSON."""
        places = {"positions": [list(p) for p in self.positions], "sinks": [list(s) for s in self.sinks]}
        return {**places, "info": self.info}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], meta: dict[str, Any], tokens: Tokens) -> Mixing:
        """The inverse of :meth:`tensors` and :meth:`meta`."""
        parts: dict[str, Any] = {
            name: tuple(tensors[f"{name}.{b}"] for b in range(len(tokens)) if f"{name}.{b}" in tensors)
            for name in ("maps", "errors")
        }
        for name in ("positions", "sinks"):
            parts[name] = tuple(tuple(int(p) for p in row) for row in meta[name])
        return cls(**{name: tensors[name] for name in INDICES}, **parts, tokens=tokens, info=meta["info"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        return MixingComparison({"": self}).save(path, kind="Mixing")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mixing:
        """Read what :meth:`save` wrote."""
        return MixingComparison.load(path, kind="Mixing").conditions[""]


@public_methods
@dataclass(frozen=True, eq=False)
class MixingComparison(ShownInJupyter, table="_last_layer"):
    """What :func:`sinklens.compare_mixing` found: a :class:`Mixing` per condition, with the same probes, tokens, S.

    Attributes:
        conditions: by label; the first, "base", is the model as it is.
    """

    conditions: dict[str, Mixing]

    def __repr__(self) -> str:
        first = next(iter(self.conditions.values()))
        lines = [f"MixingComparison over {len(first.tokens)} sequence(s), {first.info.get('definition')}"]
        for label, found in self.conditions.items():
            last = ", ".join(f"{name} {value:.3g}" for name, value in at_last_layer(found).items())
            lines.append(f"  {label}: at the last layer {last}")
        return "\n".join(lines)

    def __getitem__(self, label: str) -> Mixing:
        if label not in self.conditions:
            raise BadInputError(f"no condition {label!r}; there are {', '.join(map(repr, self.conditions))}")
        return self.conditions[label]

    def to_dataframe(self, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """One row per condition, layer and index: the mean over sequences with its 95 % interval over documents (16 or
        more, else NaN); for edited conditions the paired ``difference`` to base and ``log_ratio`` (NaN where an index
        is 0, as via_sink is without the sink), each with its interval.
        """
        base = next(iter(self.conditions.values()))
        documents = base.tokens.documents
        chosen = range(base.mix.shape[1]) if layers is None else [base._layer(n) for n in layers]
        rows = []
        for c, (label, found) in enumerate(self.conditions.items()):
            for layer in chosen:
                for name in INDICES:
                    values, plain = (getattr(m, name)[:, layer].double() for m in (found, base))
                    row: dict[str, Any] = {"condition": label, "layer": layer + base.info["layer"], "index": name}
                    row |= summary(values, documents)
                    ratio = (values / plain).log()
                    ratio[(values <= 0) | (plain <= 0)] = math.nan
                    nothing = torch.full_like(plain, math.nan)
                    row |= summary(values - plain if c else nothing, documents, "difference")
                    rows.append(row | summary(ratio if c else nothing, documents, "log_ratio"))
        return pd.DataFrame(rows)

    def distances(self, layer: int = -1) -> pd.DataFrame:
        """Sensitivity against distance in every condition."""
        return pd.concat([m.distances(layer).assign(condition=label) for label, m in self.conditions.items()])

    def influence(self, sequence: int = 0, layer: int = -1) -> pd.DataFrame:
        """Influence of each measured token on the last one in every condition."""
        parts = [m.influence(sequence, layer).assign(condition=label) for label, m in self.conditions.items()]
        return pd.concat(parts)

    def plot(self) -> Figure:
        """The three indices against depth, a line per condition, with intervals where there are any."""
        from sinklens.mixing.figures import index_curves  # plotly is slow to load

        return index_curves(self.conditions)

    def save(self, path: str | os.PathLike[str], *, kind: str = "MixingComparison") -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tokens = next(iter(self.conditions.values())).tokens
        tensors = {f"tokens.{name}": t for name, t in tokens.tensors().items()}
        for c, found in enumerate(self.conditions.values()):
            tensors |= {f"{c}.{name}": t for name, t in found.tensors().items()}
        meta = {"labels": list(self.conditions), "tokens": tokens.meta()}
        return save_tensors(path, kind, tensors, meta | {"parts": [m.meta() for m in self.conditions.values()]})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, kind: str = "MixingComparison") -> MixingComparison:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, kind)

        def part(start: str) -> dict[str, Tensor]:
            return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}

        tokens = Tokens.from_parts(part("tokens."), meta["tokens"])
        pairs = enumerate(zip(meta["labels"], meta["parts"], strict=True))
        return cls({label: Mixing.from_parts(part(f"{c}."), content, tokens) for c, (label, content) in pairs})
