"""Resume a run exactly."""
