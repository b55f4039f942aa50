"""Published results about attention sinks, measured again: the catalogue, the rules, ``sinklens.reproduce``."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
