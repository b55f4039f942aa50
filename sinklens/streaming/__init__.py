"""StreamingLLM in models that stand still: window with and without sinks, exactly, in one forward or token by token.

>>> from sinklens import streaming
>>> with streaming.streaming_attention(model, sinks=4, recent=256):  # doctest: +SKIP
...     logits = model(ids)
>>> streaming.streaming_loss(model, tokens, sinks=4, recent=256).perplexity  # doctest: +SKIP
>>> streaming.eviction_study(model, tokens, recent=(64, 256)).plot()  # doctest: +SKIP
>>> cache = streaming.StreamingCache(model, sinks=4, recent=256)  # doctest: +SKIP
>>> model.original_model.generate(ids, past_key_values=cache)  # doctest: +SKIP
"""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
