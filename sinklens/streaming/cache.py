"""``StreamingCache``: StreamingLLM's rolling cache for transformers' ``generate``, token by token.

The cache holds the kept tokens (the sinks) and the ``recent`` latest ones; everything else is evicted for good. Keys
are stored as the host rotated them, at their positions in the text. What the host attends to are the recent keys as
they are, and the kept keys moved to right before the window, by the host's own rotation
(:mod:`sinklens.streaming.rotary`). Only distances count, so this is the same as counting positions in the cache, and no
rounding error adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.cache_utils import Cache, DynamicLayer

from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.inputs.tokens import check_positions
from sinklens.streaming.attention import check_recent
from sinklens.streaming.rotary import Turn, turns


class StreamingCache(Cache):
    """A transformers ``Cache`` of some kept tokens and the most recent ones, positions counted in the cache.

    >>> cache = StreamingCache(model, sinks=4, recent=256)  # doctest: +SKIP
    >>> model.original_model.generate(ids, past_key_values=cache, max_new_tokens=1000)  # doctest: +SKIP

    Texts may be longer than the model's context window; memory stays that of ``kept + recent`` tokens. A prompt is read
    in one pass as long as nothing is evicted within it, and token by token beyond: pass ``prefill_chunk_size=1`` to
    ``generate`` then. Rows of a batch must not be padded: position 0 is the first column of every row.

    Args:
        model: a bridge from :func:`sinklens.load_model`; the cache is for its ``original_model``.
        sinks: how many first tokens are never evicted, or their positions.
        recent: how many of the latest tokens the cache holds beside them, the current one included.

    Raises:
        BadInputError: ``recent`` below 1, negative positions; in use: several tokens at once of which some would be
            evicted before others are read.
        UnsupportedModelError: as for :func:`sinklens.streaming.streaming_attention`; cropping.

    Source: Xiao et al. 2024 (2309.17453), section 3.2; transformers removed its ``SinkCache`` in version 4.53.
    Cost: memory of ``kept + recent`` tokens; per token the rotation of the kept keys and a copy of the cache.
    """

    def __init__(self, model: TransformerBridge, sinks: int | Sequence[int] = 4, recent: int = 256) -> None:
        check_recent(recent)
        if isinstance(sinks, bool) or (isinstance(sinks, int) and sinks < 0):
            raise BadInputError(f"sinks must be 0 or more first tokens, or their positions; got {sinks!r}")
        kept = tuple(range(sinks)) if isinstance(sinks, int) else tuple(sorted(check_positions(sinks)))
        self.sinks, self.recent = kept, recent
        super().__init__(layers=[StreamingLayer(turn, kept, recent) for turn in turns(model)])


class StreamingLayer(DynamicLayer):
    """One layer's part of a :class:`StreamingCache`."""

    is_croppable = False

    def __init__(self, turn: Turn, kept: tuple[int, ...], recent: int, **options: Any) -> None:
        super().__init__(**options)
        self.turn, self.kept, self.recent = turn, kept, recent
        self.places: list[int] = []
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Take in new keys and values; return what the newest queries may attend to, in order."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        after = self.seen + new
        everything = [*self.places, *range(self.seen, after)]
        stays = self._held(after)
        if new > 1 and len(stays) < after:
            raise BadInputError(
                f"{new} tokens came at once after {self.seen}, and a cache of {len(self.kept)} kept and {self.recent} "
                f"recent tokens evicts some of them before the others are read. Pass prefill_chunk_size=1 to generate, "
                f"or read the text in one forward inside streaming_attention(model, ...)"
            )
        assert self.keys is not None
        assert self.values is not None
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        if len(stays) < len(everything):
            held = set(stays)
            index = torch.tensor([n for n, place in enumerate(everything) if place in held], device=keys.device)
            keys, values = keys.index_select(-2, index), values.index_select(-2, index)
        self.keys, self.values, self.places, self.seen = keys, values, stays, after
        return self._moved(), values

    def _held(self, seen: int) -> list[int]:
        """The positions in the cache once so many tokens have been seen."""
        window = range(max(0, seen - self.recent), seen)
        return [p for p in self.kept if p < window.start] + list(window)

    def _moved(self) -> Tensor:
        """The keys, with those before the window where they stand as seen from the newest token."""
        assert self.keys is not None
        old = [n for n, place in enumerate(self.places) if place < self.seen - self.recent]
        if not old:
            return self.keys
        first = self.seen - len(self.places)  # the cache ends at the newest token's position in the text
        by = torch.tensor([first + n - self.places[n] for n in old], device=self.keys.device)
        return torch.cat([self.turn(self.keys[..., : len(old), :], by), self.keys[..., len(old) :, :]], -2)

    def get_seq_length(self) -> int:
        """How many tokens have been seen: the newest one's position in the text is one less."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next update returns, and the position of the first; the host's window counts from these."""
        length = len(self._held(self.seen + query_length))
        return length, self.seen + query_length - length

    def get_max_length(self) -> int:
        """No limit on the tokens that pass through."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.places, self.seen = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was evicted cannot come back."""
        raise UnsupportedModelError(
            f"a StreamingCache cannot give back {tokens_to_remove} tokens: what they pushed out is gone. Use greedy "
            f"search or sampling, not assisted generation"
        )
