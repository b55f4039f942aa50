"""What is measured while a lab model trains: losses by class, and where every head's attention goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sinklens.lab.attention import LabAttention
from sinklens.lab.model import LabModel
from sinklens.lab.tasks import Batch, Task

EPSILON = 0.3


class Watcher:
    """Stands in for a bridge: collects every layer's pattern, weighted values and stream during one forward."""

    def __init__(self) -> None:
        self.pattern: Tensor | None = None

    def hook_rot_q(self, q: Tensor) -> Tensor:
        """Unchanged."""
        return q

    hook_cos = hook_sin = hook_rot_k = hook_attn_scores = hook_rot_q

    def hook_pattern(self, pattern: Tensor) -> Tensor:
        """Kept."""
        self.pattern = pattern
        return pattern


@contextmanager
def watched(model: LabModel) -> Iterator[list[dict[str, Tensor]]]:
    """During the block, each layer's attention leaves its pattern, values' norms and input stream in the list."""
    found: list[dict[str, Tensor]] = [{} for _ in model.layers]
    handles = []
    for layer, block in enumerate(model.layers):
        watcher = Watcher()

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], watcher: Watcher = watcher) -> Any:
            return args, kwargs | {"hooks": watcher}

        def keep(what: str, layer: int = layer) -> Any:
            def hook(*call: Any) -> None:
                output = call[-1]
                part = {"pattern": 1, "stream": 0}.get(what)
                found[layer][what] = (output if part is None else output[part]).detach()

            return hook

        handles += [
            block.attn.register_forward_pre_hook(before, with_kwargs=True),
            block.attn.register_forward_hook(keep("pattern")),
            block.attn.v.register_forward_hook(keep("values")),
            block.register_forward_hook(keep("stream")),
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_losses(model: LabModel, batch: Batch, masking: str = "causal") -> Float[Tensor, "batch pos"]:
    """Loss in nats of predicting each token; 0 at unscored ones (look at ``batch.classes``)."""
    logits = model(batch.ids, attention_mask=batch.hidden(masking))
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    losses = torch.cat([losses.new_zeros(len(batch.ids), 1), losses.view(len(batch.ids), -1)], 1)
    return losses.masked_fill(batch.classes < 0, 0)


def mean_loss(losses: Float[Tensor, "batch pos"], batch: Batch) -> Tensor:
    """The mean over scored tokens."""
    return losses.sum() / (batch.classes >= 0).sum()


def importance(
    pattern: Float[Tensor, "batch head query key"], visible: Bool[Tensor, "#batch 1 query key"]
) -> Float[Tensor, "batch head key"]:
    """Gu's alpha: the mean of each column over the queries that can see it (as :class:`sinklens.SinkScores`)."""
    return pattern.sum(2) / visible.sum(2).clamp(min=1)


def head_figures(
    pattern: Float[Tensor, "batch head query key"],
    visible: Bool[Tensor, "#batch 1 query key"],
    written: Float[Tensor, "batch head key"],
    *,
    slot: bool,
    epsilon: float = EPSILON,
) -> dict[str, Tensor]:
    """Where each head's attention goes, by head.

    ``sink`` and ``alpha`` are Gu's on the weights as they are; the ``relative`` ones on ``|A| / sum |A|``, which can be
    compared where rows sum to anything. All sink figures are means over sequences.

    - ``alpha``, ``sink``: alpha of the first token, and the share of sequences in which it exceeds epsilon.
    - ``relative_alpha``, ``relative_sink``: the same on relative weights.
    - ``anywhere``: the share of sequences in which any token's relative alpha exceeds epsilon (of all tokens that at
      least a quarter of the queries see).
    - ``slot_mass``, ``slot_sink``: what the slot takes, on average, and how often more than epsilon; 0 without a slot.
    - ``row_sum``: of the weights of tokens. ``self``: the relative weight of the query's own token.
    - ``value_ratio``: size of ``W_O v`` of the first token over the mean of the others.
    """
    total = pattern.abs().sum(-1, keepdim=True)
    relative = pattern.abs() / total.clamp(min=1e-9)
    seen = visible.sum(2)
    reached = seen >= max(1, pattern.shape[2] // 4)
    alpha, share = importance(pattern, visible), importance(relative, visible)
    rest = (1 - total[..., 0]).mean(2) if slot else torch.zeros_like(alpha[..., 0])
    own = relative.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(-1)
    return {
        "alpha": alpha[..., 0].mean(0),
        "sink": (alpha[..., 0] > epsilon).double().mean(0),
        "relative_alpha": share[..., 0].mean(0),
        "relative_sink": (share[..., 0] > epsilon).double().mean(0),
        "anywhere": (share.masked_fill(~reached, 0).amax(-1) > epsilon).double().mean(0),
        "slot_mass": rest.mean(0),
        "slot_sink": (rest > epsilon).double().mean(0),
        "row_sum": total[..., 0].mean((0, 2)),
        "self": own.mean(0),
        "value_ratio": (written[..., 0] / written[..., 1:].mean(-1)).mean(0),
    }


@torch.no_grad()
def evaluate(model: LabModel, task: Task, batch: Batch) -> list[dict[str, float | int | str]]:
    """One row for the model (losses, floors, residual norms) and one per head.

    The model's row has layer and head -1 and, per class, ``loss_<class>`` and ``floor_<class>``; ``norm_ratio`` of
    layer l is the first token's residual norm after block l over the mean of the others.
    """
    training = model.training
    model.eval()
    with watched(model) as found:
        losses = token_losses(model, batch, task.masking)
    model.train(training)
    row: dict[str, float | int | str] = {"layer": -1, "head": -1, "loss": float(mean_loss(losses, batch))}
    scored = batch.classes >= 0
    row["floor"] = float(batch.floor[scored].mean())
    for index, name in enumerate(task.classes):
        chosen = batch.classes == index
        row[f"loss_{name}"], row[f"floor_{name}"] = float(losses[chosen].mean()), float(batch.floor[chosen].mean())
    rows = [row]
    hidden = batch.hidden(task.masking)
    length = batch.ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=batch.ids.device).tril()[None, None]
    visible = visible if hidden is None else visible & ~hidden
    for layer, seen in enumerate(found):
        attention: Any = model.layers[layer].attn
        norms = seen["stream"].float().norm(dim=-1)
        ratio = float((norms[:, 0] / norms[:, 1:].mean(1)).mean())
        figures = head_figures(
            seen["pattern"].float(),
            visible,
            written_norms(attention, seen["values"]),
            slot=attention.kind.slot != "none",
        )
        for head in range(attention.n_heads):
            values = {name: float(tensor[head]) for name, tensor in figures.items()}
            rows.append({"layer": layer, "head": head, "norm_ratio": ratio, **values})
    return rows


def written_norms(attention: LabAttention, values: Float[Tensor, "batch pos kv_width"]) -> Tensor:
    """``|| W_O^h v_j ||`` of every token and head: what it would write at weight 1."""
    batch, length, _ = values.shape
    v = values.float().view(batch, length, attention.n_kv_heads, -1).repeat_interleave(attention.kv_repeats, 2)
    output = attention.o.weight.float().view(-1, attention.n_heads, attention.d_head)
    return torch.einsum("bphd,mhd->bphm", v, output).norm(dim=-1).transpose(1, 2)


@torch.no_grad()
def without_first(model: LabModel, task: Task, batch: Batch) -> dict[str, float]:
    """Loss and sinks when the first token (BOS, where the task has one) is left out at inference.

    Both losses are over the same targets: those that both inputs can predict.
    """
    kept = batch.classes.clone()
    kept[:, 1] = -1  # without the first token, nothing predicts the second
    if "copy" in task.classes:
        kept[:, 2] = kept[:, 2].masked_fill(kept[:, 2] == task.classes.index("copy"), -1)  # its source is left out
    whole = Batch(batch.ids, kept, batch.floor, batch.documents)
    shorter = whole.without_first()
    rows = {"with": evaluate(model, task, whole), "without": evaluate(model, task, shorter)}
    found: dict[str, float] = {}
    for name, measured in rows.items():
        found[f"loss_{name}"] = float(measured[0]["loss"])
        for figure in ("sink", "relative_sink", "alpha", "anywhere"):
            found[f"{figure}_{name}"] = sum(float(row[figure]) for row in measured[1:]) / len(measured[1:])
    return found
