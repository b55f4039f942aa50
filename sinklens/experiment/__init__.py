"""Experiments: edits judged with controls, metrics and side effects; sweeps over layers, heads and doses."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
