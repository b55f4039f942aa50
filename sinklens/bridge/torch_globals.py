"""What torch keeps once per process, so that threads must take turns at it or leave it alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge

from sinklens.core.validation import turn

_forward_mode = threading.RLock()
_generator = threading.RLock()


@contextlib.contextmanager
def forward_mode(model: TransformerBridge) -> Iterator[None]:
    """Forward-mode derivatives, one thread at a time.

    Torch has one level of dual numbers per process: a thread that leaves it takes the tangents of all others with it.
    The model's turn is taken first, as everywhere, so that no two threads wait for each other.
    """
    with turn(model), _forward_mode:
        yield


@contextlib.contextmanager
def own_generator(seed: int) -> Iterator[None]:
    """The global generator, seeded for a while, for code that can draw from no other (a host's initial weights)."""
    with _generator, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class PlainAttention(TorchFunctionMode):
    """Attention by the kernel that has derivatives of both modes, in this thread.

    Torch's own switch (``torch.nn.attention.sdpa_kernel``) is one for the whole process.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in the place of every torch function."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` by its kernel of plain operations, which takes a mask only as summands."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
