"""``perturbation_spread``: what the exchange of one token does to the others (docs/definitions.md, section 6).

Figure 2 of Barbero et al. 2025 (2504.02732) with many random swaps in the place of one chosen by hand::

    absolute[l,i] = |x'_i - x_i|_2        relative[l,i] = |x'_i - x_i|_2 / |x_i|_2        x: block outputs

x' is the same sequence with one token exchanged for another, so that lengths and positions stay; both x and x' are
computed under the same edit, and every condition gets the same swaps.

An edit that belongs to a SinkMap recognises its sequences by their ids, which a swap changes; built anew at the same
positions (``hooks.at``) it would act in all layers, not in those of each sink's lives. So the forward starts with the
ids that the edit knows, and the token is exchanged between the edit's own hooks and the embedding: the edit acts where,
in which layers and with which means it acts on the sequence as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import block_output
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.forward.follow import EMBED
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.inputs.vocabulary import vocabulary
from sinklens.mixing.conditions import Conditions, Places, Sinks, conditions_of, sinks_of
from sinklens.mixing.perturbation_result import Perturbation, Swap, others
from sinklens.show.progress import progress_bar

SWAPS = 100
MOST_ROWS = 8  # swaps of a sequence in one forward, beside the sequence itself
MOST_TOKENS = 4096  # in one forward, since patterns grow with their product with the length
TOLERANCE = 1e-4


@public
def perturbation_spread(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    conditions: Conditions | None = None,
    *,
    sinks: Sinks = None,
    n_swaps: int = SWAPS,
    swaps: Sequence[tuple[int, int, int]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Perturbation:
    """How far the exchange of one token spreads, in the model as it is and under edits, by the same swaps.

    Per block l and token i ``|x'_i - x_i|_2``, and the same over ``|x_i|_2``; x, x': block outputs of the sequence as
    it is and with one token exchanged, both under the same edit.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences; each runs without padding.
        conditions: hook lists by label, such as ``{"zero": ablate_sinks(model, sinks, "zero")}``. "base", the model
            without hooks, is always measured. Hooks that look at ids see those before the swap.
        sinks: S, whose tokens are neither exchanged nor averaged over: a map, or positions; default: what
            :func:`find_sinks` finds, and the first token (encoders: the special ones) of sequences too short for that.
        n_swaps: how many random swaps, taking the sequences in turn: a position of 1 to T - 2 that is no sink and no
            special token, each once before any twice, and another id, drawn from the ordinary tokens of the whole batch
            that are no sink, as often as they occur.
        swaps: (sequence, position, new id), in the place of random ones.
        seed: of the draws.
        progress: show a bar.

    Cost: per sequence and condition one forward of up to 9 rows for every 8 of its swaps (fewer in sequences of more
    than 512 tokens), and two forwards as a probe. Memory: one block's output of those rows, and the result: two floats
    per condition, swap, block and position. Source: Barbero et al. 2025, figure 2.

    Raises:
        BadInputError: a label "base", sinks of other tokens, no swap, a sequence too short to have one, or a swap that
            is out of range, at a sink or special token, or changes nothing.
        UnsupportedModelError: the host embeds ids that hooks at the embedding do not see.
    """
    facts = capabilities(model)
    batch = as_tokens(model, tokens).to("cpu")
    named = conditions_of(conditions or {})
    own, words = sinks_of(model, batch, sinks)
    if swaps is None:
        chosen = _drawn(batch, own, facts.causal, n_swaps, seed)
    else:
        chosen = _checked(batch, own, facts.causal, swaps, facts.vocabulary)
    chunks = _chunks(chosen, batch)
    _probe(model, batch, chosen[0])
    shape = (len(named), len(chosen), facts.n_layers, int(batch.lengths.max()))
    absolute, relative = torch.full(shape, math.nan), torch.full(shape, math.nan)
    with progress_bar("swaps", len(chunks) * len(named), progress) as advance:
        for numbers in chunks:
            group = [chosen[n] for n in numbers]
            ids = batch.row(group[0][0])[None].to(model.cfg.device)
            for c, edit in enumerate(named.values()):
                changes, norms = swap_changes(model, ids, edit, group)
                for n, (_, p, _, _), change in zip(numbers, group, changes, strict=True):
                    seen = slice(p if facts.causal else 0, ids.shape[1])
                    absolute[c, n, :, seen] = change[:, seen].float()
                    relative[c, n, :, seen] = (change / norms)[:, seen].float()
                advance()
    info: dict[str, Any] = {"model": facts.model, "sinklens": version("sinklens"), "sinks": words, "seed": seed}
    info |= {"definition": "change of block outputs by the swap of one token; relative: over the unswapped norm"}
    info |= {"new_labels": list(vocabulary(model).labels([new for _, _, _, new in chosen]))}
    info |= {"causal": facts.causal, "drawn": swaps is None, "capabilities": asdict(facts)}
    return Perturbation(tuple(named), absolute, relative, chosen, batch, own, info)


def swap_changes(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], edit: Sequence[Any], swaps: Sequence[Swap]
) -> tuple[Float[Tensor, "swap layer pos"], Float[Tensor, "layer pos"]]:
    """``|x'_i - x_i|`` for swaps of one sequence, and ``|x_i|``, under an edit, in float64.

    The sequence as it is runs as the first row of the same forward, so that what a swap cannot reach does not change.
    """
    changes: list[Tensor] = []
    norms: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        x = tensor.detach().cpu().double()
        changes.append((x[1:] - x[0]).norm(dim=-1))
        norms.append(x[0].norm(dim=-1))

    outputs = [(block_output(layer), keep) for layer in range(model.cfg.n_layers)]
    run_blocks(model, ids.expand(1 + len(swaps), -1), [*edit, (EMBED, _exchange(swaps)), *outputs])
    return torch.stack(changes, 1), torch.stack(norms)


def _exchange(swaps: Sequence[Swap]) -> Any:
    """The hook that exchanges a token in every row but the first."""

    def hook(ids: Tensor, hook: Any) -> Tensor:
        new = ids.clone()
        for row, (_, position, _, token) in enumerate(swaps, start=1):
            new[row, position] = token
        return new

    return hook


def _probe(model: TransformerBridge, batch: Tokens, swap: Swap) -> None:
    """Refuse a host whose blocks see ids in another way than through the embedding's input."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor.detach().cpu().double())

    ids = batch.row(swap[0]).to(model.cfg.device).expand(2, -1)
    exchange = _exchange([swap])
    last = (block_output(model.cfg.n_layers - 1), keep)
    run_blocks(model, ids, [(EMBED, exchange), last])
    run_blocks(model, exchange(ids, None), [last])
    if not (kept[0] - kept[1]).abs().max() <= TOLERANCE * (1 + kept[1].abs().max()):
        raise UnsupportedModelError(
            f"{capabilities(model).model}: a token that is exchanged at {EMBED} is not exchanged everywhere, so swaps "
            f"under edits cannot be measured. Please report this architecture"
        )


def _refusal(batch: Tokens, b: int, position: int, sinks: Sequence[int], causal: bool) -> str:
    """Why a token cannot be exchanged; empty where it can."""
    length = int(batch.lengths[b])
    if not 1 <= position <= length - 2:
        return f"is out of range: positions 1 to {length - 2} of its {length} tokens can be exchanged"
    if position in sinks:
        return "is a sink, and S must stay as it is; choose another position, or other sinks="
    if bool(batch.special[b][batch.mask[b]][position]):
        return "is a special token; choose an ordinary one"
    if not others(position, length, sinks, causal):
        return "has no token after it that is no sink, so there is nothing to measure; choose an earlier position"
    return ""


def _drawn(batch: Tokens, sinks: Places, causal: bool, n_swaps: int, seed: int) -> tuple[Swap, ...]:
    if n_swaps < 1:
        raise BadInputError(f"n_swaps must be at least 1, got {n_swaps}")
    draw = torch.Generator().manual_seed(seed)
    rows = [batch.row(b).tolist() for b in range(len(batch))]
    special = [batch.special[b][batch.mask[b]].tolist() for b in range(len(batch))]
    pool = [i for b, row in enumerate(rows) for p, i in enumerate(row) if not (special[b][p] or p in sinks[b])]
    orders = []
    for b, row in enumerate(rows):
        free = [p for p in range(len(row)) if not _refusal(batch, b, p, sinks[b], causal)]
        if not free:
            raise BadInputError(
                f"sequence {b} ({batch.sources[b]}, {len(row)} tokens) is too short: a swap needs an ordinary token "
                f"that is no sink, neither first nor last, and another one after it; give longer sequences"
            )
        orders.append([free[i] for i in torch.randperm(len(free), generator=draw).tolist()])
    found = []
    for n in range(n_swaps):
        turn, b = divmod(n, len(rows))
        p = orders[b][turn % len(orders[b])]
        others = [i for i in pool if i != rows[b][p]]
        if not others:
            raise BadInputError("all ordinary tokens of these sequences are the same, so a swap would change nothing")
        found.append((b, p, rows[b][p], others[int(torch.randint(len(others), (1,), generator=draw))]))
    return tuple(found)


def _checked(
    batch: Tokens, sinks: Places, causal: bool, swaps: Sequence[tuple[int, int, int]], vocabulary: int
) -> tuple[Swap, ...]:
    if not swaps:
        raise BadInputError("swaps is empty: give at least one (sequence, position, new id), or leave it out")
    found = []
    for b, p, new in swaps:
        if not 0 <= b < len(batch):
            raise BadInputError(f"swap {(b, p, new)}: sequence {b} is out of range: there are {len(batch)}")
        reason = _refusal(batch, b, p, sinks[b], causal)
        if reason:
            raise BadInputError(f"swap {(b, p, new)}: position {p} of sequence {b} {reason}")
        old = int(batch.row(b)[p])
        if not 0 <= new < vocabulary:
            raise BadInputError(f"swap {(b, p, new)}: id {new} is outside the vocabulary, 0 to {vocabulary - 1}")
        if new == old:
            raise BadInputError(f"swap {(b, p, new)}: the token there is {old} already; give another id")
        found.append((b, p, old, new))
    return tuple(found)


def _chunks(swaps: Sequence[Swap], batch: Tokens) -> list[list[int]]:
    """The numbers of the swaps that run together: of one sequence, as many as memory allows."""
    groups: dict[int, list[int]] = {}
    for n, (b, _, _, _) in enumerate(swaps):
        groups.setdefault(b, []).append(n)
    chunks = []
    for b, numbers in groups.items():
        size = max(1, min(MOST_ROWS, MOST_TOKENS // int(batch.lengths[b])))
        chunks += [numbers[n : n + size] for n in range(0, len(numbers), size)]
    return chunks
