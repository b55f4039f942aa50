"""Loading models: the embedded catalogue, local folders and the hub, and what each was proven to do."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
