"""Heads: attention statistics, dormant heads, reading heads, attention maps."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
