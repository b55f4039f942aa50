"""A sink taken apart: queries and keys, margin, what it writes, mass against value."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
