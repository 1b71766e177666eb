"""Average weights: over the optimizer steps of a fit, or over checkpoints."""
