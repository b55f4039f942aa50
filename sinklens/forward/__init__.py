"""Internal: one way to run a model and to score what it predicts."""
