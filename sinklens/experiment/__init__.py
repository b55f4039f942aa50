"""Experiments: edits judged with controls, metrics and side effects; sweeps over layers, heads and doses."""
