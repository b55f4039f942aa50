"""Forwards that read: with hooks, without gradients, and no further than needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from sinklens.attention.backend import hooked
from sinklens.bridge.adapters import block_output


def run_blocks(
    model: TransformerBridge,
    ids: Int[Tensor, "batch pos"],
    hooks: Sequence[tuple[str, Any]],
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
    until: str | None = None,
    flashing: bool = False,
) -> None:
    """Run the model with hooks, without gradients, as far as ``until`` (default: the last block's output).

    The unembedding, which may cost more than all blocks of a small model, is not run. The host's own attention runs,
    also inside a flash context, unless ``flashing``.
    """

    def stop(tensor: Tensor, hook: Any) -> None:
        raise StopAtLayerException(tensor[:, :0])

    ended = (until or block_output(model.cfg.n_layers - 1), stop)
    with torch.no_grad(), contextlib.nullcontext() if flashing else hooked(model):
        model.run_with_hooks(ids, attention_mask=mask, return_type=None, fwd_hooks=[*hooks, ended])


def collect(model: TransformerBridge, ids: Int[Tensor, "1 pos"], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors at the named hooks for one unpadded sequence; the forward ends at the last of them."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            kept[name] = tensor[0].detach()

        return hook

    past_blocks = [name for name in names if not name.startswith("blocks.")]
    run_blocks(model, ids, [(name, keep(name)) for name in names], until=past_blocks[-1] if past_blocks else None)
    return kept
