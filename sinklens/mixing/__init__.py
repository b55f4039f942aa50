"""Over-mixing, by Jacobians: indices, conditions, lengths, path sums, perturbations, collapse."""
