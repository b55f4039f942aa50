"""A self-test of a model behind :func:`sinklens.check_model`: every function against its formula, written out."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
