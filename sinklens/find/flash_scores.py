"""Alpha and beta by the flash backend: one blocked pass for all columns, a fused kernel for a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Backend, busy
from sinklens.attention.flash import flash
from sinklens.attention.flash_proof import unsupported
from sinklens.attention.importance import FAR, ColumnSums, by_position, visibility
from sinklens.attention.kernels import View, blocked, dense_scores, fused, fused_takes
from sinklens.attention.run import run_blocks
from sinklens.attention.unbridged import run_stack
from sinklens.bridge.capabilities import capabilities, record
from sinklens.bridge.unbridged import PlainModel, refusal
from sinklens.core.errors import UnsupportedModelError
from sinklens.forward.states import model_inputs
from sinklens.inputs.tokens import Tokens


def choose_backend(model: TransformerBridge | PlainModel, backend: Backend) -> str:
    """The backend that runs: "hooks" or "flash".

    Raises:
        UnsupportedModelError: flash was asked for and the model's proof does not allow it.

    Around hooks on what attention computes (an edit that is being measured), "auto" takes the hooks backend.
    """
    if isinstance(model, PlainModel):
        if backend == "hooks":
            raise UnsupportedModelError(f"backend='hooks' reads hooks. {refusal(model)}; backend='auto' works")
        return "flash"
    if backend == "hooks" or (backend == "auto" and busy(model)):
        return "hooks"
    reason = unsupported(model)
    if reason and backend == "flash":
        raise UnsupportedModelError(f"{capabilities(model).model}: the flash backend cannot run it: {reason}")
    return "hooks" if reason else "flash"


def only(values: Float[Tensor, "*rest pos"], positions: Sequence[int] | None) -> Float[Tensor, "*rest pos"]:
    """NaN at all other positions."""
    if positions is None:
        return values
    kept = torch.full_like(values, torch.nan)
    inside = [p for p in positions if p < values.shape[-1]]
    kept[..., inside] = values[..., inside]
    return kept


def flash_scores(
    model: TransformerBridge | PlainModel, batch: Tokens, positions: tuple[int, ...] | None, advance: Callable[[], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, str]]:
    """Alpha, beta, uniform and learned mass of one batch, by position, on the CPU; and which kernel ran per layer."""
    facts = record(model)
    if isinstance(model, PlainModel):
        batch = batch.aligned(int(batch.lengths.max()))  # positions count from the first real token there, too
    seen_by = {w: visibility(batch.mask, causal=facts.causal, window=w) for w in set(facts.windows)}
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    rest: list[Tensor] = []

    def collect(layer: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, str]:
        sums = ColumnSums((q.shape[0] * k.shape[1], q.shape[1] // k.shape[1], k.shape[2]), q.device)
        if positions is not None and fused_takes(q, k, v, view):
            out, lse = fused(q, k, v, view)
            path = "fused"
            _few_columns(sums, positions, q, k, view, lse)
        else:
            out, lse = blocked(q, k, v, view, visit=sums.add)
            path = "blocked"
        if not out.isfinite().all():
            raise UnsupportedModelError(f"{facts.model}: attention in layer {layer} is NaN or infinite on these tokens")
        mean, far = sums.means(seen_by[facts.windows[layer]])
        alpha.append(only(by_position(mean, batch.mask).cpu(), positions))
        beta.append(only(by_position(far, batch.mask).cpu(), positions))
        rest.append(_learned_mass(view, lse, batch).cpu())
        advance()
        return out, path

    with flash(model) as state:
        state.collect = collect
        if isinstance(model, PlainModel):
            run_stack(model.original_model, model_inputs(model, batch))
        else:
            run_blocks(model, batch.ids, [], mask=batch.mask, flashing=True)
        paths = dict(state.paths)
    uniform = [by_position(seen_by[window].uniform, batch.mask).cpu() for window in facts.windows]
    return torch.stack(alpha, 1), torch.stack(beta, 1), torch.stack(uniform, 1), torch.stack(rest, 1), paths


def _few_columns(sums: ColumnSums, positions: Sequence[int], q: Tensor, k: Tensor, view: View, lse: Tensor) -> None:
    """``A[i,k] = exp(s_ik - lse_i)`` of the columns asked for; no padding here, so positions are columns."""
    columns = torch.tensor([p for p in positions if p < k.shape[2]], device=q.device)
    full = lse.float()
    if view.learned is not None:
        full = torch.logaddexp(full, view.learned.to(full)[:, None].expand_as(full))
    weights = dense_scores(q, k.index_select(2, columns), view).sub_(full[..., None]).exp_()
    distance = torch.arange(q.shape[2], device=q.device)[:, None] - columns
    if view.causal:
        weights.masked_fill_(distance < 0, 0)
    shape = (*sums.far.shape[:2], len(columns))
    sums.near_and_far[..., columns] = weights.sum(2).view(shape).to(sums.far)
    sums.far[..., columns] = (weights * (distance.abs() >= FAR)).sum(2).view(shape).to(sums.far)


def _learned_mass(view: View, lse: Tensor | None, batch: Tokens) -> Float[Tensor, "batch head"]:
    """The mean over real queries of what a learned logit takes."""
    if view.learned is None or lse is None:
        return torch.zeros(len(batch), 1).expand(-1, 1)
    mass = (view.learned.to(lse)[:, None] - lse).sigmoid() * batch.mask[:, None]
    return (mass.sum(-1) / batch.mask.sum(1)[:, None]).float()
