"""The flash backend of a model without a bridge: the one function stands in for its attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.attention.backend import Flash
from sinklens.attention.kernels import View
from sinklens.attention.unbridged import attending
from sinklens.bridge.unbridged import PlainCapabilities, PlainModel
from sinklens.core.errors import UnsupportedModelError
from sinklens.core.validation import turn
from sinklens.core.visibility import allowed_keys, row_blocks


@contextlib.contextmanager
def plain_flash(model: PlainModel) -> Iterator[Flash]:
    """:func:`sinklens.flash` of a model without a bridge."""
    layer_of = {module: layer for layer, module in enumerate(model.attentions)}
    names = {module: name for name, module in model.original_model.named_modules()}
    state = Flash(model, names=tuple(names[module] for module in model.attentions))

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, view: View) -> Tensor:
        if module not in layer_of:
            raise UnsupportedModelError(
                f"{model.capabilities.model}: {names.get(module, 'a module')} attends too, which it did not when the "
                f"model was loaded; load it again as it is now"
            )
        layer = layer_of[module]
        return state.attend(layer, q, k, v, replace(view, mask=real_keys(model.capabilities, layer, q, k, mask)))

    with turn(model), attending(model.original_model, attention):
        yield state


def real_keys(
    facts: PlainCapabilities,
    layer: int,
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d_k"],
    mask: Tensor | None,
) -> Bool[Tensor, "batch key"] | None:
    """The unpadded keys, after the model's own mask was found to be what the record says; None: all are real.

    Raises:
        UnsupportedModelError: the mask shows other keys than causality, window and padding allow, adds a bias, or
            differs between heads; or the forward goes on from a KV cache.
    """
    batch, length = q.shape[0], k.shape[2]
    window = facts.windows[layer]
    if q.shape[2] != length:
        raise UnsupportedModelError(
            f"{facts.model}: without a bridge the flash backend runs whole sequences only, not steps with a KV cache; "
            f"pass use_cache=False"
        )
    other = UnsupportedModelError(
        f"{facts.model}: in layer {layer} the model's own mask is not what was proven at loading "
        f"(causal={facts.causal}, window={window}); alpha would have a wrong denominator. Sequences packed into one "
        f"row need rows of their own; otherwise please report this architecture"
    )
    if mask is None:
        if facts.causal or (window is not None and window < length):
            raise other
        return None
    if mask.ndim in (2, 4) and mask.shape[-1] == length:
        shown = mask[:, None, None] if mask.ndim == 2 else mask
        floating = shown.is_floating_point() and mask.ndim == 4
        seen = shown > torch.finfo(shown.dtype).min / 2 if floating else shown.bool()
        if floating and bool(((shown != 0) & seen).any()):
            raise UnsupportedModelError(f"{facts.model}: layer {layer} adds a bias to its scores through the mask")
        if seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all()):
            raise UnsupportedModelError(f"{facts.model}: layer {layer} has a mask that differs between heads")
    else:
        raise UnsupportedModelError(f"{facts.model}: layer {layer} has a mask of shape {tuple(mask.shape)}")
    seen = seen[:, 0].expand(batch, length, length)
    real = seen.diagonal(dim1=1, dim2=2)
    for rows in row_blocks(length):
        allowed = allowed_keys(real, rows, causal=facts.causal, window=window)
        if not torch.equal(seen[:, rows] & real[:, rows, None], allowed):
            raise other
    return None if bool(real.all()) else real
