"""Policies that change gradients before the optimizer step, one technique a file."""
