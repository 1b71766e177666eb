"""Change weights after the optimizer step: proximal steps, bounds on norms, weight decay."""
