"""``Reference``: what sinks look like in other sequences, for the edits that put a mean in their place.

For every sink of the reference sequences and every layer: its value, its key before RoPE and after QK norm; per
sequence and head the mean margin, by the logarithm of the number of visible keys. Means leave out the document that
is being edited, and average sinks of the same kind only (of the same position, for plain positions).

Cost: one forward without the unembedding per reference sequence, and one more short one to rotate the mean keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.partition import Partition
from sinklens.attention.backend import hooked
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, grouped_by_head, learned_sink_logits, unrotated_keys
from sinklens.bridge.capabilities import Capabilities, capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.find.locations import Places, find_places
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.forward.follow import Forward
from sinklens.inputs.load import DEFAULT_SEQUENCES, as_tokens, load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.progress import progress_bar

KEPT = 4  # references per model
BINS = 24  # floor(log2(n)) of up to 16 million visible keys
LONGEST_TABLE = 2048  # positions that a predicate may reach


_kept: WeakKeyDictionary[TransformerBridge, OrderedDict[Any, Reference]] = WeakKeyDictionary()
_maps: WeakKeyDictionary[TransformerBridge, OrderedDict[str, SinkMap]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Record:
    """One sink of one reference sequence at one layer: its value and its unrotated key, per KV head."""

    group: str
    document: int
    value: Float[Tensor, "kv_head d_head"]
    key: Float[Tensor, "kv_head d_head"] | None


@dataclass(eq=False)
class Reference:
    """Keys, values and margins of the sinks of other sequences.

    Attributes:
        tokens, places: where they were seen.
        records: per layer, every sink that is alive there.
        margins: per layer, for each sequence its document and the sums and counts of margins: [head, bin], [bin].
        rotated: which column of ``table[layer]`` holds the rotated mean key of (group, left-out document, position).
    """

    tokens: Tokens
    places: Places
    records: dict[int, list[Record]] = field(default_factory=dict)
    margins: dict[int, list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)
    rotated: dict[tuple[str, int | None, int], int] = field(default_factory=dict)
    table: dict[int, Float[Tensor, "column kv_head d_head"]] = field(default_factory=dict)

    def document(self, forward: Forward, row: int) -> int | None:
        """The document of a running row, where it is one of the reference's own: to be left out."""
        sequence = forward.rows[row]
        if forward.tokens is None or sequence is None or forward.tokens.digest != self.tokens.digest:
            return None
        return self.tokens.documents[sequence]

    def has(self, layer: int, group: str, without: int | None) -> bool:
        """Whether any other document has a sink of this group alive at a layer."""
        return any(r.group == group and r.document != without for r in self.records.get(layer, ()))

    def has_margin(self, layer: int, without: int | None) -> bool:
        """Whether any other document has a margin at a layer."""
        return any(document != without for document, _, _ in self.margins.get(layer, ()))

    def mean(self, what: str, layer: int, group: str, without: int | None) -> Float[Tensor, "kv_head d_head"]:
        """The mean "value" or (unrotated) "key" over the sinks of a group in other documents."""
        vectors = [getattr(r, what) for r in self.records[layer] if r.group == group and r.document != without]
        if not vectors:
            raise BadInputError(
                f"no other document has a sink of {group!r} at layer {layer} to take the mean over; give reference= "
                f"more sequences, or restrict layers="
            )
        return torch.stack(vectors).mean(0)

    def rotated_key(
        self, layer: int, group: str, without: int | None, position: int
    ) -> Float[Tensor, "kv_head d_head"]:
        """The mean key, rotated to a position."""
        column = self.rotated.get((group, without, position))
        if column is None:
            raise BadInputError(
                f"no rotated mean key for position {position} of {group!r}: keys are prepared for the sinks that the "
                f"hooks were built with, and for predicates below position {LONGEST_TABLE}"
            )
        return self.table[layer][column]

    def margin(self, layer: int, without: int | None) -> Float[Tensor, "head bin"]:
        """The mean margin per head and bin of ``floor(log2(visible keys))``; a bin without queries takes the nearest's.

        The mean is over queries of all other documents.
        """
        kept = [(total, count) for document, total, count in self.margins[layer] if document != without]
        count = torch.stack([count for _, count in kept]).sum(0) if kept else torch.zeros(1)
        filled = (count > 0).nonzero().flatten()
        if not len(filled):
            raise BadInputError(
                f"no other document has such a sink at layer {layer}, so there is no mean margin; give reference= more "
                f"sequences, or restrict layers="
            )
        mean = torch.stack([total for total, _ in kept]).sum(0) / count
        nearest = [int(filled[(filled - b).abs().argmin()]) for b in range(len(count))]
        return mean[:, nearest].float()


def bins(visible: Tensor) -> Tensor:
    """``floor(log2(n))`` of a number of visible keys."""
    return visible.clamp(min=1).float().log2().floor().long()


def gather_reference(
    model: TransformerBridge,
    places: Places,
    tokens: str | Sequence[str] | Tensor | Tokens | None,
    layers: Sequence[int],
    *,
    needs: frozenset[str],
    progress: bool | None = None,
) -> Reference:
    """Look at the sinks of other sequences.

    Args:
        model: the model.
        places: where the edit acts; the same is looked up in the reference.
        tokens: the reference; default: the sequences of the edit's own SinkMap if they are of two documents or more,
            else 16 of python-docs.
        layers: where to look.
        needs: any of "value", "key", "margin".
        progress: show a bar.

    The latest few references of a model are kept, so that several modes over the same sinks read them once.

    Raises:
        BadInputError: nothing to average over.
        UnsupportedModelError: keys are wanted but the host does not show them before RoPE.
    """
    facts = capabilities(model)
    point = unrotated_keys(facts.fires, facts.rope)
    if "key" in needs and point is None:
        raise UnsupportedModelError(
            f"{facts.model} ({facts.architecture}): the host does not show keys both before and after RoPE, which "
            f"fixed_key needs; use zero, mean_value or fixed_logit"
        )
    tokens, where = reference_places(model, places, tokens)
    name = (tokens.digest, tokens.documents, where.key, places.key, tuple(layers))
    kept = _kept.setdefault(model, OrderedDict())
    if name in kept:
        return kept[name]
    found = Reference(tokens, where, {n: [] for n in layers}, {n: [] for n in layers})
    with progress_bar("reference", len(tokens), progress) as advance:
        for sequence in range(len(tokens)):
            _look(model, found, sequence, layers, point)
            advance()
    if point is not None:
        _rotate(model, found, places, layers, point)
    kept[name] = found
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return found


def reference_places(
    model: TransformerBridge, places: Places, tokens: str | Sequence[str] | Tensor | Tokens | None
) -> tuple[Tokens, Places]:
    """The sequences to take means over, and where their sinks are."""
    own = places.tokens
    if tokens is None and own is not None and len(set(own.documents)) > 1:
        return own, places
    if tokens is None:
        context = capabilities(model).context
        length = 512 if context is None else min(512, context)
        tokens = load_tokens(model, "python-docs", n_seqs=DEFAULT_SEQUENCES, seq_len=length)
    batch = as_tokens(model, tokens).to("cpu")
    if own is None:
        return batch, places
    if batch.digest == own.digest:
        return own, places
    kinds = {entry.group for entry in places.entries}
    sinks = sinks_of(model, batch)
    same = replace(sinks, sinks=tuple(s for s in sinks if s.kind in kinds))
    return batch, find_places(same)


def sinks_of(model: TransformerBridge, batch: Tokens) -> SinkMap:
    """The reference's sinks; the latest few maps are kept, since several edits of an experiment ask for the same."""
    kept = _maps.setdefault(model, OrderedDict())
    if batch.digest not in kept:
        kept[batch.digest] = find_sinks(model, batch, progress=False)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    found = kept[batch.digest]
    return replace(found, tokens=batch)


def _look(
    model: TransformerBridge,
    found: Reference,
    sequence: int,
    layers: Sequence[int],
    point: tuple[str, bool] | None,
) -> None:
    """Run one reference sequence and keep what is needed of its sinks."""
    facts = capabilities(model)
    one = found.tokens[sequence].trim().to(str(model.cfg.device))
    document = found.tokens.documents[sequence]
    forward = Forward(model)
    seen: dict[str, Tensor] = {}
    hooks: list[Any] = list(forward.hooks())

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach()

        return hook

    def take(layer: int) -> Any:
        def hook(pattern: Tensor, hook: Any) -> None:
            forward.rows = [sequence]
            marked = found.places.marked_or_none(forward, layer)
            groups = {name: columns[0] for name, columns in marked.items()}
            values = grouped_by_head(seen["v"], facts.n_kv_heads, facts.heads_first)[0].float()
            keys = None
            if "k" in seen and point is not None:
                keys = grouped_by_head(seen["k"], facts.n_kv_heads, point[1])[0].float()
            for group, columns in groups.items():
                for c in columns.nonzero().flatten().tolist():
                    key = None if keys is None else keys[c].clone()
                    found.records[layer].append(Record(group, document, values[c].clone(), key))
            if groups or found.places.learned:
                scores = (
                    seen["scores"] if facts.scores_are_logits else pattern.log()
                )  # equal but for a constant per row
                sums, counts = _margins(model, found.places, groups, layer, scores, pattern)
                found.margins[layer].append((document, sums, counts))
            seen.clear()

        return hook

    for layer in layers:
        if not found.places.acts_in(layer):
            continue
        hooks.append((attention_hook(layer, "hook_v"), keep("v")))
        if point is not None:
            hooks.append((attention_hook(layer, point[0]), keep("k")))
        hooks.append((attention_hook(layer, "hook_attn_scores"), keep("scores")))
        hooks.append((attention_hook(layer, "hook_pattern"), take(layer)))
    run_blocks(model, one.ids, hooks, mask=one.mask)


def _margins(
    model: TransformerBridge,
    places: Places,
    groups: dict[str, Bool[Tensor, " column"]],
    layer: int,
    scores: Float[Tensor, "1 head query key"],
    pattern: Float[Tensor, "1 head query key"],
) -> tuple[Float[Tensor, "head bin"], Float[Tensor, " bin"]]:
    """Sums of the margin over the queries that see both a sink and something else, by bin, with their counts."""
    allowed = scores[:, :1] > torch.finfo(scores.dtype).min / 2
    sinks = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    for columns in groups.values():
        sinks |= columns
    part = Partition(
        scores.float(),
        pattern,
        allowed & sinks,
        allowed & ~sinks,
        learned_sink_logits(model, layer),
        "S" if places.learned else "R",
    )
    where = bins(allowed.sum(-1))[0, 0]
    usable = part.editable[0]
    margin = torch.where(usable, part.margin[0], 0).double().cpu()
    one_hot = torch.nn.functional.one_hot(where.cpu(), BINS).double()
    return margin @ one_hot, (usable.all(0).cpu().double()) @ one_hot


def _rotate(
    model: TransformerBridge, found: Reference, places: Places, layers: Sequence[int], point: tuple[str, bool]
) -> None:
    """Rotate every mean key that the edit needs to its positions, by the model's own rotary embedding.

    One forward whose tokens stand at those positions (``position_ids``) and whose keys before RoPE are the means.
    """
    facts = capabilities(model)
    wanted = _wanted_keys(model, found, places)
    found.rotated = {name: column for column, name in enumerate(wanted)}
    hooks: list[Any] = []
    for layer in layers:
        means = [
            found.mean("key", layer, group, without) if found.has(layer, group, without) else None
            for group, without, _ in wanted
        ]
        empty = torch.full((facts.n_kv_heads, model.cfg.d_head), torch.nan, device=model.cfg.device)
        found.table[layer] = torch.stack([empty if mean is None else mean for mean in means])
        if facts.rope:
            hooks += _rotation_hooks(found, layer, facts, point)
    if hooks:
        ids = torch.zeros(1, len(wanted), dtype=torch.long, device=model.cfg.device)
        positions = torch.tensor([[p for _, _, p in wanted]], device=model.cfg.device)
        with torch.no_grad(), hooked(model):
            model.run_with_hooks(ids, position_ids=positions, fwd_hooks=hooks, return_type=None)


def _wanted_keys(model: TransformerBridge, found: Reference, places: Places) -> list[tuple[str, int | None, int]]:
    """(group, document to leave out, position) of every key that the edit may ask for."""
    if places.predicate is not None:
        context = capabilities(model).context or LONGEST_TABLE
        return [("chosen", None, p) for p in range(min(context, LONGEST_TABLE))]
    if places.tokens is None:
        return [(f"position {p}", None, p) for p in places.positions]
    own = found.tokens.digest == places.tokens.digest
    wanted = [(e.group, places.tokens.documents[e.sequence] if own else None, e.position) for e in places.entries]
    return list(dict.fromkeys(wanted))


def _rotation_hooks(found: Reference, layer: int, facts: Capabilities, point: tuple[str, bool]) -> list[Any]:
    def put(tensor: Tensor, hook: Any) -> Tensor:
        means = found.table[layer].nan_to_num()[None].to(tensor)
        if tensor.ndim == 3:
            return means.flatten(2)
        return means.transpose(1, 2) if point[1] else means

    def take(tensor: Tensor, hook: Any) -> None:
        rotated = grouped_by_head(tensor.detach(), facts.n_kv_heads, False)[0].float()
        found.table[layer] = torch.where(found.table[layer].isnan(), torch.nan, rotated)

    return [(attention_hook(layer, point[0]), put), (attention_hook(layer, "hook_rot_k"), take)]
