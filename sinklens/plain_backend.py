"""Attention of a transformers model without a bridge: every attention module calls a function of ours.

The function is registered with ``AttentionInterface`` and works between :func:`attending`'s braces only. The mask that
the model itself makes comes along (one byte per pair of tokens; vision models make none) and is compared with the
record of the proof at every call, so that what a query may see is never assumed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sinklens.arguments import turn
from sinklens.errors import BadInputError, SinklensError, UnsupportedModelError
from sinklens.flash_backend import Flash
from sinklens.kernels import View
from sinklens.plain import PlainCapabilities, PlainModel
from sinklens.visibility import allowed_keys, row_blocks

if TYPE_CHECKING:
    pass

NAME = "sinklens_plain"

Attention = Callable[[nn.Module, Tensor, Tensor, Tensor, "Tensor | None", View], Tensor]

_owners: WeakKeyDictionary[nn.Module, Attention] = WeakKeyDictionary()


@contextlib.contextmanager
def implementation(hf: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model's modules run another attention implementation; their configurations are restored afterwards."""
    configs: list[Any] = [hf.config, *(getattr(module, "config", None) for module in hf.modules())]
    unique = {id(config): config for config in configs if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in unique.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, was in before:
            config._attn_implementation = was


@contextlib.contextmanager
def attending(hf: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Let every attention module of a model call ``attention(module, q, k, v, mask, view)``; contexts nest."""
    modules = list(hf.modules())
    before = {module: _owners[module] for module in modules if module in _owners}
    try:
        for module in modules:
            _owners[module] = attention
        with implementation(hf, NAME):
            yield
    finally:
        for module in modules:
            _owners.pop(module, None)
        _owners.update(before)


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


def text_inputs(hf: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Ids and padding, and no KV cache where there would be one."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if "use_cache" in parameters(hf):
        inputs["use_cache"] = False
    return inputs


def image_inputs(hf: PreTrainedModel, pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, Any]:
    """Pixels, with the switch that lets position embeddings follow another size, where there is one."""
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if "interpolate_pos_encoding" in parameters(hf):
        native = getattr(hf.config, "image_size", None)
        native = (native, native) if isinstance(native, int) else tuple(native or ())
        inputs["interpolate_pos_encoding"] = tuple(pixels.shape[-2:]) != native
    return inputs


def parameters(hf: PreTrainedModel) -> set[str]:
    """The names of the arguments of the stack's forward."""
    return set(inspect.signature(stack(hf).forward).parameters)


def stack(hf: PreTrainedModel) -> nn.Module:
    """The model without its head, as far as that reads what the model reads."""
    base = hf.base_model
    return base if hf.main_input_name in inspect.signature(base.forward).parameters else hf


def run_stack(hf: PreTrainedModel, inputs: dict[str, Any], **wanted: bool) -> Any:
    """One forward of the stack (no head), without gradients.

    Raises:
        BadInputError: the model refuses this input, such as an image of another size.
    """
    try:
        with torch.no_grad():
            return stack(hf)(**inputs, **wanted)
    except (SinklensError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        first = str(error).strip().splitlines()
        raise BadInputError(f"{type(hf).__name__} cannot run this input: {first[0] if first else error!r}") from error


@contextlib.contextmanager
def watching(layers: tuple[nn.Module, ...], visit: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Show each block's input, and the last one's output."""

    def before(layer: int) -> Callable[..., None]:
        return lambda _, args, kwargs: visit(layer, (args[0] if args else kwargs["hidden_states"]).detach())

    def after(_: nn.Module, __: Any, out: Any) -> None:
        visit(len(layers), (out if isinstance(out, Tensor) else out[0]).detach())

    handles = []
    try:
        for i, block in enumerate(layers):
            handles.append(block.register_forward_pre_hook(before(i), with_kwargs=True))
        handles.append(layers[-1].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: [batch, head, query, d] in, [batch, query, head, d] out."""
    if module not in _owners:
        raise SinklensError(
            f"the attention implementation {NAME!r} works inside sinklens.flash(model) only; set it back with "
            f"set_attn_implementation('sdpa')"
        )
    if dropout:
        raise SinklensError("the flash backend has no dropout; call eval() on the model")
    view = View(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=False,
        window=rest.get("sliding_window"),
        softcap=rest.get("softcap"),
        learned=rest.get("s_aux"),
    )
    out = _owners[module](module, query, key, value, attention_mask, view)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The whole mask as booleans; None where every token sees every other."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, _function)
AttentionMaskInterface.register(NAME, _mask)
