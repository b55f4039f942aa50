"""Internal: a layer's attention, by kernels, by the flash backend and without a bridge."""
