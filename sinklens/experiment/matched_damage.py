"""``matched_damage``: an edit that is no sink, tuned until it costs as much loss as another: the control of every claim
that removing sinks changes mixing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.adapters import block_input
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.forward.metrics import token_loss
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.residual.components import writing_hook
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

Kind = Literal["noise", "mlp"]
STEPS = 14
LARGEST = {"noise": 16.0, "mlp": 1.0}


@dataclass(frozen=True, eq=False)
class MatchedDamage(ShownInJupyter, table="_fields"):
    """An edit of a chosen cost.

    Attributes:
        hooks: the edit.
        kind, size: what it is, and how strong.
        base, target, loss: mean loss in nats without an edit, of the edit to be matched, and reached.
    """

    hooks: list[Any]
    kind: str
    size: float
    base: float
    target: float
    loss: float

    def __repr__(self) -> str:
        words = f"loss {self.loss:.3f} for {self.target:.3f} (base {self.base:.3f})"
        return f"MatchedDamage({self.kind}, size {self.size:.4g}: {words})"


@public
def matched_damage(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    hooks: Sequence[Any],
    *,
    kind: Kind = "noise",
    spared: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
    tolerance: float = 0.02,
    mask_id: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> MatchedDamage:
    """An edit that touches no sink and costs the same loss as ``hooks`` on the same tokens.

    Args:
        model: a decoder, or an encoder with a trained masked-LM head (its loss is the pseudo-loss, :func:`token_loss`).
        tokens: on which the losses are compared.
        hooks: the edit whose cost is matched.
        kind: "noise": every token's stream gets ``size |x_i|`` times a fixed random unit vector of its position (the
            length is taken as a constant, so the Jacobian stays that of a shifted stream); "mlp": what MLPs add is
            scaled by ``1 - size``.
        spared: positions that are left as they are.
        layers: before which blocks noise is added, or whose MLPs are scaled. Default: noise before block 1, all MLPs.
        tolerance: how close the loss must come, in nats.
        mask_id: the id of an encoder's [MASK], where its tokenizer names none.
        seed: of the noise.
        progress: show a bar.

    Returns:
        The edit of least size that was found by bisection.

    Cost: at most 16 forwards per sequence (encoders: as many rows of a forward per token).

    Raises:
        BadInputError: the edit costs no more than the tolerance, or this kind cannot cost so much.
        UnsupportedModelError: a model without a trained language-model head, an encoder without a known mask token.
    """
    n_layers = capabilities(model).n_layers
    chosen = list(layers if layers is not None else range(1, 2) if kind == "noise" else range(n_layers))
    if any(not 0 <= n < n_layers for n in chosen) or not chosen:
        raise BadInputError(f"layers {chosen} are out of range: the model has {n_layers}")
    batch = as_tokens(model, tokens)

    def cost(edit: Sequence[Any]) -> float:
        return float(token_loss(model, batch, hooks=edit, mask_id=mask_id).double().nanmean())

    with progress_bar("matching the loss", STEPS + 2, progress) as advance:
        base, target = cost([]), cost(hooks)
        if target - base <= tolerance:
            raise BadInputError(
                f"the edit costs {target - base:+.3f} nats, no more than the tolerance {tolerance}: there is no damage "
                f"to match"
            )
        low, high = 0.0, LARGEST[kind]
        size = high
        reached = cost(damage(model, kind, size, chosen, spared, seed))
        advance()
        if reached < target - tolerance:
            raise BadInputError(f"{kind} reaches a loss of {reached:.3f} at most, not {target:.3f}; take another kind")
        for _ in range(STEPS):
            advance()
            if abs(reached - target) <= tolerance:
                break
            size = math.sqrt(low * high) if low > 0 else high / 8
            reached = cost(damage(model, kind, size, chosen, spared, seed))
            low, high = (size, high) if reached < target else (low, size)
    return MatchedDamage(damage(model, kind, size, chosen, spared, seed), kind, size, base, target, reached)


def damage(
    model: TransformerBridge, kind: str, size: float, layers: Sequence[int], spared: Sequence[int] = (0,), seed: int = 0
) -> list[Any]:
    """The edit itself, at one size."""
    kept = set(spared)
    if kind == "noise":
        return [(block_input(n), _noise(size, kept, seed + n)) for n in layers]
    return [(writing_hook(model, ("mlp", n)), _shrink(size, kept)) for n in layers]


def _noise(size: float, spared: set[int], seed: int) -> Any:
    known: dict[int, Tensor] = {}

    def direction(position: int, like: Tensor) -> Float[Tensor, " d_model"]:
        if position not in known:
            draw = torch.Generator().manual_seed(1_000_003 * seed + position)
            v = torch.randn(like.shape[-1], generator=draw)
            known[position] = v / v.norm()
        return known[position].to(like.device, like.dtype)

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        unit = torch.stack([direction(p, tensor) * float(p not in spared) for p in range(tensor.shape[-2])])
        return tensor + size * tensor.detach().norm(dim=-1, keepdim=True) * unit

    return hook


def _shrink(size: float, spared: set[int]) -> Any:
    def hook(tensor: Tensor, hook: Any) -> Tensor:
        factor = torch.tensor([1.0 if p in spared else 1 - size for p in range(tensor.shape[-2])])
        return tensor * factor.to(tensor.device, tensor.dtype)[:, None]

    return hook
