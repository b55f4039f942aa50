"""Heads: attention statistics, dormant heads, reading heads, attention maps."""
