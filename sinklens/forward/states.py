"""Hidden states of a batch: what enters and leaves every block, on a bridge and without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import collect
from sinklens.attention.unbridged import image_inputs, run_stack, text_inputs, watching
from sinklens.attention.unbridged_flash import plain_flash
from sinklens.bridge.adapters import block_input, block_output
from sinklens.bridge.capabilities import capabilities
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import UnsupportedModelError
from sinklens.inputs.images import Images
from sinklens.inputs.tokens import Tokens


def model_inputs(model: PlainModel, batch: Tokens) -> dict[str, Any]:
    """What the transformers model is called with. Text must be padded on the right (``Tokens.aligned``)."""
    if model.capabilities.reads == "text":
        return text_inputs(model.original_model, batch.ids, batch.mask)
    assert isinstance(batch, Images)
    return image_inputs(model.original_model, batch.pixels.to(model.dtype))


def stream(model: PlainModel, batch: Tokens, visit: Callable[[int, Tensor], None]) -> Tensor | None:
    """Run a batch and show the residual stream: ``visit(l, state)`` before block l, and after the last (l = L).

    Returns:
        The stack's own last hidden state, which may have a final norm in it; None where it returns none.

    Raises:
        UnsupportedModelError: the blocks do not form one stream.
    """
    facts = model.capabilities
    if not facts.stream:
        raise UnsupportedModelError(
            f"{facts.model}: its blocks do not hand one residual stream on, so norms and directions cannot be read; "
            f"method='attention' works"
        )
    with watching(model.layers, visit), plain_flash(model):
        out = run_stack(model.original_model, model_inputs(model, batch))
    return getattr(out, "last_hidden_state", None)


def typical_mean(residual: Float[Tensor, "*layer pos d_model"], norm_ratio: float) -> Float[Tensor, "*layer 1 d_model"]:
    """mu: the mean over the tokens whose norm is below ``norm_ratio`` times the median norm."""
    norm = residual.norm(dim=-1)
    ordinary = (norm < norm_ratio * norm.median(dim=-1, keepdim=True).values).to(residual)[..., None]
    return (residual * ordinary).sum(-2, keepdim=True) / ordinary.sum(-2, keepdim=True).clamp(min=1)


def block_inputs(model: TransformerBridge | PlainModel, one: Tokens) -> Float[Tensor, "layer pos d_model"]:
    """resid_pre of every layer, of one unpadded sequence."""
    if isinstance(model, PlainModel):
        return torch.stack(_plain_states(model, one)[0][:-1])
    return _states(model, one, [block_input(layer) for layer in range(capabilities(model).n_layers)])


def block_outputs(model: TransformerBridge | PlainModel, one: Tokens) -> Float[Tensor, "layer pos d_model"]:
    """Every block's output as transformers returns hidden states: the last one after the final norm."""
    if isinstance(model, PlainModel):
        states, last = _plain_states(model, one)
        return torch.stack([*states[1:-1], states[-1] if last is None else last[0]])
    names = [block_output(layer) for layer in range(capabilities(model).n_layers)]
    if not hasattr(model, "ln_final"):
        return _states(model, one, names)
    kept = collect(model, one.ids, [*names, "ln_final.hook_in", "ln_final.hook_out"])
    last = kept[names[-1]]
    if torch.equal(kept["ln_final.hook_in"], last):  # BERT's is a part of its masked-LM head instead
        last = kept["ln_final.hook_out"]
    return torch.stack([*(kept[name] for name in names[:-1]), last])


def _plain_states(model: PlainModel, one: Tokens) -> tuple[list[Tensor], Tensor | None]:
    states: list[Tensor] = []
    last = stream(model, one, lambda _, state: states.append(state[0].clone()))
    return states, last


def _states(model: TransformerBridge, one: Tokens, names: Sequence[str]) -> Float[Tensor, "layer pos d_model"]:
    kept = collect(model, one.ids, names)
    return torch.stack([kept[name] for name in names])
