"""StreamingLLM in models that stand still: window with and without sinks, exactly, in one forward or token by token.

>>> from sinklens import streaming
>>> with streaming.streaming_attention(model, sinks=4, recent=256):  # doctest: +SKIP
...     logits = model(ids)
"""

from __future__ import annotations

from sinklens.rolling import streaming_attention
from sinklens.streaming_cache import StreamingCache

__all__ = ["StreamingCache", "streaming_attention"]
