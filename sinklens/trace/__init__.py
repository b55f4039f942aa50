"""Who writes a sink: contributions, causal replacement, neurons, the claims about secondary sinks."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
