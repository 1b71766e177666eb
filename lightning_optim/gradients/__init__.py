"""Gradients: accumulation, clipping, monitoring, and sharpness-aware steps."""
