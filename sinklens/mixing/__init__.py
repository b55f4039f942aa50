"""Over-mixing, by Jacobians: indices, conditions, lengths, path sums, perturbations, collapse."""

from sinklens.core.lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
