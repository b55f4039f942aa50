"""What an ablation does in one layer: from what the layer computed to the edited pattern, and what z gains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.attention_edit import PatternEdit, Seen
from sinklens.ablate.hooks import Hooks
from sinklens.ablate.partition import Partition, edited_pattern, pair
from sinklens.ablate.reference import Reference, bins
from sinklens.ablate.selection import Selection
from sinklens.bridge.adapters import learned_sink_logits, score_scale, score_softcap, value_bias
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.find.locations import Places
from sinklens.forward.follow import Forward


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


class SinkEdit(PatternEdit):
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
        """The new pattern of a layer; what z gains is left in ``seen``."""
        found = self.places.sinks(self.forward, layer, seen.allowed[:, 0], seen.rows, seen.keys)
        sinks = found[:, None] & seen.allowed
        return self._edited(layer, seen, sinks) if sinks.any() or self.places.learned else seen.pattern

    def begin(self, layer: int) -> None:
        """In the first layer: nothing has been compared yet."""
        if layer == self.chosen.layers[0]:
            self.compared = self.differs = False

    def finish(self, layer: int) -> None:
        """In the last layer: refuse an edit that changed nothing."""
        if layer == self.chosen.layers[-1]:
            self._refuse_identity()

    def _edited(self, layer: int, seen: Seen, sinks: Bool[Tensor, "batch 1 query key"]) -> Tensor:
        options, places = self.options, self.places
        ordinary_only = options.to == "ordinary"
        apart = torch.zeros_like(sinks)
        if ordinary_only:
            apart = places.apart(self.forward)[:, None, None, seen.keys] & seen.allowed & ~sinks
        keys = FixedKeys(self, layer, seen, sinks) if options.mode == "fixed_key" else None
        part = Partition(
            seen.scores if keys is None else keys.scores,
            seen.pattern,
            sinks,
            seen.allowed & ~sinks & ~apart,
            learned_sink_logits(self.model, layer),
            "S" if places.learned else "F" if ordinary_only else "R",
            apart=ordinary_only,
        )
        margin = (
            self.fixed_margin(layer, bins(seen.allowed.sum(-1))[:, 0], part.margin)
            if options.mode == "fixed_logit"
            else None
        )
        biased = options.writes_bias and value_bias(self.model, layer, self.facts.n_heads) is not None
        weights = pair(options.mode, part, g=options.g, margin=margin, value=options.value, biased=biased)
        rows = part.editable & self.chosen.mask(layer, self.facts.n_heads, sinks.device)[:, None]
        target = None
        if options.target is not None:
            target = self._target(options.target, seen, sinks, apart)
            rows = rows & target.any(-1)[:, None]
        if options.mode == "uniform":
            rows = rows & part.rest.any(-1)
        moved = rows if keys is None or options.value == "neutral" else rows & ~keys.same
        new = edited_pattern(part, weights, moved, target=target)
        if keys is not None and options.value == "neutral":
            new = torch.where(keys.same[..., None] & part.rest, seen.pattern, new)  # then it is ``zero``, exactly
        if options.replaces_value:
            seen.extra = self._replaced_values(layer, seen, new, sinks, rows)
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
        self, layer: int, seen: Seen, pattern: Tensor, sinks: Tensor, rows: Tensor
    ) -> Float[Tensor, "batch head query d_head"]:
        """What z gains when the sinks' values are exchanged: ``sum_S A (v_mean - v)``."""
        first = seen.keys.start
        columns = _columns(sinks, first)
        values = seen.at("value", columns, self.forward.past)
        means = self.means("value", layer, columns, values)
        gain = torch.where(same_vector(means, values), 0, (means - values).float())
        gain = gain.repeat_interleave(self.facts.n_heads // gain.shape[2], dim=2)
        index = [c - first for c in columns]
        weights = (pattern * sinks)[..., index].float() * rows[..., None]
        return torch.einsum("bhqc,bchd->bhqd", weights, gain)

    def fixed_margin(
        self, layer: int, where: Int[Tensor, "batch query"], own: Float[Tensor, "batch head query"]
    ) -> Float[Tensor, "batch head query"]:
        """The corpus mean margin of each head at each query's bin of visible keys; its own where there is none."""
        found, forward = self.found, self.forward
        rows = []
        for b in range(where.shape[0]):
            without = None if found is None else found.document(forward, b)
            if found is None or not found.has_margin(layer, without):
                self._lonely(layer, "found")
                rows.append(own[b])
            else:
                rows.append(found.margin(layer, without).to(own)[:, where[b]])
        return torch.stack(rows)

    def check_target(self, target: int, is_sink: Tensor | bool) -> None:
        """Refuse a target that a row does not have, or that is a sink there."""
        shortest = int(self.forward.lengths.min())
        if target >= shortest:
            raise BadInputError(f"the target {target} is out of range: a row has {shortest} tokens")
        if is_sink:
            raise BadInputError(f"the target {target} is itself a sink in some row; choose an ordinary token")

    def _target(self, target: int, seen: Seen, sinks: Tensor, apart: Tensor) -> Bool[Tensor, "b q k"]:
        """Where the target stands, for the queries that may see it."""
        self.check_target(target, False)
        column = self.forward.starts + target - seen.keys.start
        index = torch.arange(sinks.shape[-1], device=sinks.device)
        standing = (index == column[:, None])[:, None] & seen.allowed[:, 0]
        self.check_target(target, (standing & (sinks | apart)[:, 0]).any())
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


class FixedKeys:
    """Scores with the sinks' keys replaced by their mean over other sequences.

    Attributes:
        scores: the new scores; elements whose key is the same keep the kernel's own.
        same: rows (per head) in which no visible sink's key differs.
    """

    def __init__(self, edit: SinkEdit, layer: int, seen: Seen, sinks: Tensor) -> None:
        model, n_heads = edit.model, edit.facts.n_heads
        scale, cap = seen.scale, seen.softcap
        if scale is None:
            scale, cap = score_scale(model, layer), score_softcap(model)
        if scale is None:
            raise UnsupportedModelError(f"{edit.facts.model}: the host does not say how it scales scores")
        first = seen.keys.start
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
