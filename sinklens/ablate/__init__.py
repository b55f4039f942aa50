"""Edits: sinks ablated, attention swapped or restricted, residual states and BOS patched."""
