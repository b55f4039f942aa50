"""Finding sinks: importance, lives and kinds, detectors by residual stream, registers, pages."""
