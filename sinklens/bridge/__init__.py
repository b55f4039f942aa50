"""Internal: TransformerLens as it is, hook names and quirks of architectures, what a bridge was proven to do."""
