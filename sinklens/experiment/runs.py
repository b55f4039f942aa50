"""Every run of an experiment on a few sequences at once: metrics of the scored tokens, side effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.blockwise import edited_attention
from sinklens.ablate.edit_hooks import delegates
from sinklens.ablate.hooks import Hooks
from sinklens.attention.backend import hooked
from sinklens.attention.flash import flash
from sinklens.attention.run import run_blocks
from sinklens.bridge.capabilities import capabilities
from sinklens.experiment.plan import Plan, Planned
from sinklens.experiment.side_effects import Watch, Watches
from sinklens.find.lifetimes import activity as active_where
from sinklens.find.sinkmap import assemble
from sinklens.forward.follow import numbered
from sinklens.forward.metrics import Metric, token_metrics
from sinklens.forward.predictions import row_logits

SHORT = 256  # tokens; a forward of a longer sequence gains nothing from others beside it
MOST_TOKENS = 1024  # of sequences that share a forward
MOST_LOGITS = 64_000_000  # scored predictions times vocabulary, so that a batch's logits stay below 256 MB
Measured = tuple[Float[Tensor, "run metric pos"], list[dict[str, Any]]]


def groups(plan: Plan, vocabulary: int) -> list[list[int]]:
    """Which sequences share a forward: neighbours of one length, if short, so that the weights are read once for them.

    Decided by the plan alone, so that an experiment that is resumed gives the same bits. Hooks that sinklens did not
    build may count on a batch of one; a predicate must choose something in every sequence: these run one by one, and
    so do an encoder's masked copies.
    """
    together = not plan.read.masked and all(_by_rows(run.hooks) for run in plan.runs)
    found: list[list[int]] = []
    for b, length in enumerate(plan.tokens.lengths.tolist()):
        most = min(MOST_TOKENS // length, MOST_LOGITS // (length * vocabulary))
        last = found[-1] if found else []
        fits = last and len(last) < most and int(plan.tokens.lengths[last[0]]) == length <= SHORT
        if together and fits:
            last.append(b)
        else:
            found.append([b])
    return found


def _by_rows(hooks: Sequence[Any]) -> bool:
    """Whether hooks treat each row of a batch as they treat it alone."""
    if not isinstance(hooks, Hooks):
        return not len(hooks)
    return hooks.places is None or hooks.places.predicate is None


def measure(
    model: TransformerBridge,
    plan: Plan,
    group: Sequence[int],
    runs: Sequence[Planned],
    metrics: dict[str, Metric],
    way: str,
    advance: Callable[[], None],
) -> dict[int, Measured]:
    """Every run on a group of sequences of one length: metrics of the scored tokens, side effects; by sequence."""
    some = plan.tokens[list(group)].trim().to(str(model.cfg.device))
    length, scored = int(some.lengths[0]), [plan.scored[b] for b in group]
    values = torch.full((len(group), len(runs), len(metrics), length), torch.nan)
    side: list[list[dict[str, Any]]] = [[] for _ in group]
    targets = [plan.read.targets(some.ids[i : i + 1], rows) for i, rows in enumerate(scored)]
    bases: list[Tensor] | None = None
    before: list[set[int]] = []
    for r, run in enumerate(runs):
        for _ in group:
            advance()
        if not any(run.counts[b] for b in group):
            continue
        watches = [_watch(model, plan, b, run, length, way) for b in group]
        with numbered(group):
            found = _logits(model, plan, some.ids, scored, run, Watches(watches), way)
        bases = found if bases is None else bases
        for i, b in enumerate(group):
            if not run.counts[b]:
                continue
            for m, metric in enumerate(metrics.values()):
                values[i, r, m, scored[i]] = token_metrics(metric, found[i], bases[i], targets[i]).float()
            active = {s.position for s in _active(watches[i], plan, b)}
            if len(before) == i:
                before.append(active)
            side[i].append(
                {"label": run.label, "control": run.control, "sequence": b, **watches[i].summary()}
                | {"new_sinks": len(active - before[i]), "lost_sinks": len(before[i] - active)}
            )
    return {b: (values[i], side[i]) for i, b in enumerate(group)}


def _watch(model: TransformerBridge, plan: Plan, b: int, run: Planned, length: int, way: str) -> Watch:
    """What looks at the side effects of a run on one sequence."""
    edited = torch.zeros(capabilities(model).n_layers, length, dtype=torch.bool)
    for place in run.places[b]:
        edited[sorted(place.layers) if place.layers is not None else slice(None), place.position] = True
    sinks = torch.zeros(length, dtype=torch.bool)
    sinks[[p for s, p in plan.found.places or () if s == b]] = True
    return Watch(model, length, edited, sinks, blind=way == "hooks" and delegates(model))


def _logits(
    model: TransformerBridge,
    plan: Plan,
    ids: Tensor,
    scored: Sequence[Tensor],
    run: Planned,
    watches: Watches,
    way: str,
) -> list[Float[Tensor, "_ vocabulary"]]:
    """The logits at the scored positions of each sequence, watched."""
    first, last = watches.hooks()
    with flash(model) if way == "flash" else hooked(model) as state:
        if state is not None:
            state.watch, state.edited = watches, edited_attention
        hooks = [*first, *run.hooks, *last]
        if plan.read.masked:
            run_blocks(model, ids, hooks, flashing=state is not None)
            hooks = [*run.hooks]
            if state is not None:
                state.watch = None
        if plan.read.masked:
            return [plan.read.logits(model, ids, scored[0], hooks)]
        return row_logits(model, ids, scored, hooks)


def _active(watch: Watch, plan: Plan, b: int) -> Sequence[Any]:
    """The sinks of an edited run, by the same thresholds."""
    one = plan.tokens[b].trim()
    uniform = plan.found.uniform[b : b + 1, :, : int(one.lengths[0])]
    mass = watch.mass[None]
    thresholds = plan.found.thresholds
    found, _ = assemble(active_where(mass, uniform, thresholds), mass, None, one, thresholds, attended=None)
    return found
