"""What an edit of attention is: called with what a layer computed, it returns the new pattern and what z gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import UnsupportedModelError
from sinklens.forward.follow import Forward


class PatternEdit:
    """An edit of attention: called with what a layer computed, for all queries or for a block of them.

    ``begin`` and ``finish`` stand around each layer of each forward.
    """

    def __init__(self, function: Callable[[int, Seen], Tensor]) -> None:
        self._function = function

    def begin(self, layer: int) -> None:
        """A layer's attention begins."""

    def __call__(self, layer: int, seen: Seen) -> Tensor:
        """The new pattern; what z gains is left in ``seen``."""
        return self._function(layer, seen)

    def finish(self, layer: int) -> None:
        """A layer's attention is complete."""


class Seen:
    """What one layer's attention computes in this call, and what the edit leaves for z.

    Attributes:
        scores: before the softmax, in float32 at least; masked entries hold the dtype's minimum.
        pattern: the kernel's softmax.
        allowed: which keys each query may see: [batch, 1, query, key].
        scale, softcap: of the scores, where they are known here.
        rows, keys: the queries and the keys as columns of the forward; every key that a query may see is among them.
        queries: as they are scored: [batch, head, query, d_head]; only where asked for.
        extra: to be added to z: [batch, head, query, d_head].
        bias: the coefficient of b_V to be added to z: [batch, head, query].
    """

    def __init__(self, n_kv_heads: int) -> None:
        self.n_kv_heads = n_kv_heads
        self.raw_scores: Tensor | None = None
        self.scores: Float[Tensor, "batch head query key"]
        self.pattern: Float[Tensor, "batch head query key"]
        self.allowed: Bool[Tensor, "batch 1 query key"]
        self.queries: Float[Tensor, "batch head query d_head"]
        self.rows = self.keys = slice(0)
        self.scale: float | None = None
        self.softcap: float | None = None
        self.extra: Float[Tensor, "batch head query d_head"] | None = None
        self.bias: Float[Tensor, "batch head query"] | None = None
        self._current: dict[str, Float[Tensor, "batch pos kv_head d_head"]] = {}
        self._kept: dict[str, dict[int, Tensor]] = {}

    def keep(self, what: str, tensor: Float[Tensor, "batch pos kv_head d_head"], fresh: bool) -> None:
        """Hold this call's keys or values; a fresh forward forgets what was kept of an earlier one."""
        self._current[what] = tensor
        if fresh:
            self._kept[what] = {}

    def at(self, what: str, columns: Sequence[int], past: int) -> Float[Tensor, "batch column kv_head d_head"]:
        """Keys or values at absolute columns, also of earlier calls where they were asked for then."""
        kept = self._kept.setdefault(what, {})
        for column in columns:
            if column >= past:
                kept[column] = self._current[what][:, column - past].clone()
        return torch.stack([kept[column] for column in columns], 1)

    def open(self, pattern: Tensor, forward: Forward) -> None:
        """Take the pattern: the scores are complete now."""
        if self.raw_scores is None:
            raise UnsupportedModelError("hook_pattern fired without hook_attn_scores; this host cannot be edited")
        raw = self.raw_scores
        self.allowed = raw[:, :1] > torch.finfo(raw.dtype).min / 2
        self.scores = raw.to(torch.promote_types(raw.dtype, torch.float32))
        self.pattern, self.raw_scores, self.extra, self.bias = pattern, None, None, None
        self.rows = slice(forward.past, forward.columns)
        self.keys = slice(
            forward.columns - pattern.shape[-1], forward.columns
        )  # a sliding KV cache holds the last ones

    def close(self) -> None:
        """Let the layer's tensors go."""
        self._current.clear()
        self.extra = self.bias = None
        for name in ("scores", "pattern", "allowed", "queries"):
            self.__dict__.pop(name, None)


@dataclass(frozen=True, eq=False)
class Attached:
    """An edit with the forward that it follows, as the registered attention function takes it."""

    edit: PatternEdit
    forward: Forward
    name: str
    bias: Float[Tensor, "head d_head"] | None
