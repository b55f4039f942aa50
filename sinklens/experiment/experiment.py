"""``run_experiment``: interventions beside their controls, on the same batches, judged by the same tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.hooks import Hooks
from sinklens.attention.backend import Backend, Flash
from sinklens.bridge.capabilities import capabilities, same_model
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.experiment.checkpoint import Store
from sinklens.experiment.controls import Control
from sinklens.experiment.plan import Plan, Planned, check_controls
from sinklens.experiment.result import UNTRAINED, Experiment
from sinklens.experiment.runs import groups, measure
from sinklens.find.flash_scores import choose_backend
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.forward.metrics import METRICS, Metric
from sinklens.forward.predictions import check_masking, predictions
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.models.load import untrained_twin
from sinklens.show.progress import progress_bar

Intervention = Sequence[tuple[Any, Callable[..., Any]]] | Callable[[Tokens], Hooks]


@public
def run_experiment(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    interventions: Mapping[str, Intervention],
    *,
    controls: Sequence[Control] | Mapping[str, Mapping[str, Sequence[Any]]] = ("random", "recent"),
    metrics: Sequence[Literal["loss", "kl", "top1"] | Metric] = ("loss", "kl", "top1"),
    sinks: SinkMap | None = None,
    twin: bool = False,
    split: bool = False,
    most_scored: int | None = None,
    mask_id: int | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    backend: Backend = "auto",
    progress: bool | None = None,
) -> Experiment:
    """Run base, interventions and controls on the same sequences, and keep every token's metrics.

    Args:
        model: a decoder, or an encoder with a trained masked-LM head: its loss is the pseudo-loss of masked tokens.
        tokens: the sequences; intervals need 16 documents.
        interventions: by label: what a hook builder returns, a plain list of TransformerLens hooks, or a function from
            the discovery half's Tokens to hooks (with ``split``).
        controls: names from ``random``, ``recent``, ``same_id``, ``matched`` (see :mod:`sinklens.experiment.controls`),
            made for every intervention that has positions; or your own: ``{label: {name: hooks}}``; or ``()``.
        metrics: ``loss`` (nats), ``kl`` (KL(base || edited), nats), ``top1`` (agreement of the likeliest token with
            base), or functions ``f(logits, base_logits, targets) -> value per token``.
        sinks: the sinks of these tokens, unfiltered, if at hand; default: :func:`sinklens.find_sinks` (not with split).
        twin: run every intervention on an untrained twin too (same shape, random weights): the floor of each effect.
        split: halve the documents at random; interventions given as functions are built on the discovery half, all
            effects are measured on the other.
        most_scored: score at most so many predictions per sequence, drawn at random, the same in every run.
        mask_id: the id of an encoder's [MASK], where its tokenizer names none.
        seed: of draws: controls, split, scored positions, the twin.
        backend: "flash" runs attention in blocks of query rows, in O(T) memory; "hooks" lets the host do it; "auto"
            takes flash where the model's proof and all hooks allow it. ``info["backend"]`` says which ran.
        resume: a folder; every finished sequence is kept there, and a second call goes on where the first ended.
        progress: show a bar.

    Scored are the predictions made at every position that is no sink, no edited place and no control's place: one set
    for base, interventions and controls. A sequence in which an intervention has nothing to edit, or a control not as
    many places as the sinks, does not count for that row.

    An encoder's prediction at a position is of the token there, replaced by [MASK], from the rest (special tokens are
    not scored): ``-log p(token p | the rest)``, Salazar et al. 2020. Base, interventions and controls run on the same
    masked copies, and edits act on each copy at the positions that they have in the text. Side effects are those of
    the text without a mask.

    Cost: per sequence one forward without the unembedding for the sinks, one for the base, and one per intervention
    and control (and the same again for ``twin``); encoders: one more row of a forward per scored position and run.
    Neighbouring sequences of one length up to 256 tokens share forwards of at most 1024 tokens. The base's logits of
    one forward are held.

    Raises:
        BadInputError: nothing to run, unknown names, a plain list of hooks with named controls, a folder of another
            experiment.
        UnsupportedModelError: weights without a trained language-model head, an encoder without a known mask token.
    """
    read = predictions(model, mask_id)
    if not interventions:
        raise BadInputError("there is no intervention to run; give {'label': hooks}")
    batch = as_tokens(model, tokens).to("cpu")
    discovery, test = _halves(batch, seed) if split else (batch, batch)
    named = {label: _hooks(label, given, discovery, split) for label, given in interventions.items()}
    check_controls(controls, named)
    chosen_metrics = _metrics(metrics)
    found = _found(model, test, sinks, progress)
    plan = Plan(test, found, named, controls, seed, most_scored, read)
    if read.mask_id is not None:
        check_masking(model, test[0].trim().to(str(model.cfg.device)).ids, int(plan.scored[0][0]), read.mask_id)
    way = _backend(model, plan, backend)
    store = Store(resume, plan, list(chosen_metrics), twin, way)
    shadow = untrained_twin(model, seed) if twin else None
    shadows = [] if shadow is None else [_on_twin(run, shadow) for run in plan.runs if not run.control]
    todo = [group for group in groups(plan, capabilities(model).vocabulary) if not all(store.has(b) for b in group)]
    total = sum(map(len, todo)) * (len(plan.runs) + len(shadows))
    with progress_bar("experiment", total, progress) as advance:
        for group in todo:
            here = measure(model, plan, group, plan.runs, chosen_metrics, way, advance)
            more = {} if shadow is None else measure(shadow, plan, group, shadows, chosen_metrics, way, advance)
            for b in group:
                if store.has(b):  # kept by a run that was killed within the group, which is measured as a whole
                    continue
                values, side = here[b]
                if b in more:
                    values, side = torch.cat([values, more[b][0]]), side + more[b][1]
                store.keep(b, values, side)
    return store.collect(discovery if split else None)


def _found(model: TransformerBridge, tokens: Tokens, given: SinkMap | None, progress: bool | None) -> SinkMap:
    """The sinks that controls avoid and side effects are counted against."""
    if given is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)  # the notes say it
            return find_sinks(model, tokens, progress=progress)
    if given.tokens.digest != tokens.digest or given.method != "attention":
        raise BadInputError("sinks= must be the attention sinks of the very tokens that are measured; leave it out")
    if not same_model(given.info, capabilities(model)):
        raise BadInputError("sinks= were found in another model; leave it out")
    return given


def _hooks(label: str, given: Intervention, discovery: Tokens, split: bool) -> Sequence[Any]:
    if callable(given) and not isinstance(given, Sequence):
        if not split:
            raise BadInputError(f"{label!r} is a function of the discovery half; it needs split=True")
        given = given(discovery)
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise BadInputError(f"{label!r} must be hooks, a list [(name, function), ...], got {type(given).__name__}")
    return given


def _metrics(metrics: Sequence[str | Metric]) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for metric in metrics:
        if isinstance(metric, str):
            if metric not in METRICS:
                raise BadInputError(f"metrics must be {', '.join(METRICS)} or functions, got {metric!r}")
            found[metric] = METRICS[metric]
        else:
            found[getattr(metric, "__name__", "metric")] = metric
    if len(found) < max(len(metrics), 1):
        raise BadInputError("metrics must not be empty, and each needs a name of its own")
    return found


def _backend(model: TransformerBridge, plan: Plan, backend: Backend) -> str:
    """The backend that runs all of a plan: flash, unless some hooks would not fire there."""
    bound: set[Any] = {getattr(run.hooks, "backend", "auto") for run in plan.runs} - {"auto"}
    if bound - {backend} and backend != "auto" or len(bound) > 1:
        raise BadInputError(f"these hooks were built with backend={' and '.join(sorted(bound))}, not {backend!r}")
    way = choose_backend(model, bound.pop() if bound else backend)
    if way == "hooks":
        return way
    for run in plan.runs:
        with model.hooks(fwd_hooks=list(run.hooks)):
            deaf = Flash(model).deaf()
        if deaf and backend == "flash":
            raise UnsupportedModelError(
                f"{run.label!r} hooks {deaf[0]}, which cannot fire under the flash backend; use backend='hooks'"
            )
        if deaf:
            return "hooks"
    return way


def _halves(batch: Tokens, seed: int) -> tuple[Tokens, Tokens]:
    """Discovery and test: documents split at random."""
    documents = list(dict.fromkeys(batch.documents))
    if len(documents) < 2:
        raise BadInputError("split=True needs sequences of at least 2 documents")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {documents[i] for i in order[: len(documents) // 2]}
    rows = [[b for b, d in enumerate(batch.documents) if (d in first) == half] for half in (True, False)]
    return batch[rows[0]], batch[rows[1]]


def _on_twin(run: Planned, shadow: TransformerBridge) -> Planned:
    """A run with its hooks built anew on the untrained twin."""
    hooks = run.hooks.rebuilt(model=shadow) if isinstance(run.hooks, Hooks) else run.hooks
    return replace(run, control=UNTRAINED, hooks=hooks)
