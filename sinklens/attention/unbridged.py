"""Attention of a transformers model without a bridge: every attention module calls a function of ours.

The function is registered with ``AttentionInterface`` and works between :func:`attending`'s braces only. The mask that
the model itself makes comes along (one byte per pair of tokens; vision models make none) and is compared with the
record of the proof at every call, so that what a query may see is never assumed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sinklens.attention.kernels import View
from sinklens.core.errors import BadInputError, SinklensError

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
