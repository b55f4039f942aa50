"""Internal: errors, argument checks, storage, intervals, who sees whom. Knows no model."""
