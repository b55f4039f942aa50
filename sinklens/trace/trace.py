"""``trace_sinks``: which layers write a sink and which erase it, by projection and by replacement.

Direction ``u_l = unit(x_P - mu_l)`` of the primary in *other* documents, at the reference layer of a phase of the
traced sink's life (where its mass is largest); x_ref: the traced sink's own stream there. Contribution ``<out, u>``,
share ``<out, u> / <x_ref, u>``: the shares of what was written before the reference layer sum to 1. A bridged life has
one phase per run of active layers. Source: docs/definitions.md, section 5; Wong et al. 2025 for what is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities, same_model
from sinklens.bridge.requirements import refuse_half_precision
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.find.lifetimes import activity
from sinklens.find.sinkmap import Sink, SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.inputs.load import DEFAULT_SEQUENCES, as_tokens, load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.inputs.vocabulary import vocabulary
from sinklens.show.progress import progress_bar
from sinklens.trace.gathered import Looked
from sinklens.trace.phases import Phase, Traced
from sinklens.trace.replacement import Causes
from sinklens.trace.result import SinkTrace

Replacement = Literal["same_id", "zero", "mean", "project"]
REPLACEMENTS = get_args(Replacement)


@public
def trace_sinks(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    sinks: SinkMap | None = None,
    *,
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    causal: bool = True,
    replacements: Sequence[Replacement] = REPLACEMENTS,
    doses: Sequence[float] = (),
    most_proven: int | None = None,
    loss: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> SinkTrace:
    """Trace every sink of a map to the components that write and erase it.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences.
        sinks: their sinks by attention (a filtered map traces only its own); default :func:`sinklens.find_sinks`.
        reference: further sequences for the direction and for tokens of the same id that are no sink, used where
            ``tokens`` hold none in another document; default 16 of python-docs.
        causal: prove writers by replacing what they write at the sink.
        replacements: of a writer's output at the sink: "same_id" (its mean over tokens of the same id that are no
            sink; the verdict's), "zero", "mean" (over ordinary tokens), "project" (its part along u removed).
        doses: also rescale the writer's output at the sink by these factors.
        most_proven: prove at most so many sinks of each kind per sequence, drawn at random; default all. With 0 the
            primaries without secondary sinks are all that is run.
        loss: measure the change of loss of every replacement too.
        seed: of the controls' draws.
        progress: show bars.

    Cost: one forward per sequence and, with ``causal``, about one row of a batch per component up to the last writer of
    each phase. Memory: (2 L + 2) x d_model floats per sink and per token of a sink's id.

    Raises:
        BadInputError: sinks of other tokens or found by another method; no primary (or strong) sink anywhere to take a
            direction from; unknown replacements.
        UnsupportedModelError: what components write cannot be told apart or replaced.
    """
    facts = capabilities(model)
    refuse_half_precision(model, "what components write is summed up again")
    if most_proven is not None and most_proven < 0:
        raise BadInputError(f"most_proven must be at least 0, got {most_proven}; causal=False proves nothing")
    batch = as_tokens(model, tokens).to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinklensWarning)
        found = find_sinks(model, batch, progress=progress) if sinks is None else sinks
    if found.tokens.digest != batch.digest or found.method != "attention" or not same_model(found.info, facts):
        raise BadInputError("sinks must be those that attention shows in these very tokens, in this model")
    info = {"model": facts.model, "sinklens": version("sinklens"), "seed": seed, "capabilities": asdict(facts)}
    if not len(found):
        return SinkTrace((), (), (), batch, (), tuple(found.notes), info)
    own = Looked(model, found, progress=progress)
    notes: list[str] = []
    extra = _reference(model, own, reference, notes, progress)
    traced = [one for s, sink in enumerate(found) for one in _contributions(own, extra, s, sink, phases(found, sink))]
    rows: list[dict[str, Any]] = []
    primaries: list[dict[str, Any]] = []
    if causal:
        causes = Causes(model, own, extra, replacements, doses, loss=loss, seed=seed)
        proven = _proven(traced, most_proven, seed)
        with progress_bar("replacing what components write", len(proven), progress) as advance:
            for one in proven:
                rows += causes.of(one)
                advance()
        with progress_bar("primaries without secondary sinks", len(batch), progress) as advance:
            for b in range(len(batch)):
                primaries += [found for found in [causes.primary(b, traced)] if found is not None]
                advance()
        notes += causes.notes
    notes = list(dict.fromkeys(notes))
    return SinkTrace(tuple(traced), tuple(rows), tuple(found), batch, tuple(primaries), tuple(notes), info)


def phases(found: SinkMap, sink: Sink) -> list[Phase]:
    """The runs of active layers of a sink's life; the reference layer is where its mass is largest."""
    b, p = sink.sequence, sink.position
    active = activity(found.mass[b], found.uniform[b], found.thresholds)[:, p]
    runs: list[list[int]] = []
    for layer in range(sink.onset, sink.end + 1):
        if bool(active[layer]):
            if runs and runs[-1][-1] == layer - 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
    return [Phase(r[0], r[-1], max(r, key=lambda layer: sink.masses[layer])) for r in runs]


def _proven(traced: Sequence[Traced], most: int | None, seed: int) -> list[Traced]:
    """All phases of at most ``most`` sinks per sequence and kind."""
    groups: dict[tuple[int, str], list[int]] = {}
    for one in traced:
        groups.setdefault((one.sequence, one.kind), []).append(one.sink)
    draw = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for numbers in groups.values():
        different = list(dict.fromkeys(numbers))
        order = torch.randperm(len(different), generator=draw)[:most].tolist()
        chosen |= {different[i] for i in order}
    return [one for one in traced if one.sink in chosen]


def _reference(
    model: TransformerBridge, own: Looked, reference: Any, notes: list[str], progress: bool | None
) -> Looked | None:
    """Further sequences, where the own ones lack a primary in another document or a token of a sink's id."""
    documents = {own.found.tokens.documents[s.sequence] for s in own.found}
    aimless = any(not len(own.directions(d)) for d in documents)
    lacking = {s.token_id for s in own.found if not own.same_id(s.token_id)[1]}
    special = set(vocabulary(model).special_ids)
    if reference is None and not aimless and lacking <= special:  # a BOS is a sink wherever it stands
        return None
    if reference is None:
        context = capabilities(model).context
        length = 512 if context is None else min(512, context)
        try:
            reference = load_tokens(model, "python-docs", n_seqs=DEFAULT_SEQUENCES, seq_len=length)
        except BadInputError:  # a model without a tokenizer
            if aimless:
                raise
            return None
        notes.append("directions or tokens of the same id that these sequences lack come from 16 chunks of python-docs")
    batch = as_tokens(model, reference).to("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinklensWarning)
        found = find_sinks(model, batch, progress=False)
    return Looked(model, found, {s.token_id for s in own.found}, progress=progress)


def direction(own: Looked, extra: Looked | None, document: int, layer: int) -> Float[Tensor, " d_model"]:
    """u at a layer for a sink of a document.

    Raises:
        BadInputError: no other sequence has a strong sink.
    """
    found = own.directions(document)
    if not len(found) and extra is not None:
        found = extra.directions(None)
    if not len(found):
        raise BadInputError(
            "no other sequence has a strong lasting sink to take a direction from; give reference= more sequences (of "
            "64 tokens or more)"
        )
    mean = found[:, layer].mean(0)
    return mean / mean.norm().clamp(min=1e-30)


def _contributions(own: Looked, extra: Looked | None, s: int, sink: Sink, runs: Sequence[Phase]) -> list[Traced]:
    added, states = own.at(sink.sequence, sink.position)
    if not own.parts[sink.sequence].summed:
        raise UnsupportedModelError(
            "norms stand on this model's residual stream (post-norm), so what components write is rescaled by every "
            "later block; decompose_sinks follows it through the norms"
        )
    document = own.found.tokens.documents[sink.sequence]
    norms = added.norm(dim=-1)
    found = []
    for number, phase in enumerate(runs):
        u = direction(own, extra, document, phase.reference)
        amounts = added @ u
        before = torch.tensor([layer < phase.reference for _, layer in own.components])
        whole = states[phase.reference] @ u
        same_cosines, same_norms, same = _alike(own, extra, sink.token_id, u)
        found.append(
            Traced(
                sink=s,
                sequence=sink.sequence,
                position=sink.position,
                token=sink.token,
                token_id=sink.token_id,
                kind=sink.kind,
                document=document,
                number=number,
                phase=phase,
                components=own.components,
                contributions=amounts.double().cpu(),
                before=before,
                cosines=(amounts / norms.clamp(min=1e-30)).cpu(),
                norms=norms.clone().cpu(),  # phases of one sink would share it
                same_cosines=same_cosines,
                same_norms=same_norms,
                same=same,
                projection=float(whole),
                rho=float(whole / (states[phase.reference] - whole * u).norm().clamp(min=1e-30)),
                norm=float(states[phase.reference].norm()),
                direction=u.cpu(),
            )
        )
    return found


def _alike(
    own: Looked, extra: Looked | None, token_id: int, u: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " component"], Float[Tensor, " component"], int]:
    """Mean cosine with u, mean length, and number of tokens of an id that are no sink; NaN where there is none."""
    empty = torch.full((len(own.components),), torch.nan)
    for looked in (own, extra):
        if looked is None:
            continue
        cosines, norms, count = torch.zeros(len(empty)), torch.zeros(len(empty)), 0
        for added in looked.alike(token_id):
            length = added.norm(dim=-1)
            cosines += ((added @ u) / length.clamp(min=1e-30)).sum(1).cpu()
            norms += length.sum(1).cpu()
            count += added.shape[1]
        if count:
            return cosines / count, norms / count, count
    return empty, empty.clone(), 0
