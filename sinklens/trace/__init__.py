"""Who writes a sink: contributions, causal replacement, neurons, the claims about secondary sinks."""
