"""What takes sinks apart: scores, writers, neurons, planting, the input subspace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinklens.attention.importance import FAR
from sinklens.bridge.adapters import block_input
from sinklens.check.reference_forward import Layer, visible
from sinklens.check.subject import LENGTH, SINKS, Parts, Subject, gap
from sinklens.core.errors import BadInputError
from sinklens.decompose.decompose import decompose_sinks
from sinklens.decompose.margin import BEYOND, SPLITS
from sinklens.find.sinkmap import Sink
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.residual.components import Component, writing_hook
from sinklens.trace.gathered import Looked
from sinklens.trace.neurons import writer_neurons
from sinklens.trace.phases import Phase, Traced
from sinklens.trace.planting import plant_sinks
from sinklens.trace.replacement import Causes
from sinklens.trace.result import SinkTrace
from sinklens.trace.subspace import writer_subspace
from sinklens.trace.trace import trace_sinks

MANY = tuple(range(2, 30, 3))  # sinks per sequence for the input subspace


def naive_margins(subject: Subject, layer: Layer, n: int, b: int, position: int) -> dict[str, Tensor]:
    """Margin, gap, peakedness of one sink per head by the formulas: means over far queries that see it and others."""
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    inside[list(SINKS)] = True
    seen = visible(LENGTH, subject.facts.causal, subject.facts.windows[n])
    scores = layer.scores[b].cpu()
    rows: dict[str, list[Tensor]] = {"margin": [], "gap": [], "peakedness": []}
    for i in range(LENGTH):
        others = seen[i] & ~inside
        if bool(seen[i, position]) and abs(i - position) >= FAR and bool(others.any()):
            lse, mean = scores[:, i, others].logsumexp(-1), scores[:, i, others].mean(-1)
            whole = lse if layer.learned is None else torch.logaddexp(lse, layer.learned.cpu())
            rows["margin"].append(scores[:, i, position] - whole)
            rows["gap"].append(scores[:, i, position] - mean)
            rows["peakedness"].append(lse - mean - math.log(int(others.sum())))
    return {name: torch.stack(values).mean(0) for name, values in rows.items()}


def check_decompose(subject: Subject, parts: Parts) -> None:
    """Margins from written-out scores; every split, and the components, sum to the gap."""

    def measure() -> float:
        found = decompose_sinks(subject.model, subject.tokens, list(SINKS), effects=(), progress=False)
        gaps = found.number("gap").double()
        size = gaps[gaps.isfinite()].abs().max().clamp(min=1)
        beyond = sum(found.number(name) for name in BEYOND)
        sums = [sum(found.number(name) for name in names) + beyond for names in SPLITS.values()]
        sums += [side.nansum(-1) + beyond for side in (found.key_side + found.rest_side, found.query_side)]
        worst = max(float((x - gaps)[gaps.isfinite()].abs().max() / size) for x in sums)
        for s, one in enumerate(found.subjects):
            for n, layer in enumerate(subject.base.layers):
                naive = naive_margins(subject, layer, n, one.sequence, one.position)
                worst = max(worst, *(gap(found.number(name)[s, n], values) for name, values in naive.items()))
        return worst

    parts.add("margins and sums", measure)


def check_trace(subject: Subject, parts: Parts) -> None:
    """What layers add along u are differences of the stream; a writer's replacement is a plain edit of its output."""

    def adds() -> float:
        trace = trace_sinks(
            subject.model, subject.tokens, subject.sinks, reference=subject.reference, causal=False, progress=False
        )
        starts: list[Tensor] = []
        subject.written(hooks=[(block_input(0), lambda x, hook: starts.append(x.detach().double().cpu()))])
        stream = torch.cat([starts[0][None], subject.base.states])
        worst = 0.0
        for one in trace.traced:
            along = stream[:, one.sequence, one.position] @ one.direction.double().cpu()
            size = along.abs().max()
            told = dict(zip(one.components, one.contributions.double().tolist(), strict=True))
            embedded = sum(x for component, x in told.items() if component[1] < 0)
            worst = max(worst, float(abs(embedded - along[0]) / size))
            for n in range(subject.facts.n_layers):
                both = sum(x for component, x in told.items() if component[1] == n)
                worst = max(worst, float(abs(both - (along[n + 1] - along[n])) / size))
            worst = max(worst, float(abs(one.projection - along[one.phase.reference]) / size))
        return worst

    parts.add("contributions", adds)

    parts.add("replacement", lambda: _replacements(subject))


def _replacements(subject: Subject) -> float:
    """Margins of a trace's replacements against plain edits of the component's output."""
    found = made(subject, subject.tokens, [(0, SINKS[0]), (0, SINKS[1])])
    own = Looked(subject.model, subject.sinks, progress=False)
    causes = Causes(subject.model, own, None, ("zero",), (), loss=False, seed=0)
    rows = [row for one in found.traced for row in causes.of(one) if row["replacement"] == "zero"]
    by = {(t.sink, t.number): t for t in found.traced}
    worst, largest = 0.0, 0.0
    for row in rows:
        one = by[row["trace"], row["phase"]]

        def zero(x: Tensor, hook: Any, one: Traced = one) -> Tensor:
            new = x.clone().view(len(subject.ids), LENGTH, -1)
            new[one.sequence, one.position] = 0
            return new.view(x.shape)

        run = subject.written(hooks=[(writing_hook(subject.model, (row["component"], row["layer"])), zero)])
        first = min(max(one.phase.onset, row["layer"] + 1), one.phase.end)
        inside = range(first, one.phase.end + 1)
        margins = [
            torch.stack([_free_margin(subject, layers[n], n, one.sequence, one.position) for n in inside]).mean()
            for layers in (run.layers, subject.base.layers)
        ]
        worst = max(worst, gap(row["margin"], margins[0]), gap(row["d_margin"], margins[0] - margins[1]))
        largest = max(largest, float((margins[0] - margins[1]).abs()))
    if not largest > 1e-6:
        raise BadInputError("the replacement changes nothing here, so nothing can be compared")
    return worst


def _free_margin(subject: Subject, layer: Layer, n: int, b: int, position: int) -> Tensor:
    """Mean over heads and far queries of ``log p_k - log sum_{no sink} p_j``."""
    index = torch.arange(LENGTH)
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    inside[list(SINKS)] = True
    seen = visible(LENGTH, subject.facts.causal, subject.facts.windows[n])
    far = seen[:, position] & ((index - position).abs() >= FAR)
    scores = layer.scores[b].cpu()
    rest = scores.masked_fill(inside, -torch.inf).logsumexp(-1)
    return (scores[:, :, position] - rest)[:, far].mean()


def made(subject: Subject, tokens: Tokens, places: Sequence[tuple[int, int]], layer: int = 0) -> SinkTrace:
    """A trace that names an MLP the writer of declared sinks, along a random direction."""
    last = subject.facts.n_layers - 1
    kept: list[Tensor] = []
    ids = tokens.ids.to(subject.model.cfg.device)
    name = writing_hook(subject.model, ("mlp", layer))
    with torch.no_grad():
        subject.model.run_with_hooks(
            ids, fwd_hooks=[(name, lambda x, hook: kept.append(x.detach().double().cpu()))], return_type=None
        )
    out = kept[0].reshape(*ids.shape, -1)
    components: tuple[Component, ...] = (("embed", -1), ("attn", 0), ("mlp", 0))
    components += tuple((kind, n) for n in range(1, last + 1) for kind in ("attn", "mlp"))
    shares = torch.zeros(len(components), dtype=torch.float64)
    shares[:2] = torch.tensor([0.1, 0.1])
    shares[components.index(("mlp", layer))] = 0.8
    flat = torch.zeros(len(components))
    u = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = u / u.norm()
    traced, sinks = [], []
    for s, (b, p) in enumerate(places):
        sign = float((out[b, p] @ u).sign())
        token, token_id, document = tokens.labels[b][p], int(tokens.row(b)[p]), tokens.documents[b]
        phase = Phase(min(1, last), last, last)
        traced.append(
            Traced(
                sink=s, sequence=b, position=p, token=token, token_id=token_id, kind="secondary", document=document,
                number=0, phase=phase, components=components, contributions=shares,
                before=torch.tensor([n <= max(layer, last - 1) for _, n in components]), cosines=flat, norms=flat,
                same_cosines=flat, same_norms=flat, same=0, projection=1.0, rho=1.0, norm=1.0,
                direction=(sign * u).float(),
            )
        )  # fmt: skip
        masses = (0.1,) * (last + 1)
        sinks.append(
            Sink(
                sequence=b, position=p, token=token, token_id=token_id, kind="secondary", reason="late_onset",
                onset=phase.onset, end=last, lifetime=last - phase.onset + 1, mass=0.1, bridged=0,
                episodes=((phase.onset, last, 0.1),), masses=masses, heads=(), attended=True,
            )
        )  # fmt: skip
    return SinkTrace(tuple(traced), (), tuple(sinks), tokens)


def _outputs(subject: Subject, tokens: Tokens, name: str) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad():
        subject.model.run_with_hooks(
            tokens.ids.to(subject.model.cfg.device),
            fwd_hooks=[(name, lambda x, hook: kept.append(x.detach().double().cpu()))],
            return_type=None,
        )
    return kept[0].reshape(*tokens.ids.shape, -1)


def check_neurons(subject: Subject, parts: Parts) -> None:
    """All neurons of an MLP, and its bias, sum to what it adds along a direction."""

    def measure() -> float:
        trace = made(subject, subject.tokens, [(b, p) for b in range(2) for p in SINKS])
        found = writer_neurons(subject.model, trace, top=(1,), shown=10**6, n_random=1, progress=False)
        out = _outputs(subject, subject.tokens, writing_hook(subject.model, ("mlp", 0)))
        worst = 0.0
        for one, row in zip(trace.traced, found.writers.to_dict("records"), strict=True):
            along = float(out[one.sequence, one.position] @ one.direction.double())
            mine = [
                r["contribution"]
                for r in found.neurons.to_dict("records")
                if (r["sequence"], r["position"]) == (one.sequence, one.position)
            ]
            size = max(abs(along), max(abs(x) for x in mine))
            worst = max(worst, abs(sum(mine) + row["bias"] - along) / size, abs(row["contribution"] - along) / size)
        return worst

    parts.add("sums", measure)


def check_planting(subject: Subject, parts: Parts) -> None:
    """Attention on a token to which the writer's output was added, from a plain edit."""
    target = 5

    def measure() -> float:
        trace = made(subject, subject.tokens, [(0, SINKS[1])])
        found = plant_sinks(subject.model, trace, positions=(target,), n_random=1, progress=False)
        name = writing_hook(subject.model, ("mlp", 0))
        vector = _outputs(subject, subject.tokens, name)[0, SINKS[1]]

        def plant(x: Tensor, hook: Any) -> Tensor:
            new = x.clone().view(len(subject.ids), LENGTH, -1)
            new[0, target] += vector.to(new)
            return new.view(x.shape)

        run = subject.written(hooks=[(name, plant)])
        phase = trace.traced[0].phase
        inside = range(max(phase.onset, 1), phase.end + 1)
        means = []
        for layers in (run.layers, subject.base.layers):
            rows = []
            for n in inside:
                queries = visible(LENGTH, subject.facts.causal, subject.facts.windows[n])[:, target]
                rows.append(layers[n].weights[0].cpu()[:, queries, target].mean())
            means.append(torch.stack(rows).mean())
        row = next(r for r in found.to_dict("records") if r["added"] == "writer")
        effect = float((means[0] - means[1]).abs())
        if not effect > 1e-6:
            raise BadInputError("planting changes nothing here, so nothing can be compared")
        return max(abs(row["alpha"] - float(means[0])), abs(row["d_alpha"] - float(means[0] - means[1]))) / effect

    parts.add("alpha", measure)


def check_subspace(subject: Subject, parts: Parts) -> None:
    """What one principal component of an MLP's inputs carries, by the formula, the MLP run inside the host."""

    def measure() -> float:
        layer = min(1, subject.facts.n_layers - 1)  # the first may see nothing but the id
        ids = subject.tokens.ids.clone()
        ids[:, 2:50] = int(ids[0, 2])  # one id at many places: some are declared sinks
        tokens = as_tokens(subject.model, ids)
        trace = made(subject, tokens, [(b, p) for b in range(2) for p in MANY], layer)
        verdict = writer_subspace(subject.model, trace, sizes=(1,), n_random=1, seed=0, progress=False)
        x = _outputs(subject, tokens, f"blocks.{layer}.mlp.hook_in")
        alike = [[p for p, i in enumerate(row) if i == row[2] and p not in MANY] for row in tokens.ids.tolist()]
        told = []
        for fit in (0, 1):
            others = torch.cat([_spread(x[fit], alike[fit])])
            centre = others.mean(0)
            axis = torch.linalg.svd(x[fit][list(MANY)] - centre, full_matrices=False)[2][0]
            test = x[1 - fit][list(MANY)]
            reduced = centre + ((test - centre) @ axis)[:, None] * axis
            out = _mlp(subject, tokens, layer, torch.cat([test, reduced, centre[None]]))
            u = torch.stack([t.direction.double() for t in trace.traced if t.sequence == 1 - fit])
            full, part = ((y - out[-1:]) * u for y in (out[: len(MANY)], out[len(MANY) : -1]))
            told.append(float((part.sum(-1) / full.sum(-1)).mean()))
        mine = float(verdict.number("carried by 1")["mean"])
        return min(abs(mine - value) / max(1.0, abs(value)) for value in told)

    parts.add("carried by 1", measure)


def _spread(x: Tensor, at: list[int]) -> Tensor:
    return x[at[:: max(1, math.ceil(len(at) / 16))]]


def _mlp(subject: Subject, tokens: Tokens, layer: int, inputs: Tensor) -> Tensor:
    """What an MLP adds for given inputs, put into a forward of the host."""

    def put(x: Tensor, hook: Any) -> Tensor:
        new = x.clone()
        new.view(-1, x.shape[-1])[: len(inputs)] = inputs.to(new)
        return new

    kept: list[Tensor] = []
    hooks: list[Any] = [(f"blocks.{layer}.mlp.hook_in", put)]
    hooks.append((writing_hook(subject.model, ("mlp", layer)), lambda x, hook: kept.append(x.detach().double().cpu())))
    with torch.no_grad():
        subject.model.run_with_hooks(tokens.ids.to(subject.model.cfg.device), fwd_hooks=hooks, return_type=None)
    return kept[0].reshape(-1, kept[0].shape[-1])[: len(inputs)]
