"""The lab's kinds of attention written out in float64, entry by entry: what the self-test compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WrittenKind:
    """One layer's kind of attention.

    Attributes:
        name: of the kind.
        slot: the slot's score of each query, for kinds whose slot has a key.
        value: what the slot writes.
        gate: what z is multiplied with.
    """

    name: str
    slot: Float[Tensor, "batch head query"] | None = None
    value: Float[Tensor, "head d_v"] | None = None
    gate: Float[Tensor, "batch head query d_v"] | None = None

    def pattern(self, scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"] | None:
        """The weights, or None where they are the softmax of the scores (with a learned logit)."""
        if self.name == "sigmoid":
            return 1 / (1 + (-scores).exp())
        if self.name == "sigmoid_normalised":
            share = 1 / (1 + (-scores).exp())
            return share / share.sum(-1, keepdim=True)
        if self.name == "relu":
            return scores.clamp(min=0)
        if self.slot is not None:
            return scores.exp() / (self.slot.exp() + scores.exp().sum(-1))[..., None]
        return None

    def output(
        self, z: Float[Tensor, "batch head query d_v"], scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query d_v"]:
        """z with what the slot writes, and gated."""
        if self.slot is not None and self.value is not None:
            share = self.slot.exp() / (self.slot.exp() + scores.exp().sum(-1))
            z = z + share[..., None] * self.value[:, None]
        return z if self.gate is None else z * self.gate


def kind_of(model: Any, layer: int, seen: dict[str, Tensor]) -> WrittenKind | None:
    """What a layer of a lab model does beside a softmax; None for every other model."""
    attention = model.blocks[layer].attn.original_component
    kind = getattr(attention, "kind", None)
    if kind is None:
        return None
    heads, repeats = attention.n_heads, attention.kv_repeats
    slot = value = gate = None
    if hasattr(attention, "key_bias"):
        q = seen["hook_q"].transpose(1, 2)
        key = attention.bias_scale * attention.key_bias.detach().double().repeat_interleave(repeats, 0)
        slot = (q * key[:, None]).sum(-1) / attention.d_head**0.5
    if hasattr(attention, "value_bias"):
        value = attention.bias_scale * attention.value_bias.detach().double().repeat_interleave(repeats, 0)
    if hasattr(attention, "gate"):
        weight, bias = attention.gate.weight.detach().double(), attention.gate.bias.detach().double()
        gate = torch.sigmoid(seen["hook_in"] @ weight.T + bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    return WrittenKind(kind.name, slot, value, gate)
