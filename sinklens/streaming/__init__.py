"""StreamingLLM in models that stand still: window with and without sinks, exactly, in one forward or token by token.

>>> from sinklens import streaming
>>> with streaming.streaming_attention(model, sinks=4, recent=256):  # doctest: +SKIP
...     logits = model(ids)
>>> streaming.streaming_loss(model, tokens, sinks=4, recent=256).perplexity  # doctest: +SKIP
>>> streaming.eviction_study(model, tokens, recent=(64, 256)).plot()  # doctest: +SKIP
>>> cache = streaming.StreamingCache(model, sinks=4, recent=256)  # doctest: +SKIP
>>> model.original_model.generate(ids, past_key_values=cache)  # doctest: +SKIP
"""

from __future__ import annotations

from sinklens.streaming.attention import streaming_attention
from sinklens.streaming.cache import StreamingCache
from sinklens.streaming.eviction import EvictionStudy, eviction_study
from sinklens.streaming.loss import StreamingLoss, streaming_loss
from sinklens.streaming.page import write_streaming

__all__ = [
    "EvictionStudy",
    "StreamingCache",
    "StreamingLoss",
    "eviction_study",
    "streaming_attention",
    "streaming_loss",
    "write_streaming",
]
