"""Several interventions on one sequence at once: each is a row of the batch, edited where one component writes.

A row adds a difference to a component's output at some tokens: what is put there minus what stood there. Upstream of
the component nothing changes, so what stood there is the clean run's. Not so where a run has several edits: the first
changes what the later components write, so there the output itself is put.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.importance import FAR
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, block_input, block_output
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import UnsupportedModelError
from sinklens.forward.metrics import METRICS, token_metrics
from sinklens.residual.components import Component, writing_hook

PATTERN_BYTES = 2**28  # of one layer's patterns over the rows of a batch


@dataclass(frozen=True, eq=False)
class Row:
    """One intervention: ``delta`` is added to a component's output at ``positions``; None: the clean run.

    ``instead``: what stands there afterwards, whatever edits before it have changed (in the place of ``delta``);
    ``where``: another hook than the one at which the component writes, such as its neurons' activations; ``also``:
    further edits of the same run.
    """

    component: Component | None
    positions: tuple[int, ...] = ()
    delta: Float[Tensor, "position features"] | None = None
    where: str | None = None
    also: tuple[Row, ...] = ()
    instead: Float[Tensor, "position features"] | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What attention does with the tracked tokens in every row.

    Attributes:
        margin: competitor-free margin, mean over heads and queries at least 16 away: [row, token, layer].
        alpha: mean over heads of the attention that all queries which see it pay it: [row, token, layer].
        beta: the same over the queries at least 16 away.
        loss: mean over scored predictions, nats: [row]; NaN where none was asked for.
        states: the stream that ``state_layer`` reads at the tracked tokens: [row, token, d_model]; NaN without.
    """

    margin: Float[Tensor, "row token layer"]
    alpha: Float[Tensor, "row token layer"]
    beta: Float[Tensor, "row token layer"]
    loss: Float[Tensor, " row"]
    states: Float[Tensor, "row token d_model"]


def run_rows(
    model: TransformerBridge,
    ids: Int[Tensor, "1 pos"],
    rows: Sequence[Row],
    tracked: Sequence[int],
    no_sink: Bool[Tensor, " pos"],
    scored: Int[Tensor, " scored"] | None = None,
    *,
    last: int | None = None,
    state_layer: int | None = None,
) -> Seen:
    """Run all rows, as many at once as one layer's patterns allow.

    Args:
        model: the bridge.
        ids: one unpadded sequence.
        rows: the interventions.
        tracked: the tokens whose attention is followed.
        no_sink: the tokens that the competitor-free margin compares with; a tracked token is never among them.
        scored: positions whose predictions are scored; None: no loss, and no unembedding.
        last: the last layer whose attention is wanted: later ones are not run (unless a loss is) and stay NaN.
        state_layer: keep the stream that this layer reads at the tracked tokens.

    Raises:
        UnsupportedModelError: the host discards the edit (post-norm models, or outputs that it scales).
    """
    facts = capabilities(model)
    length = ids.shape[1]
    size = facts.n_heads * length * length * 4
    at_once = max(1, PATTERN_BYTES // size)
    parts = [
        _run(model, ids, rows[start : start + at_once], tracked, no_sink, scored, last, state_layer)
        for start in range(0, len(rows), at_once)
    ]
    margin, alpha, beta, loss, states = (
        torch.cat([getattr(p, name) for p in parts]) for name in ("margin", "alpha", "beta", "loss", "states")
    )
    return Seen(margin, alpha, beta, loss, states)


def _run(
    model: TransformerBridge,
    ids: Int[Tensor, "1 pos"],
    rows: Sequence[Row],
    tracked: Sequence[int],
    no_sink: Bool[Tensor, " pos"],
    scored: Int[Tensor, " scored"] | None,
    last: int | None,
    state_layer: int | None,
) -> Seen:
    facts = capabilities(model)
    shape = (len(rows), len(tracked), facts.n_layers)
    margin, alpha, beta = (torch.full(shape, torch.nan) for _ in range(3))
    states = torch.full((len(rows), len(tracked), model.cfg.d_model), torch.nan)
    found = Seen(margin, alpha, beta, torch.full((len(rows),), torch.nan), states)
    length = ids.shape[1]
    index = torch.arange(length, device=ids.device)
    rest = no_sink.clone()
    rest[list(tracked)] = False

    def edit(changes: Sequence[tuple[int, Row]]) -> Any:
        def hook(tensor: Tensor, hook: Any) -> Tensor:
            new = tensor.clone()
            view = new.view(len(rows), length, -1)
            for r, row in changes:
                if row.delta is not None:
                    view[r, list(row.positions)] += row.delta.to(new)
                if row.instead is not None:
                    view[r, list(row.positions)] = row.instead.to(new)
            return new

        return hook

    def watch(layer: int) -> Any:
        def hook(pattern: Tensor, hook: Any) -> None:
            for t, k in enumerate(tracked):
                column = pattern[:, :, :, k].float()
                sees = _sees(index, k, causal=facts.causal, window=facts.windows[layer])
                far = sees & ((index - k).abs() >= FAR)
                found.alpha[:, t, layer] = column[:, :, sees].mean((1, 2)).cpu()
                if far.any():
                    others = pattern[:, :, far][..., rest].float().sum(-1)
                    found.beta[:, t, layer] = column[:, :, far].mean((1, 2)).cpu()
                    found.margin[:, t, layer] = (column[:, :, far].log() - others.log()).mean((1, 2)).cpu()

        return hook

    by_hook: dict[str, list[tuple[int, Row]]] = {}
    for r, whole in enumerate(rows):
        for row in (whole, *whole.also):
            if row.component is not None:
                by_hook.setdefault(row.where or writing_hook(model, row.component), []).append((r, row))
    hooks: list[Any] = [(name, edit(changes)) for name, changes in by_hook.items()]
    if state_layer is not None:

        def stream(tensor: Tensor, hook: Any) -> None:
            found.states[:] = tensor.detach().view(len(rows), length, -1)[:, list(tracked)].float().cpu()

        hooks.append((block_input(state_layer), stream))
    end = facts.n_layers - 1 if last is None or scored is not None else min(last, facts.n_layers - 1)
    hooks += [(attention_hook(layer, "hook_pattern"), watch(layer)) for layer in range(end + 1)]
    batch = ids.expand(len(rows), -1)
    if scored is None:
        run_blocks(model, batch, hooks, until=block_output(end))
        return found
    where = scored.to(ids.device)
    late = ("unembed.hook_in", lambda tensor, hook: tensor[:, where])
    with torch.no_grad():
        logits = model.run_with_hooks(batch, fwd_hooks=[*hooks, late])
    targets = ids[0, 1:][where]
    for r in range(len(rows)):
        found.loss[r] = float(token_metrics(METRICS["loss"], logits[r], logits[r], targets).mean())
    return found


def _sees(index: Int[Tensor, " pos"], key: int, *, causal: bool, window: int | None) -> Bool[Tensor, " pos"]:
    distance = index - key
    visible = distance >= 0 if causal else torch.ones_like(index, dtype=torch.bool)
    return visible if window is None else visible & (distance.abs() < window)


def check_writing(model: TransformerBridge, ids: Int[Tensor, "1 pos"], component: Component, position: int) -> None:
    """A difference added where a component writes must arrive in the stream as it is.

    Raises:
        UnsupportedModelError: it does not.
    """
    layer = component[1]
    kept: list[Tensor] = []
    last: Any = (block_output(layer), lambda tensor, hook: kept.append(tensor[0, position].detach().float().clone()))
    size = model.cfg.d_model
    delta = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(ids.device)

    def add(tensor: Tensor, hook: Any) -> Tensor:
        new = tensor.clone()
        new.view(1, ids.shape[1], -1)[0, position] += delta.to(new)
        return new

    for hooks in ([], [(writing_hook(model, component), add)]):
        run_blocks(model, ids, [*hooks, last], until=None)
    moved = kept[1] - kept[0]
    mlp_of_same_block = component[0] == "attn"  # what attention adds also reaches the MLP of its block
    gap = (moved - delta).norm() / delta.norm()
    if torch.equal(kept[0], kept[1]) or (not mlp_of_same_block and not gap < 1e-2):
        raise UnsupportedModelError(
            f"{capabilities(model).model}: what is added to the output of {component[0]} {layer} does not arrive in "
            f"the residual stream as it is (a norm or a factor stands between), so components cannot be replaced"
        )
