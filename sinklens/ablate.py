"""``ablate_sinks``: edits of what heads do with sinks, as TransformerLens hooks (docs/definitions.md, section 3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention import learned_sink_logits, score_scale, score_softcap, value_bias
from sinklens.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.forward import Forward
from sinklens.hooks import Hooks
from sinklens.partition import MODES, VALUES, Partition, edited_pattern, pair
from sinklens.pattern_edit import Seen, edit_hooks, refuse_unless_editable
from sinklens.places import Places, Sinks, find_places
from sinklens.proof import capabilities
from sinklens.reference import Reference, bins, gather_reference
from sinklens.selection import Heads, Layers, Selection, select
from sinklens.tokens import Tokens

WITHOUT_LEARNED = ("zero", "value_only", "mean_value", "fixed_key")


@dataclass(frozen=True)
class Ablation:
    """The options of an ablation, checked."""

    mode: str
    to: str
    neutral: str
    value: str
    g: float | None
    target: int | None
    allow_identity: bool

    @property
    def needs(self) -> frozenset[str]:
        """What must be looked up in other sequences."""
        wanted = {"mean_value": {"value"}, "fixed_key": {"key"}, "fixed_logit": {"margin"}}.get(self.mode, set())
        return frozenset(wanted | ({"value"} if self.value == "mean" else set()))

    @property
    def writes_bias(self) -> bool:
        """Whether the sinks' value bias is written, or taken away, in z."""
        by_mode = self.mode in ("zero", "value_only") or (self.value == "neutral" and self.mode.startswith("fixed"))
        return by_mode and self.neutral == "bias"

    @property
    def replaces_value(self) -> bool:
        """Whether the sinks' values are replaced by their mean elsewhere."""
        return self.mode == "mean_value" or self.value == "mean"


def ablate_sinks(
    model: TransformerBridge,
    sinks: Sinks,
    mode: str = "renormalize",
    *,
    layers: Layers = None,
    heads: Heads = None,
    to: str = "all",
    neutral: str = "bias",
    value: str = "kept",
    g: float | None = None,
    target: int | None = None,
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    allow_identity: bool = False,
    backend: str = "auto",
    progress: bool | None = None,
) -> Hooks:
    """Hooks that change what heads do with sinks, and nothing else.

    With ``o = (1 - sigma) o_R + sigma o_S`` (S: the sinks, R: every other key that the query may see):

    ==============  =============================================  ==================================================
    ``renormalize``  ``o_R``                                        the sink never existed for this head
    ``zero``         ``(1 - sigma) o_R (+ sigma b_V)``              the mass is parked, nothing is written
    ``value_only``   ``o_R + sigma (o_S - b_V)``                    what it writes, without taking mass
    ``scale``        ``lse_S += log g``                             dose-response; g = 0 is ``renormalize``
    ``mean_value``   ``o_S`` from its mean over other sequences     is what it writes the same everywhere?
    ``fixed_key``    key: mean over other sequences                 a key bias in Gu's sense
    ``fixed_logit``  margin: corpus mean per head                   a constant offset
    ``null``         ``lse_S := 0, o_S := 0``                       StreamingLLM's zero sink in the sink's place
    ``move``         ``o_S = v_target``                             the mass lands on another token
    ``uniform``      ``(1 - sigma) o_R + sigma mean_R v``           the mass is spread evenly over the rest
    ==============  =============================================  ==================================================

    A query whose only visible keys are sinks keeps what it had, as does one that sees no sink (or, for ``move``, not
    the target). Elements that an edit leaves alone stay the kernel's own, bit for bit.

    Args:
        model: from :func:`sinklens.load_model`.
        sinks: a SinkMap (each sink is edited in the layers of its lives, on the map's own tokens), positions (in every
            sequence and layer), a predicate ``ids -> bool mask``, or "learned" (gpt-oss's logit), also in a list.
        mode: see above.
        layers, heads: where; heads as numbers, or (layer, head) pairs. Default: everywhere.
        to: "all", or "ordinary": the other sinks of the SinkMap, and a learned logit, keep exactly the mass they had,
            and S and the ordinary keys share the rest.
        neutral: "bias" (writing nothing means writing ``sigma b_V``) or "zero".
        value: of ``fixed_key`` and ``fixed_logit``: "kept", "neutral" or "mean".
        g: for ``scale``, at least 0.
        target: for ``move``, a position.
        reference: where the means come from; default: the other documents of the SinkMap, else 16 of python-docs.
        allow_identity: run an edit whose source equals its target instead of refusing it.
        backend: "hooks" or "auto".
        progress: show a bar while the reference is read.

    Raises:
        BadInputError: bad options or places; while running: sequences that are not the SinkMap's, positions out of
            range, a predicate that chooses nothing, a mean that equals what it replaces (to 1e-6).
        UnsupportedModelError: the host's attention cannot be edited by hooks (OPT, BERT, ViT), or lacks what the mode
            needs.

    Cost: a few pattern-sized temporaries in each edited layer; for the modes with a mean one forward per reference
    sequence when the hooks are built. Source: docs/definitions.md, section 3.
    """
    if backend not in ("auto", "hooks"):
        raise BadInputError(f"backend must be 'auto' or 'hooks', got {backend!r}")
    options = Ablation(mode, to, neutral, value, g, target, allow_identity)
    places = find_places(sinks)
    _check(options, places, model)
    chosen = select(capabilities(model), places, layers, heads)
    found = None
    if options.needs:
        found = gather_reference(model, places, reference, chosen.layers, needs=options.needs, progress=progress)
        _check_counterparts(mode, places, found, chosen.layers)

    def build(other: TransformerBridge | None, elsewhere: Places | None) -> Hooks:
        arguments: dict[str, Any] = {"layers": layers, "heads": heads, "to": to, "neutral": neutral, "value": value}
        arguments |= {"g": g, "target": target, "reference": reference, "allow_identity": allow_identity}
        there = places if elsewhere is None else elsewhere
        return ablate_sinks(other or model, there, mode, **arguments, backend=backend, progress=False)

    name = f"{mode}({g:g})" if mode == "scale" and g is not None else mode
    forward = Forward(model, places.tokens)
    hooks = Hooks((), name=name, build=build, places=places, layers=chosen.layers)
    edit = _SinkEdit(model, options, places, chosen, found, forward, hooks)
    if not (mode == "scale" and g == 1):
        hooks.extend(
            edit_hooks(
                model,
                forward,
                edit,
                chosen.layers,
                values=options.replaces_value,
                keys=mode == "fixed_key",
                bias=options.writes_bias,
            )
        )
    return hooks


def _check(options: Ablation, places: Places, model: TransformerBridge) -> None:
    facts = capabilities(model)
    mode = options.mode
    for name, given, known in (
        ("mode", mode, MODES),
        ("to", options.to, ("all", "ordinary")),
        ("neutral", options.neutral, ("bias", "zero")),
        ("value", options.value, VALUES),
    ):
        if given not in known:
            raise BadInputError(f"{name} must be one of {', '.join(known)}, got {given!r}")
    if (options.g is not None) != (mode == "scale") or (options.g is not None and not 0 <= options.g < math.inf):
        raise BadInputError(f"mode 'scale' needs g >= 0 and only it takes g; got mode {mode!r}, g={options.g}")
    if (options.target is not None) != (mode == "move") or (options.target or 0) < 0:
        raise BadInputError(
            f"mode 'move' needs a target position and only it takes one; got {mode!r}, {options.target}"
        )
    if options.value != "kept" and mode not in ("fixed_key", "fixed_logit"):
        raise BadInputError(f"value= belongs to fixed_key and fixed_logit, not to {mode!r}")
    if options.target in places.positions:
        raise BadInputError(f"the target {options.target} is one of the sinks; mass cannot be moved to where it is")
    if options.to == "ordinary" and places.tokens is None:
        raise BadInputError("to='ordinary' needs a SinkMap: it says which other sinks may not gain")
    if places.recent and options.needs:
        raise BadInputError(f"{mode!r} takes means over other sequences; the most recent tokens have none")
    if places.learned and not facts.learned_sinks:
        raise BadInputError(f"{facts.model} has no learned sink; name positions instead")
    if places.learned and (mode in WITHOUT_LEARNED or options.replaces_value):
        raise BadInputError(f"the learned sink is a logit without key or value, so {mode!r} has no meaning for it")
    refuse_unless_editable(model, values=options.replaces_value or options.writes_bias)


def _check_counterparts(mode: str, places: Places, found: Reference, layers: Sequence[int]) -> None:
    """Refuse a SinkMap none of whose sinks has a counterpart in another document: nothing would change."""
    if places.tokens is None:
        return
    own = found.tokens.digest == places.tokens.digest
    for entry in places.entries:
        without = places.tokens.documents[entry.sequence] if own else None
        for layer in layers:
            if mode == "fixed_logit" and found.has_margin(layer, without):
                return
            if mode != "fixed_logit" and found.has(layer, entry.group, without):
                return
    raise BadInputError(
        f"{mode} needs other documents with such sinks alive in these layers, and there are none; give reference= more "
        f"sequences, or other layers="
    )


class _SinkEdit:
    """The edit of one layer's attention: called with what the layer computed, returns the new pattern."""

    def __init__(
        self,
        model: TransformerBridge,
        options: Ablation,
        places: Places,
        chosen: Selection,
        found: Reference | None,
        forward: Forward,
        hooks: Hooks,
    ) -> None:
        self.model, self.options, self.places, self.chosen = model, options, places, chosen
        self.found, self.forward, self.hooks = found, forward, hooks
        self.facts = capabilities(model)
        self.compared = self.differs = False

    def __call__(self, layer: int, seen: Seen) -> Tensor:
        forward = self.forward
        if layer == self.chosen.layers[0]:
            self.compared = self.differs = False
        first = forward.columns - seen.pattern.shape[-1]
        sinks = self.places.sinks(forward, layer, seen.allowed[:, 0])[:, None] & seen.allowed
        new = self._edited(layer, seen, sinks, first) if sinks.any() or self.places.learned else seen.pattern
        if layer == self.chosen.layers[-1]:
            self._refuse_identity()
        return new

    def _edited(self, layer: int, seen: Seen, sinks: Bool[Tensor, "batch 1 query key"], first: int) -> Tensor:
        options, places = self.options, self.places
        ordinary_only = options.to == "ordinary"
        apart = torch.zeros_like(sinks)
        if ordinary_only:
            apart = places.apart(self.forward)[:, None, None, first:] & seen.allowed & ~sinks
        keys = _Keys(self, layer, seen, sinks, first) if options.mode == "fixed_key" else None
        part = Partition(
            seen.scores if keys is None else keys.scores,
            seen.pattern,
            sinks,
            seen.allowed & ~sinks & ~apart,
            learned_sink_logits(self.model, layer),
            "S" if places.learned else "F" if ordinary_only else "R",
            apart=ordinary_only,
        )
        margin = self._fixed_margin(layer, seen, part.margin) if options.mode == "fixed_logit" else None
        biased = options.writes_bias and value_bias(self.model, layer, self.facts.n_heads) is not None
        weights = pair(options.mode, part, g=options.g, margin=margin, value=options.value, biased=biased)
        rows = part.editable & self.chosen.mask(layer, self.facts.n_heads, sinks.device)[:, None]
        target = None
        if options.target is not None:
            target = self._target(options.target, seen, sinks, apart, first)
            rows = rows & target.any(-1)[:, None]
        if options.mode == "uniform":
            rows = rows & part.rest.any(-1)
        moved = rows if keys is None or options.value == "neutral" else rows & ~keys.same
        new = edited_pattern(part, weights, moved, target=target)
        if keys is not None and options.value == "neutral":
            new = torch.where(keys.same[..., None] & part.rest, seen.pattern, new)  # then it is ``zero``, exactly
        if options.replaces_value:
            seen.extra = self._replaced_values(layer, seen, new, sinks, rows, first)
        if weights.bias is not None and options.writes_bias:
            seen.bias = torch.where(rows, weights.bias, 0)
        return new

    def means(
        self, what: str, layer: int, columns: Sequence[int], like: Float[Tensor, "batch column kv_head d_head"]
    ) -> Float[Tensor, "batch column kv_head d_head"]:
        """The reference's mean for each of the columns; the row's own vector where it is no sink of that row.

        A sink without a counterpart alive at this layer in another document keeps its own vector, and a note says so.
        """
        found, forward = self.found, self.forward
        means = like.float().clone()
        starts = forward.starts.tolist()
        for group, marked in self.places.groups(forward, layer).items():
            for b, row in enumerate(marked[:, list(columns)].tolist()):
                for j, is_sink in enumerate(row):
                    if is_sink and found is not None:
                        without = found.document(forward, b)
                        if not found.has(layer, group, without):
                            self._lonely(layer, group)
                            continue
                        position = columns[j] - starts[b]
                        means[b, j] = (
                            found.mean("value", layer, group, without)
                            if what == "value"
                            else found.rotated_key(layer, group, without, position)
                        )
                        self._compare(means[b, j], like[b, j])
        return means.to(like)

    def _lonely(self, layer: int, group: str) -> None:
        self.hooks.note(
            f"layer {layer}: a {group} sink has no counterpart alive there in another document; {self.options.mode} "
            f"leaves it as it is (give reference= more sequences to change that)"
        )

    def _compare(self, new: Tensor, old: Tensor) -> None:
        self.compared = True
        self.differs |= not bool(same_vector(new, old.float()).all())

    def _replaced_values(
        self, layer: int, seen: Seen, pattern: Tensor, sinks: Tensor, rows: Tensor, first: int
    ) -> Float[Tensor, "batch head query d_head"]:
        """What z gains when the sinks' values are exchanged: ``sum_S A (v_mean - v)``."""
        columns = _columns(sinks, first)
        values = seen.at("value", columns, self.forward.past)
        means = self.means("value", layer, columns, values)
        gain = torch.where(same_vector(means, values), 0, (means - values).float())
        gain = gain.repeat_interleave(self.facts.n_heads // gain.shape[2], dim=2)
        index = [c - first for c in columns]
        weights = (pattern * sinks)[..., index].float() * rows[..., None]
        return torch.einsum("bhqc,bchd->bhqd", weights, gain)

    def _fixed_margin(
        self, layer: int, seen: Seen, own: Float[Tensor, "batch head query"]
    ) -> Float[Tensor, "batch head query"]:
        """The corpus mean margin of each head at each query's number of visible keys; its own where there is none."""
        found, forward = self.found, self.forward
        where = bins(seen.allowed.sum(-1))[:, 0]
        rows = []
        for b in range(where.shape[0]):
            without = None if found is None else found.document(forward, b)
            if found is None or not found.has_margin(layer, without):
                self._lonely(layer, "found")
                rows.append(own[b])
            else:
                rows.append(found.margin(layer, without).to(own)[:, where[b]])
        return torch.stack(rows)

    def _target(self, target: int, seen: Seen, sinks: Tensor, apart: Tensor, first: int) -> Bool[Tensor, "b q k"]:
        """Where the target stands, for the queries that may see it."""
        forward = self.forward
        if target >= int(forward.lengths.min()):
            raise BadInputError(f"the target {target} is out of range: a row has {int(forward.lengths.min())} tokens")
        column = forward.starts + target - first
        index = torch.arange(sinks.shape[-1], device=sinks.device)
        standing = (index == column[:, None])[:, None] & seen.allowed[:, 0]
        if (standing & (sinks | apart)[:, 0]).any():
            raise BadInputError(f"the target {target} is itself a sink in some row; choose an ordinary token")
        return standing

    def _refuse_identity(self) -> None:
        """An edit that put the same vectors back says so, and is refused unless it was asked for."""
        options = self.options
        if not self.compared or self.differs or self.forward.past:
            return
        if options.mode == "fixed_key" and options.value == "neutral":
            note = (
                "fixed_key with a neutral value equals zero here: the sinks' keys are the same in every sequence, so "
                "the key part of the claim holds by construction and is no evidence"
            )
            if note not in self.hooks.notes:
                self.hooks.note(note)
                warnings.warn(note, SinklensWarning, stacklevel=2)
        elif not options.allow_identity:
            raise BadInputError(
                f"{options.mode} would change nothing: the mean over other sequences equals what is there already (a "
                f"BOS looks the same in every sequence). Use value='neutral', other sinks, or allow_identity=True"
            )


class _Keys:
    """Scores with the sinks' keys replaced by their mean over other sequences.

    Attributes:
        scores: the new scores; elements whose key is the same keep the kernel's own.
        same: rows (per head) in which no visible sink's key differs.
    """

    def __init__(self, edit: _SinkEdit, layer: int, seen: Seen, sinks: Tensor, first: int) -> None:
        model, n_heads = edit.model, edit.facts.n_heads
        scale, cap = score_scale(model, layer), score_softcap(model)
        if scale is None:
            raise UnsupportedModelError(f"{edit.facts.model}: the host does not say how it scales scores")
        columns = _columns(sinks, first)
        keys = seen.at("key", columns, edit.forward.past)
        means = edit.means("key", layer, columns, keys)
        repeat = n_heads // keys.shape[2]
        equal = same_vector(means, keys)[..., 0].repeat_interleave(repeat, dim=2)  # batch column head
        index = [c - first for c in columns]
        old = seen.scores[..., index]
        own, new = (
            scale * torch.einsum("bhqd,bchd->bhqc", seen.queries.float(), k.float().repeat_interleave(repeat, dim=2))
            for k in (keys, means)
        )
        if cap is not None:
            own, new = cap * (own / cap).tanh(), cap * (new / cap).tanh()
        alibi = str(model.cfg.positional_embedding_type) == "alibi"
        visible = sinks[..., index]
        wrong = ((own - old).abs() > 1e-2 + 1e-2 * old.abs()) & visible
        if wrong.any() and not alibi:
            raise UnsupportedModelError(
                f"{edit.facts.model}: layer {layer}'s scores are not scale * q.k as sinklens reads it; fixed_key "
                f"would be wrong. Please report this architecture"
            )
        replaced = visible & ~equal.transpose(1, 2)[:, :, None]
        self.scores = seen.scores.clone()
        self.scores[..., index] = torch.where(replaced, old + (new - own), old)
        self.same = ~replaced.any(-1)


def _columns(sinks: Bool[Tensor, "batch 1 query key"], first: int) -> list[int]:
    """The absolute columns in which any row has a visible sink."""
    return [c + first for c in sinks.flatten(0, 2).any(0).nonzero().flatten().tolist()]


def same_vector(new: Float[Tensor, "*rest d"], old: Float[Tensor, "*rest d"]) -> Bool[Tensor, "*rest 1"]:
    """Whether two vectors are equal to 1e-6 of their size (float32 means of equal vectors are)."""
    size = old.float().abs().amax(-1, keepdim=True)
    return (new.float() - old.float()).abs().amax(-1, keepdim=True) <= 1e-6 + 1e-5 * size
