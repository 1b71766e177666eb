"""Change gradients before the optimizer step: policies, one technique in each file."""
