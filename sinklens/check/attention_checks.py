"""What reads attention: scores, sinks, statistics, views, anatomy, contexts; and the model itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinklens.attention.backend import Backend
from sinklens.attention.flash import flash
from sinklens.attention.flash_proof import unsupported
from sinklens.attention.importance import FAR, MIN_FAR_QUERIES
from sinklens.bridge.adapters import attention_hook, block_input
from sinklens.bridge.capabilities import prove
from sinklens.check.reference_forward import visible
from sinklens.check.subject import LENGTH, SINKS, Parts, Subject, apart, gap
from sinklens.core.errors import SinklensWarning
from sinklens.find.anatomy import sink_anatomy
from sinklens.find.contexts import compare_contexts
from sinklens.find.lifetimes import Thresholds
from sinklens.find.residual_detectors import direction_criterion, wong_detect
from sinklens.find.scores import sink_scores
from sinklens.find.sinks import compare_methods, find_sinks, from_scores
from sinklens.forward.metrics import token_loss
from sinklens.heads.maps import Shown, attention_grid, attention_map
from sinklens.heads.statistics import attention_statistics
from sinklens.inputs.load import load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.inputs.vocabulary import named_tokens, vocabulary


def backends(subject: Subject) -> tuple[Backend, ...]:
    """Those that the model's proof allows."""
    return ("hooks",) if unsupported(subject.model) else ("hooks", "flash")


def naive_scores(facts: Any, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, beta [batch, layer, head, pos], uniform [batch, layer, pos], learned mass, by loops over keys."""
    batch, heads, length = weights[0].shape[:3]
    shape = (batch, len(weights), heads, length)
    alpha, beta = torch.zeros(shape, dtype=torch.float64), torch.full(shape, math.nan, dtype=torch.float64)
    uniform = torch.full((batch, len(weights), length), math.nan, dtype=torch.float64)
    index = torch.arange(length)
    for n, pattern in enumerate(weights):
        seen = visible(length, facts.causal, facts.windows[n])
        share = 1 / seen.sum(1).double()
        for k in range(length):
            queries = seen[:, k]
            far = queries & ((index - k).abs() >= FAR)
            alpha[:, n, :, k] = pattern[:, :, queries, k].cpu().mean(-1)
            if int(far.sum()) >= MIN_FAR_QUERIES:
                beta[:, n, :, k] = pattern[:, :, far, k].cpu().mean(-1)
                uniform[:, n, k] = share[far].mean()
    rest = torch.stack([(1 - w.sum(-1)).mean(-1).cpu() for w in weights], 1)
    return alpha, beta, uniform, rest


def check_model_runs(subject: Subject, parts: Parts) -> None:
    """The bridge against attention written out."""
    parts.add("block outputs", lambda: apart(subject.states(), subject.base.states))

    def logits() -> float:
        with torch.no_grad():
            ours = subject.model(subject.ids)
        assert subject.base.logits is not None
        return gap(ours, subject.base.logits)

    parts.add("logits", logits)


def check_tokens(subject: Subject, parts: Parts) -> None:
    """Random ids come back from the seed, are ordinary, and have the model's own first token."""

    def differences() -> float:
        some, again = (load_tokens(subject.model, "random", n_seqs=3, seq_len=12, seed=5) for _ in range(2))
        words = vocabulary(subject.model)
        prefix, suffix = words.special_tokens(None)
        inner = some.ids[:, len(prefix) : 12 - len(suffix)]
        special = torch.isin(inner, torch.tensor(sorted(words.special_ids), dtype=torch.long))
        wrong = int((some.ids != again.ids).sum()) + int(special.sum())
        for row in some.ids.tolist():
            wrong += row[: len(prefix)] != list(prefix) or row[12 - len(suffix) :] != list(suffix)
        return float(wrong)

    parts.add("differences", differences)


def check_named(subject: Subject, parts: Parts) -> None:
    """Where tokens with given ids stand, by a loop."""

    def differences() -> float:
        chosen = [int(subject.tokens.ids[0, 3]), int(subject.tokens.ids[1, 9])]
        found = named_tokens(subject.model, *chosen)(subject.tokens.ids)
        naive = [[i in chosen for i in row] for row in subject.tokens.ids.tolist()]
        return float((found != torch.tensor(naive)).sum())

    parts.add("differences", differences)


def check_capabilities(subject: Subject, parts: Parts) -> None:
    """The record is the same when it is proven again, and patterns are the declared softmax."""
    parts.add("record", lambda: float(prove(subject.model) != subject.facts))

    def patterns() -> float:
        kept: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: Any) -> None:
            kept[hook.name] = tensor.detach()

        names = [attention_hook(n, "hook_pattern") for n in range(subject.facts.n_layers)]
        with torch.no_grad():
            subject.model.run_with_hooks(subject.ids, fwd_hooks=[(n, keep) for n in names], return_type=None)
        return max(gap(kept[n], layer.weights) for n, layer in zip(names, subject.base.layers, strict=True))

    parts.add("patterns", patterns)


def check_scores(subject: Subject, parts: Parts) -> None:
    """alpha, beta, the uniform share and the learned mass, with padding on either side."""
    naive = naive_scores(subject.facts, [layer.weights for layer in subject.base.layers])

    def one(backend: Backend, tokens: Tokens, positions: Any = None) -> Callable[[], float]:
        def measure() -> float:
            found = sink_scores(subject.model, tokens, backend=backend, positions=positions, progress=False)
            absent = torch.zeros_like(naive[3]) if subject.facts.shares else naive[3]
            rest = absent if found.learned_sink is None else found.learned_sink
            kept = slice(None) if positions is None else list(positions)
            pairs = ((found.alpha[..., kept], naive[0][..., kept]), (found.beta[..., kept], naive[1][..., kept]))
            return max(*(gap(a, b) for a, b in pairs), gap(found.uniform, naive[2]), gap(rest, naive[3]))

        return measure

    for backend in backends(subject):
        parts.add(backend, one(backend, subject.tokens))
        for side in ("left", "right"):
            parts.add(f"{backend}, padded {side}", one(backend, subject.tokens.pad(side, 3)))
        parts.add(f"{backend}, some positions", one(backend, subject.tokens, SINKS))


def between(beta: Tensor) -> dict[str, Any]:
    """Thresholds that some tokens pass, and that no rounding can cross: in the widest gap between masses."""
    mass = beta.double().mean(2).flatten()
    mass = mass[~mass.isnan()].sort().values
    gaps = mass.diff()[len(mass) // 2 :]
    at = len(mass) // 2 + int(gaps[: max(1, len(gaps) // 2)].argmax())
    return {"uniform_factor": 0.0, "activity": float((mass[at] + mass[at + 1]) / 2)}


def check_find(subject: Subject, parts: Parts) -> None:
    """The sinks of naive scores."""
    alpha, beta, uniform, _ = naive_scores(subject.facts, [layer.weights for layer in subject.base.layers])
    scores = replace(subject.scores, alpha=alpha.float(), beta=beta.float(), uniform=uniform.float())
    options = between(scores.beta)

    def differences(backend: Backend) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            found = find_sinks(subject.model, subject.tokens, backend=backend, progress=False, **options)
            expected = from_scores(scores, replace(Thresholds(), **options))
        return len(set(_lives(found)) ^ set(_lives(expected))) + (0.0 if len(expected) else 1.0)

    for backend in backends(subject):
        parts.add(backend, lambda backend=backend: differences(backend))


def _lives(found: Any) -> list[tuple[Any, ...]]:
    return [(s.sequence, s.position, s.kind, s.onset, s.end, s.bridged) for s in found]


def check_methods(subject: Subject, parts: Parts) -> None:
    """Counts of the three methods; directions and Wong et al.'s rule on residuals of the written-out run."""

    def measure() -> float:
        table = compare_methods(subject.model, subject.tokens, progress=False).to_dict("records")
        by = {row["method"]: row for row in table}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            scores = subject.scores
            expected = from_scores(scores)
            wrong = abs(by["attention"]["sinks"] - len(expected))
            found = find_sinks(subject.model, subject.tokens, method="direction", scores=scores, progress=False)
        starts: list[Tensor] = []
        subject.written(
            hooks=[(block_input(0), lambda x, hook: starts.append(x.detach().double().cpu()))]  # the embedding
        )
        states = torch.cat([starts[0][None], subject.base.states[:-1]])
        for b in range(len(subject.tokens)):
            _, active = direction_criterion(states[:, b], expected.strongest[b], expected.thresholds)
            told = {s.position for s in (*found.sinks, *found.unattended) if s.sequence == b}
            wrong += len(told - set(active.any(0).nonzero().flatten().tolist()))
        return float(wrong + abs(by["direction"]["sinks"] - len(found)))

    parts.add("differences", measure)

    def wong() -> float:
        table = compare_methods(subject.model, subject.tokens, methods=("attention", "wong"), progress=False)
        names = ["ln_final.hook_in", "ln_final.hook_out"] if hasattr(subject.model, "ln_final") else []
        ends: list[Tensor] = []
        hooks = [(name, lambda x, hook: ends.append(x.detach().double().cpu())) for name in names]
        run = subject.written(hooks=hooks)
        closes = bool(ends) and torch.allclose(ends[0], run.states[-1].to(ends[0]), atol=1e-5)  # BERT's is in its head
        states = torch.cat([run.states[:-1], (ends[1] if closes else run.states[-1])[None]])
        count = sum(
            t.label != "noise" and bool(t.layers) for b in range(len(subject.tokens)) for t in wong_detect(states[:, b])
        )
        return float(abs(int(table.to_dict("records")[1]["sinks"]) - count))

    parts.add("wong", wong)


def check_statistics(subject: Subject, parts: Parts) -> None:
    """Mass, margin, competitor-free margin, entropy, value norms of two sinks."""
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    inside[list(SINKS)] = True

    def one(backend: Backend) -> float:
        found = attention_statistics(
            subject.model, subject.tokens, list(SINKS), entropy=True, backend=backend, progress=False
        )
        worst = 0.0
        assert found.entropy is not None
        for n, layer in enumerate(subject.base.layers):
            weights, scores = layer.weights.cpu(), layer.scores.cpu()
            rest = scores.masked_fill(inside, -torch.inf).logsumexp(-1)
            learned = None if layer.learned is None else layer.learned.cpu()
            rest = rest if learned is None else torch.logaddexp(rest, learned[:, None].expand_as(rest))
            margin = scores[..., inside].logsumexp(-1) - rest
            row = torch.special.entr(weights).sum(-1)
            groups = found.value_norm.shape[2]
            bias = 0.0 if layer.bias is None else layer.bias[:, None]
            norms = (layer.v - bias).norm(dim=-1)[:, :: layer.v.shape[1] // groups]
            worst = max(
                worst,
                gap(found.mass[:, n], weights[..., inside].sum(-1)),
                gap(found.margin[:, n], margin),
                gap(found.entropy[:, n], row),
                gap(found.value_norm[:, n], norms),
                _free(found.free_margin[:, n], scores, inside, subject, n),
            )
        return worst

    for backend in backends(subject):
        parts.add(backend, lambda backend=backend: one(backend))


def _free(ours: Tensor, scores: Tensor, inside: Tensor, subject: Subject, n: int) -> float:
    """The competitor-free margin: the mean over later, far queries of the score less the log-sum-exp of the rest."""
    index = torch.arange(LENGTH)
    seen = visible(LENGTH, subject.facts.causal, subject.facts.windows[n])
    naive = torch.full_like(ours, math.nan, dtype=torch.float64)
    for s, position in enumerate(SINKS):
        queries = seen[:, position] & (index - position >= FAR) & (seen & ~inside).any(1)
        rows = []
        for i in queries.nonzero().flatten().tolist():
            others = seen[i] & ~inside
            lse = scores[:, :, i, others].logsumexp(-1)
            rows.append(scores[:, :, i, position] - lse)
        if rows:
            naive[:, :, s] = torch.stack(rows).mean(0)
    return gap(ours, naive)


def check_loss(subject: Subject, parts: Parts) -> None:
    """The loss of written-out logits: of the next token, or of tokens masked one by one."""

    def measure() -> float:
        found = token_loss(subject.model, subject.tokens, mask_id=subject.mask_id).double()
        known = ~found.isnan()
        if int(known.sum()) < LENGTH:
            return math.inf
        return gap(found[known], subject.losses(subject.ids)[known])

    parts.add("nats", measure)


def check_flash(subject: Subject, parts: Parts) -> None:
    """Block outputs under the flash backend, and exactly the host's behind it."""

    def inside() -> float:
        with flash(subject.model):
            return apart(subject.states(), subject.base.states)

    parts.add("block outputs", inside)

    def after() -> float:
        before = subject.states()
        with flash(subject.model):
            subject.states()
        return float(not torch.equal(before, subject.states()))

    parts.add("restored", after)


def check_map(subject: Subject, parts: Parts) -> None:
    """The drawn numbers of one head."""
    layer, head = subject.facts.n_layers - 1, subject.facts.n_heads - 1
    one = subject.tokens[0]
    seen = visible(LENGTH, subject.facts.causal, subject.facts.windows[layer])

    def drawn(kind: Shown) -> float:
        figure = attention_map(subject.model, one, layer=layer, head=head, kind=kind)
        values = _numbers(figure.data[0])
        if kind == "probabilities":
            return gap(values, subject.base.layers[layer].weights[0, head].cpu().masked_fill(~seen, math.nan))
        scores = subject.base.layers[layer].scores[0, head].cpu()
        shift = torch.where(seen, values.double() - scores, math.nan)
        shift = shift - shift.nanmean(1, keepdim=True) if subject.facts.architecture.startswith("Bloom") else shift
        return float(shift[seen].abs().max() / scores[seen].abs().max().clamp(min=1))

    parts.add("probabilities", lambda: drawn("probabilities"))
    parts.add("logits", lambda: drawn("logits"))


def check_grid(subject: Subject, parts: Parts) -> None:
    """The drawn numbers of one head in every layer."""

    def measure() -> float:
        layers = list(range(subject.facts.n_layers))
        figure = attention_grid(subject.model, subject.tokens[1], head=0, layers=layers)
        worst = 0.0
        for n, trace in zip(layers, figure.data, strict=True):
            seen = visible(LENGTH, subject.facts.causal, subject.facts.windows[n])
            expected = subject.base.layers[n].weights[1, 0].cpu().masked_fill(~seen, math.nan)
            worst = max(worst, gap(_numbers(trace), expected))
        return worst

    parts.add("probabilities", measure)


def _numbers(trace: Any) -> Tensor:
    return torch.tensor([[math.nan if x is None else float(x) for x in row] for row in trace.z])


def check_anatomy(subject: Subject, parts: Parts) -> None:
    """Residual norms, far importance, margin, value norms and scores of the declared sinks."""

    def measure() -> float:
        found = sink_anatomy(subject.model, subject.sinks, progress=False)
        kept = torch.ones(LENGTH, dtype=torch.bool)
        kept[list(SINKS)] = False
        starts: list[Tensor] = []
        subject.written(hooks=[(block_input(0), lambda x, hook: starts.append(x.detach().double().cpu()))])
        inputs = torch.cat([starts[0][None], subject.base.states[:-1]])
        worst = 0.0
        for row in found.layers.to_dict("records"):
            norm = inputs[row["layer"], row["sequence"]].norm(dim=-1)
            worst = max(worst, gap(row["residual_norm"], norm[row["position"]]))
            worst = max(worst, gap(row["residual_ratio"], norm[row["position"]] / norm[kept].float().median()))
        _, beta, _, _ = naive_scores(subject.facts, [layer.weights for layer in subject.base.layers])
        for row in found.heads.to_dict("records"):
            b, n, h, p = (row[name] for name in ("sequence", "layer", "head", "position"))
            layer = subject.base.layers[n]
            bias = 0.0 if layer.bias is None else layer.bias[h]
            norms = (layer.v[b, h] - bias).norm(dim=-1).cpu()
            worst = max(worst, gap(row["beta"], beta[b, n, h, p]))
            worst = max(worst, gap(row["v_ratio"], norms[p] / norms[kept].float().median()))
            if layer.k is not None and "qk" in row:
                worst = max(worst, gap(row["k_norm"], layer.k[b, h, p].norm()))
        return worst

    parts.add("tables", measure)


def check_contexts(subject: Subject, parts: Parts) -> None:
    """The row of random ids against the mean of written-out attention on the first token."""

    def measure() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)
            table = compare_contexts(
                subject.model, "random", contexts=("random",), lengths=(LENGTH,), n_seqs=2, progress=False
            )
        tokens = load_tokens(subject.model, "random", n_seqs=2, seq_len=LENGTH)
        other = Subject(subject.model, tokens, tokens)
        alpha = naive_scores(other.facts, [layer.weights for layer in other.base.layers])[0]
        row = table.to_dict("records")[0]
        rate = float((alpha[..., 0] > 0.3).double().mean())
        return max(gap(row["alpha"], alpha[..., 0].mean()), abs(row["sink_rate"] - rate))

    parts.add("random ids", measure)
