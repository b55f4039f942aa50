"""``writer_neurons``: the neurons through which an MLP writes a sink, and what feeds them.

An MLP's output is the sum over neurons of activation times output weight (plus a bias), so its contribution along the
primary's direction splits exactly. A neuron's pre-activation is linear in the normalised stream, so with the norm's
scale frozen it splits over the components that wrote the stream.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import block_output, mlp_of, original
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.bridge.offload import real_weights
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.find.lifetimes import Kind
from sinklens.residual.batched_edits import Row, run_rows
from sinklens.residual.components import Component, Contributions, component_name
from sinklens.residual.contributions import flat, stream_hooks
from sinklens.residual.linear_maps import FrozenNorm, frozen_norm, identity_norm
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar
from sinklens.trace.phases import WRITER, Traced
from sinklens.trace.result import SinkTrace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CARRY = 0.9
COMPARED = 16  # tokens whose pre-activations stand beside the sink's
TOLERANCE = 1e-3
_TABLES = ("neurons", "writers", "ablations", "feeds")


@public_methods
@dataclass(frozen=True, eq=False)
class Neurons(ShownInJupyter):
    """What :func:`writer_neurons` found.

    Attributes:
        neurons: one row per (phase, writer, neuron), the largest contributions first: ``activation`` at the sink,
            its mean over ordinary tokens and over tokens of the same id that are no sink, ``contribution`` along u,
            ``share`` of the writer's, ``cumulative``; ``in_cosine`` and ``gate_cosine``: of the neuron's input
            weights with what sets the MLP's input at the sink apart from that at the tokens it is compared with.
        writers: one row per (phase, writer): how many neurons carry 90 % of its contribution, of how many; the bias's
            part; ``other_signs``: the sum of all contributions against it, as a share.
        ablations: the k largest neurons set to their mean over ordinary tokens at the sink, and as many random ones:
            change of the competitor-free margin, of alpha.
        feeds: for the largest neurons, per matrix ("in" or "gate"): the pre-activation at the sink by component
            (``amount``), and its mean ``elsewhere``: at tokens of the same id that are no sink, or at ordinary tokens
            where there is none (``against``); ``difference`` is what tells the sink from them.
        notes: what could not be told.
    """

    neurons: pd.DataFrame
    writers: pd.DataFrame
    ablations: pd.DataFrame
    feeds: pd.DataFrame
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Neurons: the largest of {len(self.writers)} writer(s)"

    def to_dataframe(self) -> pd.DataFrame:
        """The table per neuron."""
        return self.neurons

    def upstream(self, kind: Kind | None = None) -> pd.DataFrame:
        """What feeds the writers' neurons, largest differences first: means over the phases of a kind.

        One row per (writer, neuron, matrix, component). For the primary this is how the model knows the first token.
        """
        names = ["writer", "neuron", "matrix", "component"]
        known = self.feeds if kind is None or self.feeds.empty else self.feeds[self.feeds.kind == kind]
        if known.empty:
            return pd.DataFrame(columns=pd.Index([*names, "phases", "amount", "elsewhere", "difference"]))
        grouped = known.groupby(names, as_index=False).agg(
            phases=("amount", "size"), amount=("amount", "mean"), elsewhere=("elsewhere", "mean"),
            difference=("difference", "mean"),
        )  # fmt: skip
        order = grouped.difference.abs().sort_values(ascending=False).index
        return grouped.loc[order].reset_index(drop=True)

    def plot(self, number: int = 0) -> Figure:
        """The largest neurons of one (phase, writer), numbered as in ``writers``."""
        from sinklens.trace.figures import neuron_bars  # plotly is slow to load

        return neuron_bars(self, number)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the tables as one file, whole or not at all."""
        tables = {name: getattr(self, name).to_dict("split") for name in _TABLES}
        return save_tensors(path, "Neurons", {}, {"tables": tables, "notes": list(self.notes)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Neurons:
        """Read what :meth:`save` wrote."""
        _, meta = load_tensors(path, "Neurons")
        tables = {name: pd.DataFrame(**meta["tables"][name]) for name in _TABLES}
        return cls(**tables, notes=tuple(meta["notes"]))


@public
def writer_neurons(
    model: TransformerBridge,
    trace: SinkTrace,
    *,
    top: tuple[int, ...] = (1, 5, 20),
    shown: int = 20,
    fed: int = 3,
    n_random: int = 3,
    seed: int = 0,
    progress: bool | None = None,
) -> Neurons:
    """Split what each writing MLP of a trace adds into its neurons.

    Args:
        model: the traced model.
        trace: from :func:`sinklens.trace_sinks`.
        top: how many of the largest neurons are ablated at once.
        shown: how many neurons are listed.
        fed: for how many the feeding components are listed.
        n_random: draws of random neurons per k; their mean is reported.
        seed: of these draws.
        progress: show a bar.

    Cost: two forwards per phase, one of them with ``1 + len(top) * (1 + n_random)`` rows.

    Raises:
        BadInputError: no MLP writes in this trace.
        UnsupportedModelError: the MLP has no neurons that the host shows (mixtures of experts).
    """
    capabilities(model)  # refuses a model without hooks
    writers = [
        (one, component)
        for one in trace.traced
        for component, share in one.shares()
        if share >= WRITER and component[0] == "mlp"
    ]
    if not writers:
        raise BadInputError("no MLP writes a sink in this trace, so there are no neurons to name")
    draw = torch.Generator().manual_seed(seed)
    tables: dict[str, list[dict[str, Any]]] = {"neurons": [], "writers": [], "ablations": [], "feeds": []}
    notes: list[str] = []
    with progress_bar("neurons of writers", len(writers), progress) as advance:
        for one, component in writers:
            ids = trace.tokens[one.sequence].trim().ids.to(model.cfg.device)
            no_sink = torch.ones(ids.shape[1], dtype=torch.bool, device=ids.device)
            no_sink[[s.position for s in trace.sinks if s.sequence == one.sequence]] = False
            label = {"sequence": one.sequence, "position": one.position, "token": one.token, "kind": one.kind}
            label |= {"phase": one.number, "writer": component_name(component)}
            same = no_sink & (ids[0] == one.token_id)
            against = same if bool(same.any()) else no_sink
            some = against.nonzero().flatten().tolist()[-COMPARED:]
            layer = _Layer(model, component[1], ids, one.position, some)
            amounts, bias = layer.split(one.direction)
            whole = float(amounts.sum()) + bias
            order = (amounts / whole).argsort(descending=True)  # a writer's whole is negative where the projection is
            typical = layer.activations[no_sink].mean(0)
            alike = layer.activations[same].mean(0) if bool(same.any()) else torch.full_like(typical, torch.nan)
            triggers = layer.triggers()
            running = amounts[order].cumsum(0)
            carried = (running / whole >= CARRY).nonzero().flatten()
            for rank, f in enumerate(order[:shown].tolist()):
                row = {"neuron": f, "activation": float(layer.activations[one.position, f])}
                row |= {"ordinary": float(typical[f]), "same_id": float(alike[f]), "contribution": float(amounts[f])}
                row |= {"share": float(amounts[f]) / whole, "cumulative": float(running[rank]) / whole}
                tables["neurons"].append(label | row | {name: float(cosines[f]) for name, cosines in triggers.items()})
            tables["writers"].append(
                label
                | {"contribution": whole, "neurons_for_90": int(carried[0]) + 1 if len(carried) else len(order)}
                | {"neurons": len(order), "bias": bias}
                | {"other_signs": float(amounts[amounts * whole < 0].sum()) / whole}
            )
            tables["ablations"] += [
                label | row
                for row in _ablate(model, one, component, ids, no_sink, layer, order, typical, top, n_random, draw)
            ]
            feeds, note = layer.feeds(order[:fed].tolist())
            label["against"] = "same id" if bool(same.any()) else "ordinary tokens"
            tables["feeds"] += [label | row for row in feeds]
            notes += [note] if note else []
            advance()
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    return Neurons(**frames, notes=tuple(dict.fromkeys(notes)))


def _ablate(
    model: TransformerBridge,
    one: Traced,
    component: Component,
    ids: Int[Tensor, "1 pos"],
    no_sink: Bool[Tensor, " pos"],
    layer: _Layer,
    order: Int[Tensor, " neuron"],
    typical: Float[Tensor, " neuron"],
    top: tuple[int, ...],
    n_random: int,
    draw: torch.Generator,
) -> list[dict[str, Any]]:
    """The k largest neurons at their ordinary activation, and random ones."""
    change = typical - layer.activations[one.position]
    rows, labels = [Row(None)], [(0, "")]
    for k in (min(k, len(order)) for k in top):
        sets = [("top", order[:k])]
        sets += [("random", torch.randperm(len(order), generator=draw)[:k].to(order)) for _ in range(n_random)]
        for name, chosen in sets:
            delta = torch.zeros_like(change)
            delta[chosen] = change[chosen]
            rows.append(Row(component, (one.position,), delta[None], f"blocks.{component[1]}.mlp.out.hook_in"))
            labels.append((k, name))
    seen = run_rows(model, ids, rows, [one.position], no_sink, last=one.phase.end)
    inside = slice(max(one.phase.onset, component[1] + 1), one.phase.end + 1)
    margin, alpha = (values[:, 0, inside].nanmean(-1) for values in (seen.margin, seen.alpha))
    found = []
    for k, name in dict.fromkeys(labels[1:]):
        mine = [r for r, label in enumerate(labels) if label == (k, name)]
        row = {"k": k, "neurons": name, "d_margin": float((margin[mine] - margin[0]).mean())}
        found.append(row | {"d_alpha": float((alpha[mine] - alpha[0]).mean())})
    return found


class _Layer:
    """One MLP of one sequence: its activations, and how they come out of the stream and go into it."""

    def __init__(
        self,
        model: TransformerBridge,
        layer: int,
        ids: Int[Tensor, "1 pos"],
        position: int,
        others: Sequence[int] = (),
    ) -> None:
        self.model, self.layer, self.position = model, layer, position
        self.at = [position, *others]
        self.prefix = f"blocks.{layer}."
        if not has_hook(model, self.prefix + "mlp.out.hook_in"):
            raise UnsupportedModelError(
                f"{model.cfg.model_name}: the host shows no neurons in MLP {layer} (a mixture of experts?); "
                f"trace_sinks works on the layer as a whole"
            )
        self.mlp: Any = mlp_of(model, layer)
        length = ids.shape[1]
        seen: dict[str, Tensor] = {}
        names = ("mlp.hook_in", "mlp.out.hook_in", "mlp.hook_out", "ln1.hook_in", "ln1.hook_out", "ln2.hook_in")
        names = (*names, "ln2.hook_out", "ln2_post.hook_in", "ln2_post.hook_out")

        def keep(name: str) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                seen[name] = flat(tensor.detach(), length)

            return hook

        self.contributions = Contributions(model)
        self.parts: list[tuple[Component, Float[Tensor, "token d_model"]]] = []

        def before(at: int, _: Tensor) -> None:
            if at == layer:
                stack = self.contributions.stack()[:, self.at]
                self.parts = list(zip(self.contributions.names, stack, strict=True))

        def after(at: int, _: Tensor) -> None:
            if at == layer:
                own = [(c, part[self.at]) for c, part in self.contributions.latest.items() if c[0] == "attn"]
                self.parts += own

        hooks = [(self.prefix + n, keep(n)) for n in names if has_hook(model, self.prefix + n)]
        hooks += stream_hooks(model, length, self.contributions, before, after)
        run_blocks(model, ids, hooks, until=block_output(layer))
        self.seen = seen
        self.activations = seen["mlp.out.hook_in"]
        with real_weights(self.mlp):
            self.weight: Float[Tensor, "neuron d_model"] = self.mlp.W_out.detach().to(self.activations)
            self.bias = None if self.mlp.b_out is None else self.mlp.b_out.detach().to(self.activations)
        rebuilt = self.activations @ self.weight + (0 if self.bias is None else self.bias)
        if (rebuilt - seen["mlp.hook_out"]).abs().max() > TOLERANCE * (1 + rebuilt.abs().max()):
            raise UnsupportedModelError(
                f"{model.cfg.model_name}: MLP {layer} is not the sum of its neurons' outputs as the host shows them"
            )

    def split(self, direction: Float[Tensor, " d_model"]) -> tuple[Float[Tensor, " neuron"], float]:
        """``a_f <w_f, u>`` of every neuron at the sink, through a post-norm where there is one; and the bias's part."""
        post = self._post()
        u = direction.to(self.activations)
        back = post.adjoint(u[None])[0]
        amounts = self.activations[self.position] * (self.weight @ back)
        rest = float(post.bias.expand_as(u) @ u)
        return amounts.double().cpu(), rest + (0.0 if self.bias is None else float(self.bias @ back))

    def triggers(self) -> dict[str, Float[Tensor, " neuron"]]:
        """Cosine of every neuron's input weights with the MLP's input at the sink minus its mean elsewhere."""
        x = self.seen["mlp.hook_in"]
        apart = x[self.at[0]] - x[self.at[1:]].mean(0)
        with real_weights(self.mlp):
            weights = {"in_cosine": self.mlp.W_in, "gate_cosine": self.mlp.W_gate}
        return {
            name: torch.cosine_similarity(w.detach().to(apart), apart[:, None], dim=0)
            for name, w in weights.items()
            if w is not None
        }

    def _post(self) -> FrozenNorm:
        if "ln2_post.hook_in" not in self.seen:
            return identity_norm(self.seen["mlp.hook_out"]).at(slice(self.position, self.position + 1))
        block: Any = self.model.blocks[self.layer]
        norm = frozen_norm(original(block.ln2_post), self.seen["ln2_post.hook_in"], self.seen["ln2_post.hook_out"])
        return norm.at(slice(self.position, self.position + 1))

    def feeds(self, neurons: list[int]) -> tuple[list[dict[str, Any]], str]:
        """The pre-activations of some neurons at the sink and elsewhere, by component of the stream the MLP reads."""
        x_hat = self.seen["mlp.hook_in"]
        block: Any = self.model.blocks[self.layer]
        found: tuple[FrozenNorm, Tensor] | None = None
        for name in ("ln2", "ln1"):
            if f"{name}.hook_out" in self.seen and torch.allclose(self.seen[f"{name}.hook_out"], x_hat, atol=1e-5):
                x = self.seen[f"{name}.hook_in"]
                found = frozen_norm(original(getattr(block, name)), x, x_hat), x
                break
        if found is None:
            return [], f"MLP {self.layer} does not read the norm of the stream, so its neurons' input cannot be split"
        norm, x = found
        parts = self.parts
        if not _sums(parts, x[self.at]):
            parts = [entry for entry in parts if entry[0] != ("attn", self.layer)]  # a parallel block
        if not _sums(parts, x[self.at]):
            return [], f"the input of MLP {self.layer} is not the sum of what was written before it"
        stack = norm.at(self.at).linear(torch.stack([part for _, part in parts]))
        rows = []
        with real_weights(self.mlp):
            matrices = ("in", self.mlp.W_in, self.mlp.b_in), ("gate", self.mlp.W_gate, self._gate_bias())
        for which, weight, bias in matrices:
            if weight is None:
                continue
            w = weight.detach().to(stack)
            constant = norm.bias.expand(w.shape[0]) @ w + (0 if bias is None else bias.detach().to(stack))
            amounts = stack @ w
            for f in neurons:
                for n, (c, _) in enumerate(parts):
                    own, rest = float(amounts[n, 0, f]), float(amounts[n, 1:, f].mean())
                    row = {"neuron": f, "matrix": which, "component": component_name(c), "amount": own}
                    rows.append(row | {"elsewhere": rest, "difference": own - rest})
                row = {"neuron": f, "matrix": which, "component": "bias", "amount": float(constant[f])}
                rows.append(row | {"elsewhere": float(constant[f]), "difference": 0.0})
        return rows, ""

    def _gate_bias(self) -> Tensor | None:
        return getattr(self.mlp, "b_gate", None) if self.mlp.W_gate is not None else None


def _sums(parts: list[tuple[Component, Tensor]], x: Tensor) -> bool:
    total = torch.stack([part for _, part in parts]).sum(0)
    return bool((total - x).abs().max() <= TOLERANCE * (1 + x.abs().max()))
