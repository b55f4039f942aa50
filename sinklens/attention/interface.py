"""The attention function and the mask function that transformers calls by name, and whose calls they answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sinklens.attention.kernels import View
from sinklens.core.errors import BadInputError, SinklensError

NAME = "sinklens"

# The attention modules whose calls are answered, by whom, and as which layer.
owners: WeakKeyDictionary[nn.Module, tuple[Callable[..., Any], int]] = WeakKeyDictionary()


def put_forward(module: nn.Module, forward: Any) -> None:
    """Put a module's own forward in force; None is its class's."""
    module.__dict__.pop("forward", None)
    if forward is not None:
        module.__dict__["forward"] = forward


def _function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: [batch, head, query, d] in, [batch, query, head, d] out."""
    if module not in owners:
        raise SinklensError(
            f"the attention implementation {NAME!r} works inside sinklens.flash(model) only; set it back with "
            f"model.set_attn_implementation('eager')"
        )
    if dropout:
        raise SinklensError("the flash backend has no dropout; call model.eval()")
    attend, layer = owners[module]
    view = View(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=True,
        window=rest.get("sliding_window"),
        softcap=rest.get("softcap"),
        learned=rest.get("s_aux"),
        mask=_real(attention_mask, key.shape[2]),
    )
    found = attend(layer, query, key, value, view)
    out, pattern = found if isinstance(found, tuple) else (found, None)
    return out.transpose(1, 2).contiguous(), pattern


def _real(mask: Tensor | None, n_keys: int) -> Bool[Tensor, "batch key"] | None:
    """Real keys from a mask [batch, key], or [batch, 1, query, key], in which real keys see themselves."""
    if mask is None:
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, -1] if mask.shape[-2] == 1 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.shape[1] != n_keys:
        raise BadInputError(f"the attention mask has {mask.shape[1]} columns and there are {n_keys} keys")
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> Tensor | None:
    """Padding as [batch, key]; packed sequences, of which the mask would know nothing, are refused."""
    rule = kwargs.get("mask_function")
    if rule is not None and q_length > 1 and q_length == kv_length:
        device = kwargs.get("device", "cpu")
        rows = torch.arange(batch_size, device=device)[:, None]
        later = torch.arange(1, q_length, device=device)[None]
        if not torch.as_tensor(rule(rows, torch.zeros_like(rows), later, later - 1)).all():
            raise BadInputError(
                "these position_ids pack several sequences into one row, which the flash backend does not follow; "
                "give each sequence a row of its own, or use backend='hooks'"
            )
    return flash_attention_mask(batch_size, q_length, kv_length, *args, **kwargs)


AttentionInterface.register(NAME, _function)
AttentionMaskInterface.register(NAME, _mask)
