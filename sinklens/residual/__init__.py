"""Internal: the residual stream taken apart, norms as linear maps, components and what they write."""
