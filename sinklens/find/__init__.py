"""Finding sinks: importance, lives and kinds, detectors by residual stream, registers, pages."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
