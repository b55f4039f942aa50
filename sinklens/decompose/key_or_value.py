"""The 2x2 and the four claims, measured: by loss and KL, or on encoders by ``1 - cos`` of the mean-pooled embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.ablate import ablate_sinks
from sinklens.ablate.partition import Mode
from sinklens.attention.backend import hooked
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import block_output
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.decompose.two_by_two import CELLS, Key, TwoByTwo
from sinklens.experiment.ablation_sweep import Over, first_order, grows, scored_positions, sweep_ablation
from sinklens.experiment.controls import slots
from sinklens.experiment.experiment import run_experiment
from sinklens.find.locations import Places
from sinklens.find.sinkmap import SinkMap
from sinklens.forward.follow import numbered
from sinklens.forward.metrics import METRICS, token_metrics
from sinklens.forward.predictions import scored_logits
from sinklens.inputs.tokens import Tokens
from sinklens.models.load import has_trained_head
from sinklens.show.progress import progress_bar

Scope = Literal["all", "layer", "head"]
SCOPES = get_args(Scope)
EMBEDDING = "embedding"
HEAD_LENGTH = 128
EXACT_HEADS = 20
TESTS: dict[str, tuple[Mode, dict[str, Any]]] = {
    **{cell: (cell, {}) for cell in CELLS},
    "fixed_key, neutral value": ("fixed_key", {"value": "neutral"}),
    "fixed_logit": ("fixed_logit", {}),
}


def check_metrics(model: TransformerBridge, metrics: Sequence[str] | str | None) -> tuple[str, ...]:
    """The metrics of the 2x2: loss and KL where the model predicts a next token, else the embedding's change.

    Raises:
        BadInputError: a loss on an encoder, or an unknown name.
    """
    facts = capabilities(model)
    predicts = facts.causal and has_trained_head(model)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    if metrics is None:
        return ("loss", "kl") if predicts else (EMBEDDING,)
    wrong = [m for m in metrics if m not in ("loss", "kl", EMBEDDING)]
    if wrong or not metrics:
        raise BadInputError(f"metrics of the 2x2 must be loss, kl or {EMBEDDING}, got {wrong or 'none'}")
    if not predicts and set(metrics) & {"loss", "kl"}:
        raise BadInputError(
            f"{facts.model} predicts no next token (an encoder, or weights without a language-model head), which the "
            f"2x2's loss is of; leave metrics out, or ask for {EMBEDDING!r}: 1 - cos of the mean-pooled embedding"
        )
    return tuple(metrics)


def whole(
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    known: SinkMap | None,
    metrics: Sequence[str],
    reference: Any,
    most_scored: int | None,
    seed: int,
    progress: bool | None,
) -> tuple[TwoByTwo, dict[str, Tensor], list[str]]:
    """All heads at once: the 2x2, the change of the first metric under every test, and what could not run."""
    notes: list[str] = []
    hooks: dict[str, Any] = {}
    for label, (mode, options) in TESTS.items():
        more = {**options} if mode in CELLS else {**options, "reference": reference}
        try:
            hooks[label] = ablate_sinks(model, places, mode, **more, progress=progress)
        except (UnsupportedModelError, BadInputError) as error:
            if mode in CELLS:
                raise
            notes.append(f"{label} could not run: {error}")
    found: dict[str, dict[str, Tensor]] = {}
    likelihood: list[Any] = [m for m in metrics if m != EMBEDDING]
    if likelihood:
        experiment = run_experiment(
            model, tokens, hooks, controls=(), metrics=likelihood, sinks=known, most_scored=most_scored, seed=seed,
            progress=progress,
        )  # fmt: skip
        notes += list(experiment.notes)
        found = {m: {label: experiment.change(m, label) for label in hooks} for m in likelihood}
    if EMBEDDING in metrics:
        with progress_bar("embeddings", len(tokens), progress) as advance:
            rows = []
            for b in range(len(tokens)):
                rows.append(embedding_changes(model, tokens, places, b, list(hooks.values())))
                advance()
        table = torch.stack(rows, -1)
        found[EMBEDDING] = {label: table[i] for i, label in enumerate(hooks)}
    for label, made in hooks.items():
        notes += [f"{label}: {note}" for note in made.notes]
    values = {m: torch.stack([found[m][cell] for cell in CELLS])[:, None] for m in metrics}
    together = {m: v[:, 0].clone() for m, v in values.items()}
    one = torch.ones(1, dtype=torch.bool)
    square = TwoByTwo("all", ("all",), values, together, one, tokens.documents, _longest(tokens))
    return square, found[metrics[0]], list(dict.fromkeys(notes))


def by_layer(
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    metrics: Sequence[str],
    most_scored: int | None,
    seed: int,
    progress: bool | None,
) -> TwoByTwo:
    """Every layer by itself: three sweeps in a growing batch, or a forward per layer where rows cannot join it."""
    layers = [n for n in range(capabilities(model).n_layers) if places.acts_in(n)]
    if EMBEDDING in metrics or not grows(model):
        return _by_forwards(model, tokens, places, metrics, layers, most_scored, seed, progress)
    return _by_sweeps("layer", model, tokens, places, metrics, most_scored, seed, progress)


def by_head(
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    metrics: Sequence[str],
    exact: int | None,
    most_scored: int | None,
    seed: int,
    progress: bool | None,
) -> TwoByTwo:
    """Every (layer, head) by itself, on the first 128 tokens of each sequence.

    ``exact`` heads with the largest first-order effects are measured, the others estimated; None measures all. To
    first order the interaction is 0, and KL is 0 altogether: it is given for measured heads only.
    """
    facts = capabilities(model)
    short, places = shortened(tokens, places)
    keys = [(n, h) for n in range(facts.n_layers) if places.acts_in(n) for h in range(facts.n_heads)]
    if EMBEDDING in metrics or not grows(model):
        return _by_forwards(model, short, places, metrics, keys, most_scored, seed, progress)
    if exact is None:
        return _by_sweeps("head", model, short, places, metrics, most_scored, seed, progress)
    values = {m: torch.full((len(CELLS), len(keys), len(short)), math.nan, dtype=torch.float64) for m in metrics}
    cells = [ablate_sinks(model, places, cell) for cell in CELLS]
    rows = [b for b in range(len(short)) if _edited(places, short, b)]
    guess = torch.full((len(CELLS), len(keys), len(short)), math.nan, dtype=torch.float64)
    with progress_bar("first-order effects of heads", len(rows), progress) as advance, hooked(model):
        for b in rows:
            one, scored = _scored(model, short, places, b, most_scored, seed)
            for c, hooks in enumerate(cells):
                with numbered([b]):
                    found = first_order(model, hooks, one.ids, scored)
                guess[c, :, b] = torch.stack([found[layer, head] for layer, head in keys])
            advance()
    if "loss" in metrics:
        values["loss"] = guess.clone()
    size = guess[0].nanmean(-1).abs().nan_to_num()
    top = size.topk(min(exact, len(keys))).indices.tolist()
    measured = _by_forwards(model, short, places, metrics, [keys[k] for k in top], most_scored, seed, progress)
    for m in metrics:
        values[m][:, top] = measured.values[m]
    known = torch.zeros(len(keys), dtype=torch.bool)
    known[top] = True
    return _square("head", keys, values, measured.together, known, short, places)


def shortened(tokens: Tokens, places: Places) -> tuple[Tokens, Places]:
    """The first 128 tokens of every sequence, and the same sinks there, in the layers of their lives."""
    if int(tokens.lengths.max()) <= HEAD_LENGTH or places.predicate is not None:
        return tokens.first(HEAD_LENGTH), places
    short = tokens.first(HEAD_LENGTH)
    if places.tokens is None:
        kept = replace(places, positions=tuple(p for p in places.positions if p < HEAD_LENGTH))
    else:
        entries = tuple(e for e in places.entries if e.position < HEAD_LENGTH)
        others = tuple((b, p) for b, p in places.others if p < HEAD_LENGTH)
        kept = replace(places, tokens=short, entries=entries, others=others)
    if not kept.columns_wanted:
        raise BadInputError(
            f"the first {HEAD_LENGTH} tokens of these sequences hold none of the sinks, so heads cannot be measured "
            f"one by one; leave 'head' out of effects"
        )
    return short, kept


def _by_sweeps(
    scope: str,
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    metrics: Sequence[str],
    most_scored: int | None,
    seed: int,
    progress: bool | None,
) -> TwoByTwo:
    """Every key exactly, one sweep per cell."""
    over: Over = "layer" if scope == "layer" else "layer-head"
    sweeps = [
        sweep_ablation(model, tokens, places, cell, over=over, most_scored=most_scored, seed=seed, progress=progress)
        for cell in CELLS
    ]
    values = {m: torch.stack([s.metrics[m] for s in sweeps]) for m in metrics}
    keys: tuple[Any, ...] = sweeps[0].keys
    together = _together(model, tokens, places, metrics, most_scored, seed)
    return _square(scope, keys, values, together, None, tokens, places)


def _by_forwards(
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    metrics: Sequence[str],
    keys: Sequence[Key],
    most_scored: int | None,
    seed: int,
    progress: bool | None,
) -> TwoByTwo:
    """One forward per key and cell."""
    made = []
    for key in keys:
        where: dict[str, Any] = {"heads": [key]} if isinstance(key, tuple) else {"layers": [key]}
        made += [ablate_sinks(model, places, cell, **where) for cell in CELLS]
    shape = (len(keys), len(CELLS), len(tokens))
    values = {m: torch.full(shape, math.nan, dtype=torch.float64) for m in metrics}
    rows = [b for b in range(len(tokens)) if _edited(places, tokens, b)]
    scope = "head" if keys and isinstance(keys[0], tuple) else "layer"
    with progress_bar(f"2x2 of {len(keys)} {scope}s", len(rows), progress) as advance:
        for b in rows:
            if EMBEDDING in metrics:
                values[EMBEDDING][..., b] = embedding_changes(model, tokens, places, b, made).view(shape[:2])
            if set(metrics) - {EMBEDDING}:
                found = _likelihood(model, tokens, places, b, made, most_scored, seed)
                for m in set(metrics) - {EMBEDDING}:
                    values[m][..., b] = found[m].view(shape[:2])
            advance()
    moved = {m: v.transpose(0, 1).contiguous() for m, v in values.items()}
    together = _together(model, tokens, places, metrics, most_scored, seed)
    return _square(scope, keys, moved, together, None, tokens, places)


def _square(
    scope: str,
    keys: Sequence[Key],
    values: dict[str, Float[Tensor, "cell key batch"]],
    together: dict[str, Float[Tensor, "cell batch"]],
    exact: Tensor | None,
    tokens: Tokens,
    places: Places,
) -> TwoByTwo:
    """The result; NaN for a sequence none of whose sinks is alive in a key's layer."""
    layers = [key[0] if isinstance(key, tuple) else key for key in keys]
    alive = torch.tensor(
        [
            [any(e.layers is None or layer in e.layers for e in slots(places, tokens, b)) for b in range(len(tokens))]
            for layer in layers
        ]
    )
    known = {m: torch.where(alive, v, torch.nan) for m, v in values.items()}
    exact = torch.ones(len(keys), dtype=torch.bool) if exact is None else exact
    return TwoByTwo(scope, tuple(keys), known, together, exact, tokens.documents, _longest(tokens))


def _together(
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    metrics: Sequence[str],
    most_scored: int | None,
    seed: int,
) -> dict[str, Float[Tensor, "cell batch"]]:
    """All layers and heads at once, on the predictions that single ones are judged by."""
    made = [ablate_sinks(model, places, cell) for cell in CELLS]
    found = {m: torch.full((len(CELLS), len(tokens)), math.nan, dtype=torch.float64) for m in metrics}
    for b in (b for b in range(len(tokens)) if _edited(places, tokens, b)):
        if EMBEDDING in metrics:
            found[EMBEDDING][:, b] = embedding_changes(model, tokens, places, b, made)
        if set(metrics) - {EMBEDDING}:
            changes = _likelihood(model, tokens, places, b, made, most_scored, seed)
            for m in set(metrics) - {EMBEDDING}:
                found[m][:, b] = changes[m]
    return found


def _likelihood(
    model: TransformerBridge,
    tokens: Tokens,
    places: Places,
    b: int,
    edits: Sequence[Any],
    most_scored: int | None,
    seed: int,
) -> dict[str, Tensor]:
    """Change of loss, and KL, of each edit on one sequence."""
    one, scored = _scored(model, tokens, places, b, most_scored, seed)
    targets = one.ids[0, 1:][scored.to(one.ids.device)]
    base = scored_logits(model, one.ids, scored, [])
    before = token_metrics(METRICS["loss"], base, base, targets).double().mean()
    changes: dict[str, list[Tensor]] = {"loss": [], "kl": []}
    for hooks in edits:
        with numbered([b]):
            logits = scored_logits(model, one.ids, scored, hooks)
        changes["loss"].append(token_metrics(METRICS["loss"], logits, base, targets).double().mean() - before)
        changes["kl"].append(token_metrics(METRICS["kl"], logits, base, targets).double().mean())
    return {name: torch.stack(values) for name, values in changes.items()}


def embedding_changes(
    model: TransformerBridge, tokens: Tokens, places: Places, b: int, edits: Sequence[Any]
) -> Float[Tensor, " edit"]:
    """``1 - cos`` of the mean-pooled last block's output to the unedited one; NaN where there is nothing to edit."""
    if not _edited(places, tokens, b):
        return torch.full((len(edits),), math.nan, dtype=torch.float64)
    one = tokens[b].trim().to(str(model.cfg.device))
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor[0].double().mean(0).cpu())

    last = (block_output(capabilities(model).n_layers - 1), keep)
    with numbered([b]):
        for hooks in ([], *edits):
            run_blocks(model, one.ids, [*hooks, last])
    return torch.stack([1 - torch.cosine_similarity(x, kept[0], dim=0) for x in kept[1:]])


def _edited(places: Places, tokens: Tokens, b: int) -> bool:
    return bool(slots(places, tokens, b)) or not places.columns_wanted


def _scored(
    model: TransformerBridge, tokens: Tokens, places: Places, b: int, most: int | None, seed: int
) -> tuple[Tokens, Tensor]:
    one = tokens[b].trim().to(str(model.cfg.device))
    return one, scored_positions(one, {e.position for e in slots(places, tokens, b)}, most, seed + b)


def _longest(tokens: Tokens) -> int:
    return int(tokens.lengths.max())
